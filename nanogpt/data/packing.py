"""Short texts side by side in rows of one length, each read as a document of its own.

The texts of a row do not depend on the seed; only the order of the rows is shuffled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nanogpt.data.windows import NOT_SCORED, TokenRows


@dataclass(frozen=True)
class PackedRows(TokenRows):
    """Rows of `block_size` tokens, each of one or more texts and then padding.

    A text of n ids takes n - 1 positions: each of its ids but the last, with the next as its
    target. `ids` (N,) and `scored` (N,), whether an id is a target, hold the texts end to end; text
    i begins at `bounds[i]`. `table` lists the texts of each row.
    """

    block_size: int
    ids: np.ndarray
    scored: np.ndarray
    bounds: np.ndarray
    table: list[list[int]]

    @classmethod
    def from_texts(
        cls, texts: Sequence[tuple[Sequence[int], Sequence[bool]]], block_size: int
    ) -> "PackedRows":
        """Pack texts, each as ids and whether they are scored, of at most block_size + 1 ids."""
        lengths = [len(ids) for ids, _ in texts]
        return cls(
            block_size=block_size,
            ids=np.array([i for ids, _ in texts for i in ids], dtype=np.int32),
            scored=np.array([s for _, scored in texts for s in scored], dtype=bool),
            bounds=np.cumsum([0, *lengths]),
            table=pack([n - 1 for n in lengths], block_size),
        )

    def __len__(self) -> int:
        return len(self.table)

    @property
    def padding(self) -> float:
        """The share of all positions without text."""
        n_used = len(self.ids) - len(self.bounds) + 1
        return 1 - n_used / (len(self) * self.block_size)

    def n_targets(self, rows: np.ndarray) -> int:
        """Return the number of targets in the rows (B,)."""
        return int(self._targets_of_row[rows].sum())

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return inputs, targets and documents of the rows, (B, T) int64 each.

        Documents number a row's texts from 0; the padding counts as one more, of inputs 0.
        """
        shape = (len(rows), self.block_size)
        input_ids = np.zeros(shape, dtype=np.int64)
        targets = np.full(shape, NOT_SCORED, dtype=np.int64)
        documents = np.zeros(shape, dtype=np.int64)
        for b, row in enumerate(rows.tolist()):
            position = 0
            for number, text in enumerate(self.table[row]):
                start, end = self.bounds[text : text + 2]
                here = slice(position, position + end - start - 1)
                input_ids[b, here] = self.ids[start : end - 1]
                following = slice(start + 1, end)
                targets[b, here] = np.where(self.scored[following], self.ids[following], NOT_SCORED)
                documents[b, here] = number
                position = here.stop
            documents[b, position:] = len(self.table[row])
        return input_ids, targets, documents

    @cached_property
    def _targets_of_row(self) -> np.ndarray:
        counted = np.append(0, np.cumsum(self.scored))  # scored ids before each
        of_text = counted[self.bounds[1:]] - counted[self.bounds[:-1] + 1]  # but for the first
        return np.array([of_text[texts].sum() for texts in self.table])


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return the texts of each row of `size` positions, of texts with 1 to `size` tokens each.

    Row after row takes the longest text left, and then those that leave the fewest positions empty
    (Gupta and Ho, "A New Heuristic Algorithm for the One-Dimensional Bin-Packing Problem", 1999).
    Of Alpaca's prompts in rows of 256 it leaves 2 % empty where best fit leaves 6 %.
    """
    left: dict[int, list[int]] = {}  # texts by length, the first of them last
    for text in reversed(range(len(lengths))):
        left.setdefault(lengths[text], []).append(text)
    rows: list[list[int]] = []
    while left:
        longest = max(left)
        rows.append([_take(left, longest)])
        counts = {length: len(texts) for length, texts in left.items()}
        rows[-1] += [_take(left, length) for length in fullest(counts, size - longest)]
    return rows


def fullest(counts: Mapping[int, int], room: int) -> list[int]:
    """Return lengths, each at most as often as counted, with the largest sum up to `room`.

    >>> fullest({7: 1, 5: 2, 4: 1}, room=10)
    [5, 5]
    """
    sums, steps = 1, []  # bit n of `sums`: a sum of n is possible
    for length, count in sorted(counts.items(), reverse=True):
        for _ in range(min(count, room // length)):
            steps.append((length, sums))
            sums |= sums << length & ((2 << room) - 1)
    rest = sums.bit_length() - 1
    chosen = []
    for length, before in reversed(steps):
        if not before >> rest & 1:  # not possible without this one
            chosen.append(length)
            rest -= length
    return chosen


def _take(left: dict[int, list[int]], length: int) -> int:
    text = left[length].pop()
    if not left[length]:
        del left[length]
    return text
