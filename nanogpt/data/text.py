"""Local text: files of plain text, JSON Lines or parquet, in a folder or by a pattern."""

import os
from collections.abc import Iterable, Iterator, Sequence
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from nanogpt.data.files import JSON, RECORDS, TEXTS, Reader
from nanogpt.data.records import log_once
from nanogpt.data.source import Source, files_fingerprint, local_path
from nanogpt.text import format_list
from nanogpt.values import CHECKED, FilePath, Share, Text

SUFFIXES = (*TEXTS, *RECORDS)


@dataclass(frozen=True, config=CHECKED)
class TextFiles(Reader, Source):
    """A file, every file below a folder, or those of a pattern, in the order of their names.

    Hidden files and folders are left out; .json, which need not be records, is read where a file or
    a pattern names it. Links to folders are followed in patterns only. A file of several names is
    read once. Names that are left out are logged.
    """

    path: FilePath | None = None
    val_fraction: Share = 0.1
    name: Text = "text"
    suffixes: tuple[str, ...] = SUFFIXES

    def documents(self, skip: int = 0) -> Iterator[str | None]:
        """Yield the documents after the first `skip`, in the order of the files' names."""
        yield from self.read([str(path) for path in self._found()[1]], skip)

    def fingerprint(self) -> str:
        """Return a hash over the files' names and contents, the column and the separator."""
        root, paths = self._found()
        how = self.text_column if self.separator is None else f"{self.text_column}-{self.separator}"
        return f"{how}-{files_fingerprint(root, paths)}"

    def description(self) -> dict[str, Any]:
        """Return the path, and how its files are read."""
        how = {"path": str(self.path), "text_column": self.text_column}
        return how if self.separator is None else {**how, "separator": self.separator}

    def _found(self) -> tuple[Path, list[Path]]:
        """Return the folder that names begin at, and the files: at least one that is not empty."""
        kinds = ", ".join(self.suffixes[:-1]) + " or " + self.suffixes[-1]
        path = local_path(self.path, self.name, f"a file, folder or pattern of {kinds}")
        root, suffixes = path, (*self.suffixes, *JSON)
        names: Iterable[str] = [str(path)]
        if path.is_dir():
            names, suffixes = _matches(path, ["**"], follow_links=False), self.suffixes
        elif path.is_file():
            root = path.parent
        elif has_magic(str(path)):
            root = next(folder for folder in path.parents if not has_magic(str(folder)))
            names = _matches(root, path.relative_to(root).parts, follow_links=True)
        else:
            raise FileNotFoundError(
                f"data.path={self.path} does not exist or is no file; pass a file or folder"
            )
        found = {Path(name) for name in names}
        files = _each_once(path for path in found if path.is_file())
        paths = [path for path in files if path.name.lower().endswith(suffixes)]
        others = sorted(p for p in found.difference(paths) if p.is_symlink() or not p.is_dir())
        named = format_list([str(path.relative_to(root)) for path in others])
        left_out = f"left out {len(others):,} names ({named})"
        if not paths:
            more = f" ({left_out})" if others else ""
            raise ValueError(f"data.path={self.path} holds no file that ends in {kinds}{more}")
        if not any(path.stat().st_size for path in paths):
            raise ValueError(f"data.path={self.path} holds only empty files; pass text to train on")
        if others:
            log_once(
                f"data.path={self.path}: {left_out}: files of other kinds, further names of a "
                "file, links to folders, which a pattern such as DIR/**/* follows, or to nothing"
            )
        return root, paths


def _matches(folder: str | Path, parts: Sequence[str], follow_links: bool) -> Iterator[str]:
    """Yield the visible names below a folder that match the parts of a pattern."""
    if "**" not in parts:
        yield from glob(os.path.join(escape(str(folder)), *parts))
        return
    first = parts.index("**")
    for top in glob(os.path.join(escape(str(folder)), *parts[:first])):
        for below in _folders(top, follow_links):
            yield from _matches(below, parts[first + 1 :] or ["*"], follow_links)


def _folders(top: str, follow_links: bool) -> Iterator[str]:
    """Yield a folder and the visible ones below it; links that lead back to one are left out."""

    def log_denied(error: OSError) -> None:
        log_once(f"{error.filename} is left out ({error.strerror})")

    for folder, below, _ in os.walk(top, onerror=log_denied, followlinks=follow_links):
        above = (Path(top, parent) for parent in Path(folder).relative_to(top).parents)
        if os.path.islink(folder) and any(os.path.samefile(folder, parent) for parent in above):
            below.clear()
        else:
            below[:] = [name for name in below if not name.startswith(".")]
            yield folder


def _each_once(paths: Iterable[Path]) -> list[Path]:
    """Return the files in the order of their names, each under the first of its names."""
    files: dict[tuple[int, int], Path] = {}
    for path in sorted(paths):
        status = path.stat()
        files.setdefault((status.st_dev, status.st_ino), path)
    return list(files.values())
