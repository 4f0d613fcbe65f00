"""Shards that grow document by document, and a journal of what of them is safe on the disk.

A process may be killed at any moment: the next one reads the journal, cuts the files back to what
it records, and continues with the record after the last one counted there.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydantic import TypeAdapter

from nanogpt.data.shards import HEADER_BYTES, HEADER_INTS, MAGIC_AND_VERSION, REMEDY, Shard
from nanogpt.data.source import file_sha256
from nanogpt.disk import replacing

JOURNAL = "journal.json"
SPLITS = ("train", "val")


@dataclass
class SplitProgress:
    """The written part of one split."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    shards: list[Shard] = field(default_factory=list)

    @property
    def open_tokens(self) -> int:
        """The tokens of the unfinished shard."""
        return self.tokens - sum(shard.n_tokens for shard in self.shards)


@dataclass
class Progress:
    """The written part of a corpus, and the records of the source that it comes from."""

    records: int = 0
    bad_records: int = 0
    splits: dict[str, SplitProgress] = field(
        default_factory=lambda: {split: SplitProgress() for split in SPLITS}
    )

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.splits.values())

    @property
    def bytes(self) -> int:
        return sum(split.bytes for split in self.splits.values())


def read_journal(directory: Path) -> tuple[dict[str, Any], Progress] | None:
    """Return the settings recorded when the writing began, and its progress; None if it never did.

    Raises ValueError where the file is not such a journal.
    """
    path = directory / JOURNAL
    if not path.exists():
        return None
    try:
        journal = json.loads(path.read_bytes())
        return journal, TypeAdapter(Progress).validate_python(journal.pop("progress"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the journal of a preparation; pass another folder, or remove this one"
        ) from error


class CorpusWriter:
    """Writes both splits as `train_000000.bin`, `val_000000.bin` and so on.

    A validation shard ends where its training shard does, so that the first N of both are a corpus
    of their own. `settled` are plain values for the journal. A shard has its name only once it is
    whole; until then it ends in `.partial`. As a context it closes unfinished shards.
    """

    def __init__(
        self,
        directory: Path,
        dtype: np.dtype,
        shard_tokens: int,
        settled: Mapping[str, Any],
        progress: Progress | None = None,
    ) -> None:
        self.progress = progress if progress is not None else Progress()
        self._directory = directory
        self._shard_tokens = shard_tokens
        self._settled = settled
        self._files = {
            split: _ShardFile(directory, split, dtype, self.progress.splits[split])
            for split in SPLITS
        }

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()

    def append(self, parts: Mapping[str, np.ndarray]) -> bool:
        """Append a batch's tokens (N,) of each split; return whether a shard was finished."""
        self._files["val"].write(parts["val"])
        tokens, rolled = parts["train"], False
        train = self.progress.splits["train"]
        while len(tokens):
            taken = tokens[: self._shard_tokens - train.open_tokens]
            self._files["train"].write(taken)
            tokens = tokens[len(taken) :]
            if train.open_tokens == self._shard_tokens:
                for file in self._files.values():
                    file.finish()
                rolled = True
        return rolled

    def commit(self) -> None:
        """Synchronise everything written so far to the disk, then record it in the journal."""
        for file in self._files.values():
            file.synchronise()
        write_json(self._directory / JOURNAL, {**self._settled, "progress": asdict(self.progress)})

    def finish(self) -> None:
        """Finish the last shards; a split without tokens is one empty shard."""
        for name, split in self.progress.splits.items():
            if split.open_tokens or not split.shards:
                self._files[name].finish()


class _ShardFile:
    """The unfinished shard of one split."""

    def __init__(
        self, directory: Path, split: str, dtype: np.dtype, progress: SplitProgress
    ) -> None:
        self._directory = directory
        self._split = split
        self._dtype = dtype
        self._progress = progress
        self._file: IO[bytes] | None = None
        if progress.open_tokens:
            self._reopen()

    def write(self, tokens: np.ndarray) -> None:
        if len(tokens):
            self._open().write(tokens.astype(self._dtype, copy=False).tobytes())
            self._progress.tokens += len(tokens)

    def synchronise(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a full disk, which was raised before
                self._file.close()

    def finish(self) -> None:
        """Write the header and give the shard its name."""
        n_tokens = self._progress.open_tokens
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = (*MAGIC_AND_VERSION[self._dtype], n_tokens)
        with self._open() as file:
            file.seek(0)
            file.write(header.tobytes())
            self.synchronise()
        path, partial = self._paths()
        os.replace(partial, path)
        self._progress.shards.append(Shard(path.name, n_tokens, file_sha256(path)))
        self._file = None

    def _paths(self) -> tuple[Path, Path]:
        """Return the paths of the shard when it is finished, and until then."""
        name = f"{self._split}_{len(self._progress.shards):06d}.bin"
        return self._directory / name, self._directory / f"{name}.partial"

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._file = self._paths()[1].open("wb")
            self._file.write(bytes(HEADER_BYTES))
        return self._file

    def _reopen(self) -> None:
        """Cut the shard back to its size in the journal; it may have been finished since."""
        path, partial = self._paths()
        if path.exists():
            os.replace(path, partial)
        n_bytes = HEADER_BYTES + self._progress.open_tokens * self._dtype.itemsize
        if not partial.exists() or partial.stat().st_size < n_bytes:
            raise ValueError(
                f"{partial} is missing or shorter than {JOURNAL} in its folder records; {REMEDY}"
            )
        self._file = partial.open("r+b")
        self._file.truncate(n_bytes)
        self._file.seek(n_bytes)


def write_json(path: Path, value: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write a JSON file that is whole at every moment."""
    with replacing(path, "w") as file:
        json.dump(value, file, indent=indent)
        file.write("\n")
