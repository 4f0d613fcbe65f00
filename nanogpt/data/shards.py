"""Token shards: a header of 256 int32 and then the tokens, as llm.c and modded-nanogpt write them.

The header begins with a magic number, a version and the number of tokens; the rest is zero. llm.c
has two kinds, told apart by the magic number: 20240520, version 1, holds uint16 (GPT-2); 20240801,
version 7, holds uint32 (Llama 3). Its readers and modded-nanogpt's take what is written here
(llm.c, dev/data/data_common.py; modded-nanogpt, train_gpt.py). Only shards end in `.bin`.
"""

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np

from nanogpt.data.source import file_sha256

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
UINT16: np.dtype = np.dtype("<u2")
UINT32: np.dtype = np.dtype("<u4")
MAGIC_AND_VERSION = {UINT16: (20240520, 1), UINT32: (20240801, 7)}
REMEDY = "remove its folder and run the command again to prepare the data anew"
SHARD_TOKENS = 100_000_000  # as the field cuts FineWeb-Edu; the header could count to 2**31 - 1


@dataclass(frozen=True)
class Shard:
    """One shard as a manifest records it."""

    file: str
    n_tokens: int
    sha256: str


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smaller of the two token types that holds every id."""
    return UINT16 if vocab_size <= 2**16 else UINT32


class ShardWriter:
    """Writes a growing stream of tokens as `<split>_000000.bin` and so on.

    A shard has its name only once it is whole and on the disk; until then it ends in `.partial`.
    """

    def __init__(
        self, directory: Path, split: str, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self._directory = directory
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._shards: list[Shard] = []
        self._file: IO[bytes] | None = None
        self._n_tokens = 0

    @property
    def n_tokens(self) -> int:
        """The tokens taken so far."""
        return self._n_tokens + sum(shard.n_tokens for shard in self._shards)

    def append(self, tokens: np.ndarray) -> None:
        """Add (N,) tokens to the stream."""
        while len(tokens):
            if self._file is None:
                self._start()
            assert self._file is not None
            taken = tokens[: self._shard_tokens - self._n_tokens]
            self._file.write(taken.astype(self._dtype, copy=False).tobytes())
            self._n_tokens += len(taken)
            tokens = tokens[len(taken) :]
            if self._n_tokens == self._shard_tokens:
                self._finish()

    def close(self) -> list[Shard]:
        """Finish the last shard and return them all; a stream without tokens is one empty shard."""
        if self._file is None and not self._shards:
            self._start()
        if self._file is not None:
            self._finish()
        return self._shards

    def _path(self) -> Path:
        return self._directory / f"{self._split}_{len(self._shards):06d}.bin"

    def _start(self) -> None:
        self._file = _partial(self._path()).open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def _finish(self) -> None:
        assert self._file is not None
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = (*MAGIC_AND_VERSION[self._dtype], self._n_tokens)
        with self._file as file:
            file.seek(0)
            file.write(header.tobytes())
            file.flush()
            os.fsync(file.fileno())
        path = self._path()
        os.replace(_partial(path), path)
        self._shards.append(Shard(path.name, self._n_tokens, file_sha256(path)))
        self._file, self._n_tokens = None, 0


def read_header(path: Path) -> tuple[np.dtype, int]:
    """Return the type and the number of a shard's tokens.

    Raises FileNotFoundError or ValueError, naming the file, where it is not a whole shard.
    """
    try:
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
            n_bytes = os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the token shard {path} is missing; {REMEDY}") from error
    if len(header) < HEADER_BYTES:
        raise ValueError(
            f"{path} is not a token shard: it has {n_bytes} bytes and the header alone has "
            f"{HEADER_BYTES}; {REMEDY}"
        )
    magic, version, n_tokens = (int(value) for value in header.view("<i4")[:3])
    dtypes = {known: dtype for dtype, (known, _) in MAGIC_AND_VERSION.items()}
    if magic not in dtypes:
        raise ValueError(
            f"{path} is not a token shard: it begins with {magic} and not with "
            f"{' or '.join(str(known) for known in dtypes)}; {REMEDY}"
        )
    dtype = dtypes[magic]
    if version != MAGIC_AND_VERSION[dtype][1]:
        raise ValueError(
            f"{path} is a token shard of version {version} and only version "
            f"{MAGIC_AND_VERSION[dtype][1]} of its kind ({magic}) is known; {REMEDY}"
        )
    promised = HEADER_BYTES + n_tokens * dtype.itemsize
    if n_tokens < 0 or n_bytes != promised:
        raise ValueError(
            f"{path} is {'cut short' if n_bytes < promised else 'longer than it says'}: its "
            f"header promises {n_tokens} tokens, which is {promised} bytes, and it has {n_bytes}; "
            f"{REMEDY}"
        )
    return dtype, n_tokens


class TokenStream:
    """The tokens of several shards end to end, read in place; cheap to send to another process."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(Path(path) for path in paths)
        self._headers = [read_header(path) for path in self._paths]
        n_tokens = [n for _, n in self._headers]
        self._starts = [0, *accumulate(n_tokens)]  # where each shard begins, then the end

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens from `start` up to `stop`, (stop - start,) int64."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        tokens = np.empty(stop - start, dtype=np.int64)
        shard = bisect_right(self._starts, start) - 1
        filled = 0
        while filled < len(tokens):
            offset = start + filled - self._starts[shard]
            piece = self._maps[shard][offset : offset + len(tokens) - filled]
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1
        return tokens

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        return [
            _map(path, *header) for path, header in zip(self._paths, self._headers, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_maps"}


def _map(path: Path, dtype: np.dtype, n_tokens: int) -> np.ndarray:
    if n_tokens == 0:  # there is nothing to map
        return np.empty(0, dtype)
    mapped = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(n_tokens,))
    return mapped.view(np.ndarray)  # slices of the plain class cost a fifth


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
