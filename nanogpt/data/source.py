"""The interface of a data set: its documents, and a fingerprint that changes with them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Any

from nanogpt.hub import hub_errors

HASHED_WHOLE_BYTES = 2**30  # of files above this size in all, samples are hashed
SAMPLES = 64  # of each such file
SAMPLE_BYTES = 64 * 2**10


class Source(ABC):
    """A data set before tokenization: its documents, in an order of its own.

    Subclasses are frozen dataclasses of plain values, so that they can be sent to other processes.
    """

    name: str  # a short word for directories and reports
    val_fraction: float  # the share of documents, in (0, 1), that goes to validation

    @abstractmethod
    def documents(self, skip: int = 0) -> Iterator[str | None]:
        """Yield the documents after the first `skip`, the same ones in the same order every time.

        None stands for a record that cannot be read, where the source is to leave those out. `skip`
        counts every item, empty documents and None too, and costs little. Raises ValueError,
        FileNotFoundError or ConnectionError, in one sentence, for what a user can correct.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a text that changes when the documents do, quickly and without a network."""

    def pinned(self, revision: str | None = None) -> "Source":
        """Return this source at a fixed revision: the one given, or the one it stands for now."""
        return self

    def description(self) -> dict[str, Any]:
        """Return plain values that describe the origin of the documents."""
        return {}


def local_path(path: str | Path | None, name: str, what: str) -> Path:
    """Return `data.path`, `~` expanded; raises ValueError where none is given."""
    if path is None:
        raise ValueError(f"data={name} needs data.path=<{what}>")
    return Path(expanduser(path))


def files_fingerprint(root: Path, paths: Sequence[Path]) -> str:
    """Return 16 hexadecimal digits of a hash over the files' names below `root` and contents.

    Of more than 1 GiB in all, the size and 64 evenly spaced blocks of each file stand for the rest.
    """
    whole = sum(path.stat().st_size for path in paths) <= HASHED_WHOLE_BYTES
    digest = hashlib.sha256()
    for path in paths:
        name = path.relative_to(root).as_posix()
        content = file_sha256(path) if whole else _sampled_sha256(path)
        digest.update(f"{name}\0{content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def fetch_file(repository: str, name: str, revision: str, instead: str) -> Path:
    """Return a file of a data set repository in the hub's cache, downloaded unless it is there.

    Raises as `hub_errors` does.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    fetch = partial(hf_hub_download, repository, name, repo_type="dataset", revision=revision)
    with suppress(LocalEntryNotFoundError):
        return Path(fetch(local_files_only=True))
    with hub_errors(f"{name} of the data set {repository} at {revision}", instead):
        return Path(fetch())


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _sampled_sha256(path: Path) -> str:
    """Return a hash of a file's size and of blocks spread over it, the first and last included."""
    n_bytes = path.stat().st_size
    last_start = max(n_bytes - SAMPLE_BYTES, 0)
    digest = hashlib.sha256(f"{n_bytes}\n".encode())
    with path.open("rb") as file:
        for start in sorted({last_start * i // (SAMPLES - 1) for i in range(SAMPLES)}):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
