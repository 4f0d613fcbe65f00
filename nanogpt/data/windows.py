"""Rows of a token stream: every target once, each after the tokens before it in its row."""

from dataclasses import dataclass

import numpy as np

from nanogpt.data.shards import TokenStream

NOT_SCORED = -100


@dataclass(frozen=True)
class Windows:
    """Cuts a stream of N tokens into ceil((N - 1) / T) rows of T targets; the last may be partial.

    Row r predicts the tokens r*T + 1 .. (r+1)*T, each from those of the row before it.
    """

    stream: TokenStream
    block_size: int

    def __len__(self) -> int:
        return -(-(len(self.stream) - 1) // self.block_size)

    def n_targets(self, rows: np.ndarray) -> int:
        """Return how many targets the rows have in all."""
        partial = np.count_nonzero(rows == len(self) - 1)
        missing = len(self) * self.block_size - (len(self.stream) - 1)
        return len(rows) * self.block_size - int(partial) * missing

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs and targets of the rows, (B, T) int64 each.

        What lies past the end of the stream is 0 in the inputs and -100 in the targets.
        """
        input_ids = np.zeros((len(rows), self.block_size), dtype=np.int64)
        targets = np.full((len(rows), self.block_size), NOT_SCORED, dtype=np.int64)
        for i, row in enumerate(rows.tolist()):
            start = row * self.block_size
            tokens = self.stream.read(start, min(start + self.block_size + 1, len(self.stream)))
            input_ids[i, : len(tokens) - 1] = tokens[:-1]
            targets[i, : len(tokens) - 1] = tokens[1:]
        return input_ids, targets
