"""Text of one's own: files of plain text, JSON Lines or parquet, in a folder or by a pattern."""

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from glob import has_magic
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from nanogpt.data.files import JSON, RECORDS, TEXTS, Reader
from nanogpt.data.records import log_once
from nanogpt.data.source import Extent, Source, files_fingerprint, local_path
from nanogpt.values import CHECKED, FilePath, Flag, Share, Text

SUFFIXES = (*TEXTS, *RECORDS)
MAX_NAMED = 5  # of each kind of what is left out


@dataclass(frozen=True, config=CHECKED)
class TextFiles(Source):
    """A file, every file below a folder, or those of a pattern, in the order of their names.

    A plain text file is one document and is held in memory whole, or several with `separator`
    between them; JSON Lines and parquet have one per record, under `text_column`. Hidden files and
    folders are left out; .json, which need not be records, is read where a file or a pattern names
    it. Links to folders are followed in patterns only. A file of several names is read once. What
    is left out is logged. With `skip_bad`, records that cannot be read are None instead of an
    error.
    """

    path: FilePath | None = None
    text_column: Text = "text"
    val_fraction: Share = 0.1
    skip_bad: Flag = False
    separator: Text | None = None
    name: Text = "text"
    suffixes: tuple[str, ...] = SUFFIXES

    def documents(self, skip: int = 0) -> Iterator[str | None]:
        """Yield the documents after the first `skip`, in the order of the files' names."""
        yield from self._reader().documents(self._names(), skip)

    def fingerprint(self) -> str:
        """Return a hash over the files' names and contents, the column and the separator."""
        root, paths = self._found()
        how = self.text_column if self.separator is None else f"{self.text_column}-{self.separator}"
        return f"{how}-{files_fingerprint(root, paths)}"

    def extent(self) -> Extent:
        return self._reader().extent(self._names())

    def description(self) -> dict[str, Any]:
        how = {"path": str(self.path), "text_column": self.text_column}
        return how if self.separator is None else {**how, "separator": self.separator}

    def _reader(self) -> Reader:
        return Reader(self.text_column, self.skip_bad, self.separator)

    def _names(self) -> list[str]:
        return [str(path) for path in self._found()[1]]

    def _found(self) -> tuple[Path, list[Path]]:
        """Return the folder that names begin at, and the files: at least one that is not empty."""
        path = local_path(self.path, self.name, f"a file, folder or pattern of {self._or()}")
        search = _Search.of(path)
        candidates = search.files()
        if not candidates and not search.root.is_dir():
            found = "is a pipe or a device" if path.exists() else "does not exist"
            raise FileNotFoundError(f"data.path={self.path} {found}; pass a file or folder")
        suffixes = self.suffixes if search.root == path else (*self.suffixes, *JSON)
        paths = [path for path in candidates if path.name.lower().endswith(suffixes)]
        for other in sorted(set(candidates).difference(paths)):
            search.leave_out("files of other kinds", other)
        left_out = search.left_out()
        if not paths:
            more = f" (left out: {left_out})" if left_out else ""
            raise ValueError(f"data.path={self.path} holds no file that ends in {self._or()}{more}")
        if not any(path.stat().st_size for path in paths):
            what = "is empty" if len(candidates) == 1 else "holds only empty files"
            raise ValueError(f"data.path={self.path} {what}; pass text to train on")
        if left_out:
            log_once(f"data.path={self.path}: left out {left_out}")
        return search.root, paths

    def _or(self) -> str:
        return ", ".join(self.suffixes[:-1]) + " or " + self.suffixes[-1]


class _Search:
    """The visible files that a pattern below a folder matches, and what is left out on the way."""

    def __init__(self, root: Path, pattern: Sequence[str], *, follow: bool) -> None:
        self.root = root
        self._pattern = pattern
        self._follow = follow  # links to folders, under `**`
        self._left_out: dict[str, dict[Path, None]] = {}
        self._real_folders: dict[str, str] = {}

    @classmethod
    def of(cls, path: Path) -> "_Search":
        """Return the search for a file, for all files below a folder, or for a pattern."""
        if path.is_file():
            return cls(path.parent, [path.name], follow=False)
        if path.exists() or not has_magic(str(path)):
            return cls(path, ["**"], follow=False)
        root = next(folder for folder in path.parents if not has_magic(str(folder)))
        return cls(root, path.relative_to(root).parts, follow=True)

    def files(self) -> list[Path]:
        """Return the files by name, each once."""
        above = frozenset([os.path.realpath(self.root)])
        names: dict[object, list[Path]] = {}
        for path in sorted(set(self._matches(self.root, self._pattern, above))):
            names.setdefault(self._identity(path), []).append(path)
        for same in names.values():
            if len(same) > 1:
                same.sort(key=lambda path: (self._is_linked(path), path))
            for path in same[1:]:
                self.leave_out("further names of the same files", path)
        return sorted(same[0] for same in names.values())

    def leave_out(self, kind: str, path: Path) -> None:
        self._left_out.setdefault(kind, {})[path.relative_to(self.root)] = None

    def left_out(self) -> str:
        """Return what was left out, such as `dangling links: 2 (a.txt, b.txt)`."""
        parts = []
        for kind, paths in self._left_out.items():
            names = ", ".join(map(str, sorted(paths)[:MAX_NAMED]))
            more = ", ..." if len(paths) > MAX_NAMED else ""
            parts.append(f"{kind}: {len(paths):,} ({names}{more})")
        return "; ".join(parts)

    def _matches(
        self, folder: Path, pattern: Sequence[str], above: frozenset[str]
    ) -> Iterator[Path]:
        first, *rest = pattern
        if first == "**":
            yield from self._matches(folder, rest or ["*"], above)
            for below, real in self._folders(folder, above):
                yield from self._matches(below, pattern, above | {real})
            return
        for entry in self._entries(folder):
            if fnmatch(entry.name, first) or entry.name == first:
                path = folder / entry.name
                if rest and _is_folder(entry):
                    yield from self._matches(path, rest, frozenset([os.path.realpath(path)]))
                elif not rest and os.path.isfile(path):
                    yield path
                elif not rest and not _is_folder(entry):
                    kind = "dangling links" if entry.is_symlink() else "pipes or devices"
                    self.leave_out(kind, path)

    def _folders(self, folder: Path, above: frozenset[str]) -> Iterator[tuple[Path, str]]:
        """Yield the folders to descend into with their real paths; `above` are those of parents."""
        for entry in self._entries(folder):
            if not _is_folder(entry):
                continue
            path = folder / entry.name
            if entry.is_symlink() and not self._follow:
                self.leave_out("linked folders, which a pattern such as DIR/**/* reads", path)
            elif (real := os.path.realpath(path)) in above:
                self.leave_out("loops of links", path)
            else:
                yield path, real

    def _entries(self, folder: Path) -> "list[os.DirEntry[str]]":
        try:
            with os.scandir(folder) as entries:
                return [entry for entry in entries if not entry.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except PermissionError:
            self.leave_out("folders that may not be read", folder)
            return []

    def _identity(self, path: Path) -> object:
        """Return what the names of one file have in common: links of both kinds."""
        status = os.stat(path)
        return (status.st_dev, status.st_ino) if status.st_nlink > 1 else self._real(path)

    def _is_linked(self, path: Path) -> bool:
        """Return whether a link leads from the root to the file."""
        return self._real(path) != os.path.join(self._real(self.root), path.relative_to(self.root))

    def _real(self, path: Path) -> str:
        if os.path.islink(path):
            return os.path.realpath(path)
        folder, name = os.path.split(path)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        return os.path.join(self._real_folders[folder], name)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()
