"""Local text: files of plain text, JSON Lines or parquet, in a folder or by a pattern."""

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
    it. Links to folders are followed in patterns only. A file of several names is read once. Names
    that are left out are logged. With `skip_bad`, records that cannot be read are None instead of
    an error.
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
        yield from self._reader().documents([str(path) for path in self._found()[1]], skip)

    def fingerprint(self) -> str:
        """Return a hash over the files' names and contents, the column and the separator."""
        root, paths = self._found()
        how = self.text_column if self.separator is None else f"{self.text_column}-{self.separator}"
        return f"{how}-{files_fingerprint(root, paths)}"

    def extent(self) -> Extent | None:
        """Return an estimate of the text, from parts of some files."""
        return self._reader().extent([str(path) for path in self._found()[1]])

    def description(self) -> dict[str, Any]:
        """Return the path, and how its files are read."""
        how = {"path": str(self.path), "text_column": self.text_column}
        return how if self.separator is None else {**how, "separator": self.separator}

    def _reader(self) -> Reader:
        return Reader(self.text_column, self.skip_bad, self.separator)

    def _found(self) -> tuple[Path, list[Path]]:
        """Return the folder that names begin at, and the files: at least one that is not empty."""
        kinds = ", ".join(self.suffixes[:-1]) + " or " + self.suffixes[-1]
        path = local_path(self.path, self.name, f"a file, folder or pattern of {kinds}")
        search = _Search(path)
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
            raise ValueError(f"data.path={self.path} holds no file that ends in {kinds}{more}")
        if not any(path.stat().st_size for path in paths):
            what = "is empty" if len(candidates) == 1 else "holds only empty files"
            raise ValueError(f"data.path={self.path} {what}; pass text to train on")
        if left_out:
            log_once(f"data.path={self.path}: left out {left_out}")
        return search.root, paths


class _Search:
    """The visible files of a path: one file, all below a folder, or those of a pattern."""

    def __init__(self, path: Path) -> None:
        self.root, self._pattern, self._follows_links = path, ["**"], False
        self._left_out: dict[str, dict[Path, None]] = {}
        if path.is_file():
            self.root, self._pattern = path.parent, [path.name]
        elif not path.exists() and has_magic(str(path)):
            self.root = next(folder for folder in path.parents if not has_magic(str(folder)))
            self._pattern = list(path.relative_to(self.root).parts)
            self._follows_links = True  # under `**`

    def files(self) -> list[Path]:
        """Return the files by name, each once: under a name without links where it has one."""
        above = frozenset([os.path.realpath(self.root)])
        names: dict[tuple[int, int], list[Path]] = {}
        for path in set(self._matches(self.root, self._pattern, above)):
            status = os.stat(path)
            names.setdefault((status.st_dev, status.st_ino), []).append(path)
        for same in names.values():
            if len(same) > 1:
                same.sort(key=lambda path: (self._is_linked(path), path))
            for path in same[1:]:
                self.leave_out("further names of the same files", path)
        return sorted(same[0] for same in names.values())

    def leave_out(self, kind: str, path: Path) -> None:
        self._left_out.setdefault(kind, {})[path.relative_to(self.root)] = None

    def left_out(self) -> str:
        """Return the paths that were left out, such as `dangling links: 2 (a.txt, b.txt)`."""
        parts = []
        for kind, paths in self._left_out.items():
            names = ", ".join(map(str, sorted(paths)[:MAX_NAMED]))
            more = ", ..." if len(paths) > MAX_NAMED else ""
            parts.append(f"{kind}: {len(paths):,} ({names}{more})")
        return "; ".join(parts)

    def _matches(
        self, folder: Path, pattern: Sequence[str], above: frozenset[str]
    ) -> Iterator[Path]:
        """Yield the files that match; `above` are the real paths of the folders descended into."""
        first, *rest = pattern
        if first == "**":
            yield from self._matches(folder, rest or ["*"], above)
        for entry in self._entries(folder):
            path = folder / entry.name
            if first == "**":
                if os.path.isdir(path) and (real := self._descend(entry, path, above)):
                    yield from self._matches(path, pattern, above | {real})
            elif not fnmatch(entry.name, first) and entry.name != first:
                continue
            elif rest and os.path.isdir(path):
                yield from self._matches(path, rest, frozenset([os.path.realpath(path)]))
            elif not rest and os.path.isfile(path):
                yield path
            elif not rest and not os.path.isdir(path):
                kind = "dangling links" if entry.is_symlink() else "pipes or devices"
                self.leave_out(kind, path)

    def _descend(self, entry: "os.DirEntry[str]", path: Path, above: frozenset[str]) -> str | None:
        """Return the real path of a folder to descend into, None for one that is left out."""
        real = os.path.realpath(path)
        if entry.is_symlink() and not self._follows_links:
            self.leave_out("linked folders, which a pattern such as DIR/**/* reads", path)
        elif real in above:
            self.leave_out("loops of links", path)
        else:
            return real
        return None

    def _entries(self, folder: Path) -> "list[os.DirEntry[str]]":
        try:
            with os.scandir(folder) as entries:
                return [entry for entry in entries if not entry.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except PermissionError:
            self.leave_out("folders that may not be read", folder)
            return []

    def _is_linked(self, path: Path) -> bool:
        """Return whether a link leads from the root to the file."""
        below = os.path.join(os.path.realpath(self.root), path.relative_to(self.root))
        return os.path.realpath(path) != below
