"""Text of one's own: files of plain text, JSON Lines or parquet, in a folder or by a pattern."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from nanogpt.data.files import JSON, RECORDS, TEXTS, Reader
from nanogpt.data.source import Extent, Source, files_fingerprint

SUFFIXES = (*TEXTS, *RECORDS)


@dataclass(frozen=True)
class TextFiles(Source):
    """A file, every file below a folder, or those of a pattern, in the order of their names.

    A plain text file is one document and is held in memory whole; JSON Lines and parquet have one
    per record, under `text_column`. Hidden files and folders are left out; .json, which need not be
    records, is read where a file or a pattern names it. With `skip_bad`, records that cannot be
    read are None instead of an error.
    """

    path: str | Path | None = None
    text_column: str = "text"
    val_fraction: float = 0.1
    skip_bad: bool = False
    name: str = "text"
    suffixes: tuple[str, ...] = SUFFIXES

    def documents(self, skip: int = 0) -> Iterator[str | None]:
        """Yield the documents after the first `skip`, in the order of the files' names."""
        yield from self._reader().documents(self._names(), skip)

    def fingerprint(self) -> str:
        """Return a hash over the files' names and contents, and the column."""
        root, paths = self._found()
        return f"{self.text_column}-{files_fingerprint(root, paths)}"

    def extent(self) -> Extent:
        return self._reader().extent(self._names())

    def description(self) -> dict[str, Any]:
        return {"path": str(self.path), "text_column": self.text_column}

    def _reader(self) -> Reader:
        return Reader(self.text_column, self.skip_bad)

    def _names(self) -> list[str]:
        return [str(path) for path in self._found()[1]]

    def _found(self) -> tuple[Path, list[Path]]:
        """Return the folder that names begin at, and the files: at least one that is not empty."""
        if self.path is None:
            raise ValueError(
                f"data={self.name} needs data.path=<a file, folder or pattern of {self._or()}>"
            )
        root, candidates = _candidates(Path(self.path).expanduser())
        if not candidates and not root.is_dir():
            raise FileNotFoundError(f"data.path={self.path} does not exist; pass a file or folder")
        suffixes = (
            self.suffixes if root == Path(self.path).expanduser() else (*self.suffixes, *JSON)
        )
        paths = [path for path in candidates if path.name.lower().endswith(suffixes)]
        if not paths:
            raise ValueError(f"data.path={self.path} holds no file that ends in {self._or()}")
        if not any(path.stat().st_size for path in paths):
            what = "is empty" if len(candidates) == 1 else "holds only empty files"
            raise ValueError(f"data.path={self.path} {what}; pass text to train on")
        return root, paths

    def _or(self) -> str:
        return ", ".join(self.suffixes[:-1]) + " or " + self.suffixes[-1]


def _candidates(path: Path) -> tuple[Path, Sequence[Path]]:
    """Return the folder that names begin at, and every visible file that a path stands for."""
    if path.is_file():
        return path.parent, [path]
    if path.exists() or not has_magic(str(path)):
        root, found = path, list(path.rglob("*"))
    else:
        root = next(folder for folder in path.parents if not has_magic(str(folder)))
        found = [Path(name) for name in glob(str(path), recursive=True)]
    return root, [file for file in sorted(found) if file.is_file() and not _is_hidden(file, root)]


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
