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


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory as Linux tells it")
def test_memory_is_taken_by_the_tokens_alone() -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    config = GPTConfig(block_size=1024, vocab_size=10, n_layer=4, n_head=4, n_embd=256)
    before = resident()
    cache = Slots(config, 32, torch.float32, torch.device("cpu")).cache  # 256 MiB
    cache[:, :, 5, :, :16] = 1.0  # 16 tokens: 128 kiB
    assert resident() - before < 8 * 2**20
