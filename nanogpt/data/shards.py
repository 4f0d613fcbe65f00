"""Token shards: a header of 256 int32 and then the tokens, as llm.c and modded-nanogpt write them.

The header begins with a magic number, a version and the number of tokens; the rest is zero. llm.c
has two kinds: magic number 20240520 with version 1 holds uint16 (GPT-2), 20240801 with version 7
holds uint32 (Llama 3). Its readers and modded-nanogpt's read these shards (llm.c,
dev/data/data_common.py; modded-nanogpt, train_gpt.py). Only shards end in `.bin`.
"""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from nanogpt.text import first_line

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
UINT16: np.dtype = np.dtype("<u2")
UINT32: np.dtype = np.dtype("<u4")
MAGIC_AND_VERSION = {UINT16: (20240520, 1), UINT32: (20240801, 7)}
MAGIC_NUMBERS = {magic for magic, _ in MAGIC_AND_VERSION.values()}
REMEDY = "remove its folder and run the command again to prepare the data anew"
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


@contextmanager
def naming_damage(path: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Raise an error about a file in the block as ValueError: its path, the reason, the remedy."""
    try:
        yield
    except (OSError, EOFError, LookupError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        reason = f"no {reason}" if isinstance(error, KeyError) else reason
        raise ValueError(f"{path} cannot be read ({reason}); {remedy}") from error


@dataclass(frozen=True)
class Part:
    """A run of tokens inside a file, in which any bytes may precede and follow it."""

    path: Path
    dtype: np.dtype
    offset_bytes: int
    n_tokens: int


def shard_part(path: Path) -> Part:
    """Return where a shard's tokens lie; raises ValueError or OSError for other or cut files."""
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
        n_bytes = os.fstat(file.fileno()).st_size
    magic, version, n_tokens = np.frombuffer(header.ljust(12, b"\0"), "<i4")[:3].tolist()
    dtype = {made: of for of, made in MAGIC_AND_VERSION.items()}.get((magic, version))
    if dtype is None:
        raise ValueError(f"not a token shard: begins with {magic} and version {version}")
    if n_bytes != HEADER_BYTES + n_tokens * dtype.itemsize:
        raise ValueError(f"{n_bytes} bytes, which are not the {n_tokens} tokens of its header")
    return Part(path, dtype, HEADER_BYTES, n_tokens)


class TokenStream:
    """The tokens of parts of files, end to end, read in place; cheap to pickle.

    No file stays open and none is mapped, so memory is flat however much is read.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = [part for part in parts if part.n_tokens > 0]
        # where each part begins, then the end
        self._starts = [0, *accumulate(part.n_tokens for part in self._parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def parts(self, start: int, stop: int) -> list[Part]:
        """Return the tokens from `start` up to `stop` as parts of files."""
        found = []
        i = bisect_right(self._starts, start) - 1
        while start < stop:
            part = self._parts[i]
            offset = start - self._starts[i]
            n_tokens = min(stop - start, part.n_tokens - offset)
            offset_bytes = part.offset_bytes + offset * part.dtype.itemsize
            found.append(replace(part, offset_bytes=offset_bytes, n_tokens=n_tokens))
            start, i = start + n_tokens, i + 1
        return found

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens from `start` up to `stop`, (N,) int64 with N = stop - start.

        Raises IndexError outside of the stream.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        tokens = np.empty(stop - start, dtype=np.int64)
        filled = 0
        for part in self.parts(start, stop):
            with open(part.path, "rb", buffering=0) as file:
                file.seek(part.offset_bytes)
                data = file.read(part.n_tokens * part.dtype.itemsize)
            tokens[filled : filled + part.n_tokens] = np.frombuffer(data, part.dtype)
            filled += part.n_tokens
        return tokens
