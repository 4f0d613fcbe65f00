"""The order of the data: the row at each position, as a pure function.

Training is an endless sequence of rows, pass after pass over the corpus, each pass in an order of
its own. Nothing is stored or advanced: position -> row is computed from (seed, corpus, pass) by a
Feistel network, so any process computes any step, in constant memory, and all agree.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from nanogpt.splitmix import splitmix64

ROUNDS = 8


@dataclass(frozen=True)
class RowOrder:
    """An endless shuffled sequence of the rows 0 .. n_rows - 1: each pass holds every row once."""

    n_rows: int
    seed: int
    corpus_fingerprint: str

    def rows_of_step(self, step: int, rows_per_step: int) -> np.ndarray:
        """Return the rows of an optimizer step, over all ranks, (N,) int64, N = rows_per_step."""
        positions = np.arange(step * rows_per_step, (step + 1) * rows_per_step)
        passes, positions = np.divmod(positions, self.n_rows)
        rows = np.empty(rows_per_step, dtype=np.int64)
        for number in np.unique(passes):
            here = passes == number
            key = f"{self.seed}/{self.corpus_fingerprint}/{number}"
            rows[here] = permute(positions[here], self.n_rows, key)
        return rows


def row_seeds(seed: int, step: int, n_rows: int) -> np.ndarray:
    """Return a seed for each row of an optimizer step, over all ranks, (N,) int64, N = n_rows.

    Whatever is random about a row, such as its dropout, follows from its seed, so that no split of
    the step over ranks and micro-batches changes it.
    """
    key = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    first = np.frombuffer(key[:8], dtype="<u8")
    return splitmix64(first + np.arange(n_rows, dtype=np.uint64)).view(np.int64)


def permute(positions: np.ndarray, n: int, key: str) -> np.ndarray:
    """Return where a keyed permutation of 0 .. n - 1 takes the positions, (N,) int64.

    The network works on pairs of digits (left, right) of a rectangle a x b that just holds n, and
    positions that land outside 0 .. n - 1 are sent through again until they land inside (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    round_keys = np.frombuffer(hashlib.sha512(key.encode()).digest(), dtype="<u8")  # 8 of them
    a = np.uint64(math.isqrt(n - 1) + 1)
    b = np.uint64(-(-n // int(a)))
    values = np.asarray(positions).astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = np.divmod(values[outside], b)
        for i in range(0, ROUNDS, 2):  # each shifts one digit by a hash of the other
            left = (left + splitmix64(right ^ round_keys[i]) % a) % a
            right = (right + splitmix64(left ^ round_keys[i + 1]) % b) % b
        values[outside] = left * b + right
        outside = values >= n
    return values.astype(np.int64)
