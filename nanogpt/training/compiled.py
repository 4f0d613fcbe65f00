"""What `torch.compile` compiles of a training pass."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nanogpt.model import run_block
from nanogpt.training.cross_entropy import summed_cross_entropy


def compiled_block() -> Callable[..., Tensor]:
    """Return `run_block` compiled: layers share one graph, with dropout all but the first."""
    from torch._dynamo import config  # which takes a second to import

    config.allow_unspec_int_on_nn_module = True  # else each layer whose number is used has a graph
    return torch.compile(run_block)


def compiled_loss(next_token_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return that function compiled: on a CPU as a whole, elsewhere a block, and the head.

    The layers share the graph of the block, so that 48 compile as fast as 2. On a CPU one graph of
    everything is 2.5 % faster (docs/PERFORMANCE.md).
    """
    whole, cross_entropy = torch.compile(next_token_loss), torch.compile(summed_cross_entropy)
    by_block = partial(next_token_loss, run=compiled_block(), cross_entropy=cross_entropy)
    return lambda model, *rows: (whole if model.wte.weight.is_cpu else by_block)(model, *rows)
