"""Several processes that share the work of a task: `--processes N`, or torchrun's ranks.

python -m nanogpt.evaluate RUN --task hellaswag --processes 8 --device cuda
torchrun --nproc_per_node=8 -m nanogpt.evaluate RUN --task hellaswag --device cuda
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from nanogpt.ranks import launch_ranks, leave_with_launcher
from nanogpt.text import first_line

REPORT_S = 2.0  # in which process 0 reports an error of all


def rank() -> int:
    """Return the number of this process among those that share the work."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return how many processes share the work."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join() -> None:
    """Meet the other processes, where there are any; only plain values pass between them."""
    leave_with_launcher()
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Let the others do after rank zero what would disturb it, such as fetching a file."""
    if rank() > 0 and dist.is_initialized():
        dist.barrier()
    try:
        yield
    finally:
        if rank() == 0 and dist.is_initialized():
            dist.barrier()


def named(command: str) -> str:
    """Return the name of this process in its error messages."""
    return f"{command} (process {rank()} of {world_size()})" if rank() > 0 else command


def explain(error: Exception) -> str:
    """Return an error's message, delayed where process 0 may print the same and end the others."""
    if rank() > 0:
        time.sleep(REPORT_S)
    return first_line(error)


def device_of_rank(device: str) -> torch.device:
    """Return this process's device: of several GPUs, its own."""
    if device == "cuda" and world_size() > 1:
        return torch.device(device, int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(device)


def launch(n_processes: int, arguments: Sequence[str]) -> int:
    """Run this command in n processes of this machine; return the exit code."""
    threads = max(1, (os.cpu_count() or 1) // n_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    return launch_ranks(n_processes, ["-m", "nanogpt.evaluate", *arguments])
