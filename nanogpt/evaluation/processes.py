"""Several processes that share the work of a task: `--processes N`, or torchrun's ranks.

python -m nanogpt.evaluate RUN --task hellaswag --processes 8 --device cuda
torchrun --nproc_per_node=8 -m nanogpt.evaluate RUN --task hellaswag --device cuda
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

POLL_S = 0.1


def rank() -> int:
    """Return the number of this process among those that share the work."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return how many processes share the work."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join() -> None:
    """Meet the other processes, where there are any; only plain values pass between them."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device_of_rank(device: str) -> torch.device:
    """Return this process's device: of several GPUs, its own."""
    if device == "cuda" and world_size() > 1:
        return torch.device(device, int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(device)


def launch(n_processes: int, arguments: Sequence[str]) -> int:
    """Run this command in n processes of this machine; return the exit code.

    The first that fails ends the others.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // n_processes)
    processes = []
    for number in range(n_processes):
        environment = {
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(n_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-m", "nanogpt.evaluate", *arguments]
        processes.append(subprocess.Popen(command, env=environment))
    try:
        while any(process.poll() is None for process in processes):
            if failed := [p.returncode for p in processes if p.returncode]:
                return int(failed[0])
            time.sleep(POLL_S)
    finally:
        for process in processes:
            process.terminate()
            process.wait()
    return max(process.returncode for process in processes)
