"""The parts of a validation set: fixed pieces of its text, by which runs are compared pairwise.

Parts of a token stream are cut by bytes, so that they do not depend on tokenizer or block size.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from nanogpt.data.shards import TokenStream

N_PARTS = 256
READ_ROWS = 4096  # of a stream at a time

# From row numbers (B,) and their batch to the starts of the parts of its targets, (B, T) or (B, 1).
Parts = Callable[[np.ndarray, dict[str, Any]], np.ndarray]


def part_starts(places: np.ndarray, size: int) -> np.ndarray:
    """Return the start of the part that each place (...) lies in, of N_PARTS from 0 to `size`."""
    size = max(size, 1)
    parts = np.minimum(places, size - 1) * N_PARTS // size
    return -(-parts * size // N_PARTS)


def row_parts(n_rows: int) -> Parts:
    """Return parts of consecutive rows, whose starts are numbers of rows."""
    return lambda rows, batch: part_starts(rows[:, None], n_rows)


class TextParts:
    """Parts of the text of windows of `block_size` tokens; a target is in that of its first byte.

    `tokens` are the bytes of every token.
    """

    def __init__(self, stream: TokenStream, block_size: int, tokens: Sequence[bytes]) -> None:
        self.stream = stream
        self.block_size = block_size
        self.token_bytes = np.array([len(token) for token in tokens])  # (V,) int64

    def __call__(self, rows: np.ndarray, batch: dict[str, Any]) -> np.ndarray:
        # A target begins where its input ends.
        ends = self.row_starts[rows, None] + self.token_bytes[batch["input_ids"]].cumsum(1)
        return part_starts(ends, self.row_starts[-1])

    @cached_property
    def row_starts(self) -> np.ndarray:
        """The byte at which each row's first input begins, and the size of the text, (R + 1,)."""
        sums = [np.zeros(1, np.int64)]
        n_tokens, size = len(self.stream), READ_ROWS * self.block_size
        for start in range(0, n_tokens, size):
            tokens = self.stream.read(start, min(start + size, n_tokens))
            rows = np.arange(0, len(tokens), self.block_size)
            sums.append(np.add.reduceat(self.token_bytes[tokens], rows))
        return np.concatenate(sums).cumsum()
