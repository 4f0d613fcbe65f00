"""The order of the data: a shuffle that anyone can compute at any position."""

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.data.order import RowOrder, WindowedOrder, permute, row_seeds

SIZES = st.integers(1, 5000)


@settings(deadline=None)
@given(n=SIZES, key=st.text(max_size=5))
def test_permutation_is_a_bijection(n: int, key: str) -> None:
    assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


def test_permutation_is_a_bijection_of_a_million() -> None:
    n = 1_000_003
    seen = np.zeros(n, dtype=bool)
    seen[permute(np.arange(n), n, "key")] = True
    assert seen.all()


def test_every_row_of_every_step_has_a_seed_of_its_own() -> None:
    seeds = [row_seeds(seed, step, 4) for seed in (-1, 0, 2**63 - 1) for step in range(100)]
    assert len(set(np.concatenate(seeds).tolist())) == 3 * 100 * 4
    assert np.array_equal(row_seeds(0, 5, 9)[:4], row_seeds(0, 5, 4))


@settings(deadline=None)
@given(n=st.integers(1, 2**40), data=st.data())
def test_permutation_is_random_access(n: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5)))
    together = permute(positions, n, "key")
    assert [permute(positions[i : i + 1], n, "key")[0] for i in range(len(positions))] == list(
        together
    )
    assert together.min() >= 0
    assert together.max() < n


def test_permutation_is_the_documented_one() -> None:
    """Against the definition in plain integers: another order would break every run to continue."""
    for n in (1, 2, 3, 10, 10**13):
        positions = np.arange(min(n, 10)) + n - min(n, 10)
        expected = [_defined(int(i), n, "0/abc/0") for i in positions]
        assert permute(positions, n, "0/abc/0").tolist() == expected


def test_permutations_of_four_are_all_as_likely() -> None:
    counts = Counter(tuple(permute(np.arange(4), 4, str(key)).tolist()) for key in range(2400))
    assert len(counts) == 24
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 49.7  # chi2, 23, p = 0.001


def test_neighbours_are_scattered_evenly() -> None:
    n = 10_000
    rows = permute(np.arange(n), n, "key")
    assert abs(np.abs(np.diff(rows)).mean() / n - 1 / 3) < 0.01
    assert abs(np.corrcoef(np.arange(n), rows)[0, 1]) < 0.03


@settings(deadline=None)
@given(n=st.integers(1, 60), rows_per_step=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_each_pass_holds_every_row_once(n: int, rows_per_step: int, seed: int) -> None:
    order = RowOrder(n, seed, "corpus")
    n_steps = -(-3 * n // rows_per_step)
    rows = np.concatenate([order.rows_of_step(step, rows_per_step) for step in range(n_steps)])
    for number in range(3):
        assert sorted(rows[number * n : (number + 1) * n].tolist()) == list(range(n))


@settings(deadline=None)
@given(a=st.integers(1, 50), b=st.integers(1, 50))
def test_sequence_does_not_depend_on_how_it_is_cut_into_steps(a: int, b: int) -> None:
    order = RowOrder(37, 1, "corpus")
    one = [order.rows_of_step(step, a) for step in range(b)]
    other = [order.rows_of_step(step, b) for step in range(a)]
    assert np.concatenate(one).tolist() == np.concatenate(other).tolist()


@pytest.mark.parametrize(
    "other", [RowOrder(1000, 2, "corpus"), RowOrder(1000, 1, "another"), "the next pass"]
)
def test_seed_corpus_and_pass_each_change_the_order(other: RowOrder | str) -> None:
    order = RowOrder(1000, 1, "corpus")
    first = order.rows_of_step(0, 1000)
    second = (
        other.rows_of_step(0, 1000) if isinstance(other, RowOrder) else order.rows_of_step(1, 1000)
    )
    assert (first == second).mean() < 0.01


def test_a_shuffle_of_ten_billion_tokens_repeats_no_row() -> None:
    """10 B tokens in rows of 1,024: a stretch of a pass, and places spread over all of it."""
    n = 9_765_625
    seen = np.zeros(n, dtype=bool)
    positions = np.unique(np.concatenate([np.arange(4_000_000, 4_200_000), np.arange(0, n, 49)]))
    seen[permute(positions, n, "key")] = True
    assert seen.sum() == len(positions)


class Arriving:
    """A stream of `total` tokens that come in pieces, and only when someone waits for them."""

    def __init__(self, total: int, piece: int = 1) -> None:
        self.total, self.piece, self.present = total, piece, 0

    def n_tokens(self, at_least: int) -> int:
        while self.present < min(at_least, self.total):
            self.present = min(self.present + self.piece, self.total)
        return self.present


WINDOWED = {
    "window_tokens": st.integers(1, 60),
    "block_size": st.integers(1, 20),
    "total": st.integers(2, 300),
}


def _windowed(
    window_tokens: int, block_size: int, stream: Arriving, seed: int = 1
) -> WindowedOrder:
    return WindowedOrder(window_tokens, block_size, seed, "corpus", stream.n_tokens)


def _sequence(order: WindowedOrder, n: int, rows_per_step: int) -> list[int]:
    steps = range(-(-n // rows_per_step))
    return [r for step in steps for r in order.rows_of_step(step, rows_per_step).tolist()][:n]


@settings(deadline=None)
@given(**WINDOWED, rows_per_step=st.integers(1, 50))
def test_each_windowed_pass_holds_every_row_once(
    window_tokens: int, block_size: int, total: int, rows_per_step: int
) -> None:
    n_rows = math.ceil((total - 1) / block_size)
    order = _windowed(window_tokens, block_size, Arriving(total))
    rows = _sequence(order, 2 * n_rows, rows_per_step)
    assert sorted(rows[:n_rows]) == sorted(rows[n_rows:]) == list(range(n_rows))


@settings(deadline=None)
@given(**WINDOWED)
def test_a_pass_walks_the_windows_in_order(window_tokens: int, block_size: int, total: int) -> None:
    n_rows = math.ceil((total - 1) / block_size)

    def window(row: int) -> int:
        """The first window, counted in whole ones, by whose end all tokens of a row are there."""
        ends = range(window_tokens, total + 1, window_tokens)
        last_token = row * block_size + block_size
        return sum(end <= last_token for end in ends)

    windows = [
        window(r)
        for r in _sequence(_windowed(window_tokens, block_size, Arriving(total)), n_rows, 7)
    ]
    assert windows == sorted(windows)


@settings(deadline=None)
@given(**WINDOWED, rows_per_step=st.integers(1, 50), piece=st.integers(1, 400))
def test_rows_do_not_depend_on_when_the_tokens_came(
    window_tokens: int, block_size: int, total: int, rows_per_step: int, piece: int
) -> None:
    all_there = Arriving(total, total)
    all_there.n_tokens(total)
    n = 2 * math.ceil((total - 1) / block_size)
    late = _windowed(window_tokens, block_size, Arriving(total, piece))
    assert _sequence(late, n, rows_per_step) == _sequence(
        _windowed(window_tokens, block_size, all_there), n, rows_per_step
    )


def test_early_steps_wait_for_their_own_window_only() -> None:
    stream = Arriving(1000)
    order = _windowed(100, 10, stream)  # 9 rows need the first 100 tokens only, 19 the first 200
    assert sorted(_sequence(order, 9, 9)) == list(range(9))
    assert stream.present == 100
    assert sorted(order.rows_of_step(1, 9).tolist() + order.rows_of_step(18, 1).tolist()) == list(
        range(9, 19)
    )
    assert stream.present == 200


def test_windows_shuffle_their_rows() -> None:
    order = _windowed(10_000, 10, Arriving(30_001, 30_001))
    rows = np.array(_sequence(order, 6000, 100)).reshape(6, 1000)  # 2 passes of about 3 windows
    assert all((rows[i] != np.sort(rows[i])).mean() > 0.9 for i in range(6))
    assert (rows[0] == rows[3]).mean() < 0.05
    assert (rows[0, :990] == rows[1, :990] - 1000).mean() < 0.05


def _defined(value: int, n: int, key: str) -> int:
    digest = hashlib.sha512(key.encode()).digest()
    keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(8)]
    a = math.ceil(math.sqrt(n))
    b = math.ceil(n / a)

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    while True:
        left, right = divmod(value, b)
        for i in range(0, 8, 2):
            left = (left + mix(right ^ keys[i])) % a
            right = (right + mix(left ^ keys[i + 1])) % b
        value = left * b + right
        if value < n:
            return value
