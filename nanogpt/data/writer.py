"""Shards that grow document by document, and a journal of what of them is safe on the disk.

A process may be killed at any moment: the next one reads the journal, cuts the files back to what
it records, and continues with the record after the last one counted there.
"""

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
from nanogpt.disk import write_json

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


def read_journal(directory: Path) -> tuple[dict[str, Any], Progress] | None:
    """Return the settings recorded when the writing began, and its progress; None if it never did.

    Raises ValueError where the file is not such a journal.
    """
    path = directory / JOURNAL
    try:
        journal = json.loads(path.read_bytes())
        return journal, TypeAdapter(Progress).validate_python(journal.pop("progress"))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the journal of a preparation; pass another folder, or remove this one"
        ) from error


def write_journal(directory: Path, settled: Mapping[str, Any], progress: Progress) -> None:
    """Record the settings, plain values, and the progress."""
    write_json(directory / JOURNAL, {**settled, "progress": asdict(progress)})


@dataclass
class CorpusWriter:
    """Writes both splits as `train_000000.bin`, `val_000000.bin` and so on.

    A validation shard ends where its training shard does, so that the first N of both are a corpus
    of their own. `settled` are plain values for the journal. A shard has its name only once it is
    whole; until then it ends in `.partial`.
    """

    directory: Path
    dtype: np.dtype
    shard_tokens: int
    settled: Mapping[str, Any]
    progress: Progress = field(default_factory=Progress)

    def append(self, parts: Mapping[str, np.ndarray]) -> bool:
        """Append a batch's tokens (N,) of each split; return whether a shard was finished."""
        self._write("val", parts["val"])
        tokens, rolled = parts["train"], False
        train = self.progress.splits["train"]
        while len(tokens):
            taken = tokens[: self.shard_tokens - train.open_tokens]
            self._write("train", taken)
            tokens = tokens[len(taken) :]
            if train.open_tokens == self.shard_tokens:
                for split in SPLITS:
                    self._finish(split)
                rolled = True
        return rolled

    def commit(self) -> None:
        """Synchronise everything written so far to the disk, then record it in the journal."""
        for name, split in self.progress.splits.items():
            if split.open_tokens:
                with self._open(name) as file:
                    os.fsync(file.fileno())
        write_journal(self.directory, self.settled, self.progress)

    def finish(self) -> None:
        """Finish the last shards; a split without tokens is one empty shard."""
        for name, split in self.progress.splits.items():
            if split.open_tokens or not split.shards:
                self._finish(name)

    def _write(self, split: str, tokens: np.ndarray) -> None:
        if len(tokens):
            with self._open(split) as file:
                file.write(tokens.astype(self.dtype, copy=False).tobytes())
            self.progress.splits[split].tokens += len(tokens)

    def _open(self, split: str) -> IO[bytes]:
        """Open the unfinished shard at the end of its tokens; bytes after it are cut."""
        path, partial = self._paths(split)
        if path.exists():  # it was finished after the last commit
            os.replace(path, partial)
        partial.touch()
        n_tokens = self.progress.splits[split].open_tokens
        n_bytes = HEADER_BYTES + n_tokens * self.dtype.itemsize
        if n_tokens and partial.stat().st_size < n_bytes:
            raise ValueError(
                f"{partial} is missing or shorter than {JOURNAL} in its folder records; {REMEDY}"
            )
        file = partial.open("r+b")
        file.truncate(n_bytes)
        file.seek(n_bytes)
        return file

    def _finish(self, split: str) -> None:
        """Write the header of a shard and give it its name."""
        progress = self.progress.splits[split]
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = (*MAGIC_AND_VERSION[self.dtype], progress.open_tokens)
        with self._open(split) as file:
            file.seek(0)
            file.write(header.tobytes())
            file.flush()
            os.fsync(file.fileno())
        path, partial = self._paths(split)
        os.replace(partial, path)
        progress.shards.append(Shard(path.name, progress.open_tokens, file_sha256(path)))

    def _paths(self, split: str) -> tuple[Path, Path]:
        """Return the paths of a shard when it is finished, and until then."""
        name = f"{split}_{len(self.progress.splits[split].shards):06d}.bin"
        return self.directory / name, self.directory / f"{name}.partial"
