"""What a data set is: an object that yields documents and says when they change."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol


class Source(Protocol):
    """A data set before tokenization; `corpus.prepare` takes any object like this."""

    @property
    def name(self) -> str:
        """A short word for directories and reports."""

    @property
    def val_fraction(self) -> float:
        """The share of documents, in (0, 1), that goes to validation."""

    def documents(self) -> Iterator[str]:
        """Yield the documents, the same ones in the same order every time.

        Raises ValueError or FileNotFoundError, in one sentence, for what a user can mend.
        """

    def fingerprint(self) -> str:
        """Return a word that changes when the documents do, without tokenizing; raises likewise."""


def files_fingerprint(root: Path, paths: Iterable[Path]) -> str:
    """Return 16 hexadecimal digits of a hash over the files' names below `root` and contents."""
    digest = hashlib.sha256()
    for path in paths:
        name = path.relative_to(root).as_posix()
        digest.update(f"{name}\0{file_sha256(path)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
