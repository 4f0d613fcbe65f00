"""Several processes that share the work of a task: `--processes N`, or torchrun's ranks.

python -m nanogpt.evaluate RUN --task hellaswag --processes 8 --device cuda
torchrun --nproc_per_node=8 -m nanogpt.evaluate RUN --task hellaswag --device cuda
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from nanogpt.ranks import Ranks, leave_with_launcher
from nanogpt.text import first_line

REPORT_S = 2.0  # in which rank zero reports an error of all


@contextmanager
def joined() -> Iterator[None]:
    """Join the process group in a block, where there are several ranks; only objects are sent."""
    leave_with_launcher()
    if Ranks.from_environment().world_size > 1:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run a block, such as one that fetches a file, on rank zero before the other ranks."""
    is_first = Ranks.from_environment().rank == 0
    if not is_first and dist.is_initialized():
        dist.barrier()
    try:
        yield
    finally:
        if is_first and dist.is_initialized():
            dist.barrier()


def explain(error: Exception) -> str:
    """Return an error's message, delayed where rank zero may print the same and end the others."""
    if Ranks.from_environment().rank > 0:
        time.sleep(REPORT_S)
    return first_line(error)


def device_of_rank(device: str) -> torch.device:
    """Return this rank's device: of several GPUs, its own."""
    ranks = Ranks.from_environment()
    is_shared = device == "cuda" and ranks.world_size > 1
    return torch.device(device, ranks.local_rank) if is_shared else torch.device(device)
