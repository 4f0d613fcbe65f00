"""Token shards: a header of 256 int32 and then the tokens, as llm.c and modded-nanogpt write them.

The header begins with a magic number, a version and the number of tokens; the rest is zero. llm.c
has two kinds: magic number 20240520 with version 1 holds uint16 (GPT-2), 20240801 with version 7
holds uint32 (Llama 3). Its readers and modded-nanogpt's read these shards (llm.c,
dev/data/data_common.py; modded-nanogpt, train_gpt.py). Only shards end in `.bin`.
"""

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
UINT16: np.dtype = np.dtype("<u2")
UINT32: np.dtype = np.dtype("<u4")
MAGIC_AND_VERSION = {UINT16: (20240520, 1), UINT32: (20240801, 7)}
MAGIC_NUMBERS = {magic for magic, _ in MAGIC_AND_VERSION.values()}
REMEDY = "remove its folder and run the command again to prepare the data anew"
MAPPED_BYTES = 64 * 2**20  # of a stream's files, at most about, are in a process's memory at a time
FAULT_BYTES = 64 * 2**10  # what Linux maps around one touch (fault_around_bytes)
SHARD_TOKENS = 100_000_000  # as the field cuts FineWeb-Edu
MAX_SHARD_TOKENS = 2**31 - 1  # that the header can count


@dataclass(frozen=True)
class Shard:
    """One shard as a manifest records it."""

    file: str
    n_tokens: int
    sha256: str


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smaller of the two token types that holds every id."""
    return UINT16 if vocab_size <= 2**16 else UINT32


def read_header(path: Path, remedy: str = REMEDY) -> tuple[np.dtype, int]:
    """Return the type and the number of a shard's tokens.

    Raises FileNotFoundError or ValueError, naming the file and the remedy, where it is not a whole
    shard.
    """
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
            n_bytes = os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the token shard {path} is missing; {remedy}") from error
    magic, version, n_tokens = np.frombuffer(header.ljust(12, b"\0"), "<i4")[:3].tolist()
    dtypes = {made: dtype for dtype, made in MAGIC_AND_VERSION.items()}
    dtype = dtypes.get((magic, version))
    if dtype is None or n_bytes < HEADER_BYTES:
        known = " or ".join(f"{number} and version {v}" for number, v in dtypes)
        raise ValueError(
            f"{path} is not a token shard: its {n_bytes} bytes begin with {magic} and version "
            f"{version}, and not with {known} in a header of {HEADER_BYTES} bytes; {remedy}"
        )
    promised = HEADER_BYTES + n_tokens * dtype.itemsize
    if n_tokens < 0 or n_bytes != promised:
        raise ValueError(
            f"{path} is {'cut short' if n_bytes < promised else 'longer than its header'}, which "
            f"promises {n_tokens} tokens in {promised} bytes: it has {n_bytes}; {remedy}"
        )
    return dtype, n_tokens


@dataclass(frozen=True)
class Part:
    """A run of tokens inside a file, in which any bytes may precede and follow it."""

    path: Path
    dtype: np.dtype
    offset_bytes: int
    n_tokens: int


def shard_part(path: Path, remedy: str = REMEDY) -> Part:
    """Return where a shard's tokens lie; raises as `read_header` does."""
    dtype, n_tokens = read_header(path, remedy)
    return Part(path, dtype, HEADER_BYTES, n_tokens)


class TokenStream:
    """The tokens of shards, or of parts of files, end to end and read in place; cheap to pickle.

    Memory stays flat however much is read. A page that was touched counts as resident for as long
    as its map lives, with its neighbours (Linux maps 64 KiB around a touch), so maps that live on
    end up holding the whole corpus. They are made anew after `MAPPED_BYTES`; the pages themselves
    stay in the system's cache.
    """

    def __init__(self, parts: Iterable[Part | Path]) -> None:
        self._parts = [part if isinstance(part, Part) else shard_part(part) for part in parts]
        # where each part begins, then the end
        self._starts = [0, *accumulate(part.n_tokens for part in self._parts)]
        self._forget_maps()

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens from `start` up to `stop`, (N,) int64 with N = stop - start.

        Raises IndexError outside of the stream.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        tokens = np.empty(stop - start, dtype=np.int64)
        part = bisect_right(self._starts, start) - 1
        filled = 0
        while filled < len(tokens):
            offset = start + filled - self._starts[part]
            piece = self._mapped(part)[offset : offset + len(tokens) - filled]
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
            part += 1
            self._touched_bytes += piece.nbytes + FAULT_BYTES
        if self._touched_bytes > MAPPED_BYTES:
            self._forget_maps()
        return tokens

    def _forget_maps(self) -> None:
        self._maps: dict[int, np.ndarray] = {}  # by part; the last reference to a map unmaps it
        self._touched_bytes = 0  # through these maps, at most about

    def _mapped(self, part: int) -> np.ndarray:
        maps = self._maps  # another thread may replace them
        if part not in maps:
            maps[part] = _map(self._parts[part])
        return maps[part]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maps": {}, "_touched_bytes": 0}


def _map(part: Part) -> np.ndarray:
    if part.n_tokens == 0:  # there is nothing to map
        return np.empty(0, part.dtype)
    with part.path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        # Rows are read in random order. Where pages are not in memory yet, the system would read
        # ahead for each of them: 724 KiB from the disk for a row of 2 KiB, measured; so it is 6.
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, part.dtype, part.n_tokens, part.offset_bytes)
