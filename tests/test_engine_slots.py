"""The cache of keys and values."""

import os
import sys
from pathlib import Path

import pytest
import torch

from nanogpt.model import GPTConfig
from serving.engine.slots import Slots, slot_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_cache_is_all_zeros(dtype: torch.dtype) -> None:
    config = GPTConfig(block_size=8, vocab_size=10, n_layer=2, n_head=2, n_embd=8)
    cache = Slots(config, 3, dtype, torch.device("cpu")).cache
    assert cache.shape == (2, 2, 3, 2, 8, 4)
    assert cache.dtype == dtype
    assert cache.nbytes == 3 * slot_bytes(config, dtype)
    assert not cache.any()


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
def test_memory_is_taken_by_the_tokens_alone() -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    config = GPTConfig(block_size=1024, vocab_size=10, n_layer=4, n_head=4, n_embd=256)
    before = resident()
    cache = Slots(config, 32, torch.float32, torch.device("cpu")).cache  # 256 MiB
    cache[:, :, 5, :, :16] = 1.0  # 16 tokens: 128 kiB
    assert resident() - before < 8 * 2**20


CONFIG = GPTConfig(block_size=64, vocab_size=99, n_layer=1, n_head=1, n_embd=4)


def slots_after(*texts: list[int], n_slots: int) -> Slots:
    """Return slots that have read texts, one after another."""
    slots = Slots(CONFIG, n_slots, torch.float32, torch.device("cpu"))
    for text in texts:
        taken = slots.acquire(text, "")
        slots.hold(taken[0], text)
        slots.release(taken[0])
    return slots


def held(slots: Slots) -> list[list[int]]:
    return [slot.ids.tolist() for slot in slots.slots]


def test_a_text_that_goes_on_stays_in_its_slot() -> None:
    slots = slots_after([1, 2, 3], [1, 2, 3, 4], n_slots=2)
    assert held(slots) == [[1, 2, 3, 4], []]


def test_a_beginning_is_copied_while_a_slot_is_free() -> None:
    slots = slots_after([1, 2, 3, 4, 5], n_slots=2)
    slots.cache[:, :, 0, :, :5] = 7.0
    taken = slots.acquire([1, 2, 3, 4, 9], "")
    assert (taken[0].index, taken[1]) == (1, 4)
    assert held(slots)[0] == [1, 2, 3, 4, 5]
    assert slots.cache[:, :, 1, :, :4].eq(7.0).all()


def test_the_slot_used_longest_ago_makes_room() -> None:
    slots = slots_after([1, 2], [3, 4], [1, 2, 5], [6, 7], n_slots=2)
    assert held(slots) == [[1, 2, 5], [6, 7]]


def test_an_older_version_of_a_text_makes_room_first() -> None:
    old, new = [*range(40), 50], [*range(40), 51, 52]
    slots = slots_after([60, 61], old, new, [70, 71], n_slots=3)
    assert held(slots) == [[60, 61], [70, 71], new]


def test_a_text_of_another_scope_is_no_version_of_it() -> None:
    slots = slots_after([60, 61], [*range(40), 50], n_slots=3)
    taken = slots.acquire([*range(40), 51], "another")
    assert taken[1] == 0
    slots.hold(taken[0], [*range(40), 51])
    slots.release(taken[0])
    taken = slots.acquire([70, 71], "")
    assert taken[0].index == 0
