"""How a training pass runs: what `torch.compile` compiles, and what the backward recomputes."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanogpt.model import RunBlock, run_block
from nanogpt.training.cross_entropy import summed_cross_entropy

Loss = Callable[..., Tensor]


def block_runner(compiled: bool, recompute: bool = False) -> RunBlock:
    """Return `run_block`, compiled: all layers share one graph.

    With `recompute` a block stores its input alone, and the backward runs it again.
    """
    run = torch.compile(run_block) if compiled else run_block
    return partial(checkpoint, run, use_reentrant=False) if recompute else run


def training_loss(next_token_loss: Loss, compiled: bool, recompute: bool = False) -> Loss:
    """Return that function, compiled: on a CPU as a whole, elsewhere a block, and the head.

    The layers share the graph of the block, so that 48 compile as fast as 2. On a CPU one graph of
    everything is 2.5 % faster (docs/PERFORMANCE.md); with `recompute` DDP could not split it.
    """
    run = block_runner(compiled, recompute)
    if not compiled:
        return partial(next_token_loss, run=run)
    parts = partial(next_token_loss, run=run, cross_entropy=torch.compile(summed_cross_entropy))
    if recompute:
        return parts
    whole = torch.compile(next_token_loss)
    return lambda model, *rows: (whole if model.wte.weight.is_cpu else parts)(model, *rows)
