"""Text files of one's own: a file or a folder of .txt, .md, .py and .jsonl."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanogpt.data.source import files_fingerprint

SUFFIXES = (".txt", ".md", ".py", ".jsonl")


@dataclass(frozen=True)
class TextFiles:
    """A file, or every file below a folder: one document each, or one per line of JSONL.

    Hidden files and folders are left out. `field` names the text in a JSONL record.
    """

    path: str | Path | None = None
    field: str = "text"
    val_fraction: float = 0.1
    name: str = "text"

    def documents(self) -> Iterator[str]:
        """Yield the documents in the order of the files' names."""
        for path in self._paths():
            if path.suffix.lower() == ".jsonl":
                yield from _records(path, self.field)
            else:
                yield _decode(path, path.read_bytes(), offset=0)

    def fingerprint(self) -> str:
        """Return a hash over the files' names and contents, and the field."""
        paths = self._paths()
        folder = paths[0].parent if self._root().is_file() else self._root()
        return f"{self.field}-{files_fingerprint(folder, paths)}"

    def _root(self) -> Path:
        if self.path is None:
            raise ValueError(
                "data=text needs data.path=<a file or folder of .txt, .md, .py or .jsonl>"
            )
        root = Path(self.path).expanduser()
        if not root.exists():
            raise FileNotFoundError(f"data.path={self.path} does not exist; pass a file or folder")
        return root

    def _paths(self) -> list[Path]:
        """Return the files to read, sorted; at least one, and at least one not empty."""
        root = self._root()
        if root.is_file():
            paths = [root] if root.suffix.lower() in SUFFIXES else []
        else:
            paths = [path for path in sorted(root.rglob("*")) if _is_text(path, root)]
        if not paths:
            raise ValueError(f"data.path={self.path} holds no file that ends in {_or(SUFFIXES)}")
        if not any(path.stat().st_size for path in paths):
            what = "is empty" if root.is_file() else "holds only empty files"
            raise ValueError(f"data.path={self.path} {what}; pass text to train on")
        return paths


def _is_text(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()


def _records(path: Path, field: str) -> Iterator[str]:
    """Yield the field of each line; blank lines are passed over."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(path, line, offset)
            offset += len(line)
            if text.strip():
                yield _field(text, field, where=f"{path}, line {number}")


def _field(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); mend or remove the line") from error
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        names = _or(sorted(record)) if isinstance(record, dict) and record else "no names"
        raise ValueError(
            f"{where} has no text under {field!r} (it has {names}); pass data.field=<name>"
        )
    return record[field]


def _decode(path: Path, data: bytes, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}); "
            f"convert it, or leave it out of data.path"
        ) from error


def _or(words: tuple[str, ...] | list[str]) -> str:
    return ", ".join(words[:-1]) + " or " + words[-1] if len(words) > 1 else words[0]
