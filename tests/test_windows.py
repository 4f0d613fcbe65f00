"""Rows of a stream: every target once, from the tokens before it in its row."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.data.shards import TokenStream
from nanogpt.data.windows import NOT_SCORED, Windows


class Counting(TokenStream):
    """The stream of tokens 0, 1, 2 ..."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __len__(self) -> int:
        return self.total

    def read(self, start: int, stop: int) -> np.ndarray:
        assert stop <= self.total, "read past the end"
        return np.arange(start, stop)


def test_rows_overlap_by_the_token_that_is_both_target_and_input() -> None:
    batch = Windows(Counting(9), block_size=4).batch(np.array([1, 0]))
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert batch["targets"].tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]


def test_what_lies_past_the_end_is_not_scored() -> None:
    batch = Windows(Counting(7), block_size=4).batch(np.array([1]))
    assert batch["input_ids"].tolist() == [[4, 5, 0, 0]]
    assert batch["targets"].tolist() == [[5, 6, NOT_SCORED, NOT_SCORED]]


@settings(deadline=None)
@given(total=st.integers(2, 100), block_size=st.integers(1, 20))
def test_every_target_is_scored_once(total: int, block_size: int) -> None:
    windows = Windows(Counting(total), block_size)
    targets = windows.batch(np.arange(len(windows)))["targets"]
    assert targets[targets != NOT_SCORED].tolist() == list(range(1, total))


@settings(deadline=None)
@given(data=st.data(), total=st.integers(2, 100), block_size=st.integers(1, 20))
def test_targets_are_counted_without_reading(
    data: st.DataObject, total: int, block_size: int
) -> None:
    windows = Windows(Counting(total), block_size)
    rows = np.array(data.draw(st.lists(st.integers(0, len(windows) - 1), min_size=1)))
    targets = windows.batch(rows)["targets"]
    assert windows.totals(rows)["step_targets"] == (targets != NOT_SCORED).sum()
