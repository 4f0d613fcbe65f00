"""Rows of training data, and those of a token stream: every target once, after its row's tokens."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanogpt.data.shards import TokenStream

NOT_SCORED = -100


class Rows(ABC):
    """Numbered rows of one split, a batch of which is one forward."""

    scored_key = "targets"  # the tensor of a batch that is -100 where nothing is scored

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def batch(self, rows: np.ndarray) -> dict[str, Any]:
        """Return the tensors of the rows (B,)."""

    @abstractmethod
    def totals(self, rows: np.ndarray) -> dict[str, Any]:
        """Return sums over the rows (N,) of a step, which each of its batches holds."""

    def at_step(self, rows: np.ndarray, seed: int, step: int) -> "tuple[Rows, np.ndarray]":
        """Return the rows (N,) as they are at a step, and their numbers (N,) among those."""
        return self, rows

    def arrange(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return positions (M,) of rows (N,) in the order in which they are batched."""
        return positions


@dataclass(frozen=True)
class Windows(Rows):
    """Cuts a stream of N tokens into ceil((N - 1) / T) rows of T targets; the last may be partial.

    Row r predicts the tokens r*T + 1 .. (r+1)*T, each from those of the row before it.
    """

    stream: TokenStream
    block_size: int

    def __len__(self) -> int:
        return -(-(len(self.stream) - 1) // self.block_size)

    def totals(self, rows: np.ndarray) -> dict[str, Any]:
        """Return the number of targets in the rows (N,)."""
        targets_after = len(self.stream) - 1 - rows * self.block_size
        return {"step_targets": int(np.minimum(targets_after, self.block_size).sum())}

    def batch(self, rows: np.ndarray) -> dict[str, Any]:
        """Return the inputs and targets of the rows (B,), (B, T) int64 each.

        Past the end of the stream the inputs are 0 and the targets -100.
        """
        input_ids = torch.zeros(len(rows), self.block_size, dtype=torch.int64)
        targets = torch.full_like(input_ids, NOT_SCORED)
        for i, row in enumerate(rows.tolist()):
            start = row * self.block_size
            end = min(start + self.block_size + 1, len(self.stream))
            tokens = torch.from_numpy(self.stream.read(start, end))
            input_ids[i, : len(tokens) - 1] = tokens[:-1]
            targets[i, : len(tokens) - 1] = tokens[1:]
        return {"input_ids": input_ids, "targets": targets}
