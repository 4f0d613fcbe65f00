"""The cache of keys and values."""

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
