"""The order of the data: a shuffle that anyone can compute at any position."""

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.data.order import RowOrder, permute, row_seeds
from nanogpt.splitmix import GAMMA, splitmix64

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


def test_splitmix_is_the_published_one_for_integers_and_arrays() -> None:
    assert splitmix64(GAMMA) == 0xE220A8397B1DCDAF  # the first output of seed 0
    values = [0, 1, 2**63, 2**64 - 1]
    assert splitmix64(np.array(values, np.uint64)).tolist() == [splitmix64(v) for v in values]
    assert splitmix64(2**64 + 5) == splitmix64(5)
