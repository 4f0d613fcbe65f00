"""Several processes that share the work of a task: `--processes N`, or torchrun's ranks.

python -m nanogpt.evaluate RUN --task hellaswag --processes 8 --device cuda
torchrun --nproc_per_node=8 -m nanogpt.evaluate RUN --task hellaswag --device cuda
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import IO

import torch
import torch.distributed as dist

POLL_S = 0.1
WORD_S = 2.0  # in which process 0 may say itself what is wrong


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
    """Return what this process calls itself where it says what is wrong."""
    return f"{command} (process {rank()} of {world_size()})" if rank() > 0 else command


def device_of_rank(device: str) -> torch.device:
    """Return this process's device: of several GPUs, its own."""
    if device == "cuda" and world_size() > 1:
        return torch.device(device, int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(device)


def launch(n_processes: int, arguments: Sequence[str]) -> int:
    """Run this command in n processes of this machine; return the exit code.

    The first that fails ends the others. Process 0 speaks; what another says is shown where it
    fails and process 0 does not within a moment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // n_processes)
    with ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(n_processes)]
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
            errors = said[number] if number else None
            processes.append(subprocess.Popen(command, env=environment, stderr=errors))
        try:
            return _wait(processes, said)
        finally:
            for process in processes:
                process.terminate()
                process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], said: Sequence[IO[str]]) -> int:
    """Return 0 when all processes have ended well, or the exit code of the first that has not."""
    codes = [process.poll() for process in processes]
    while None in codes and not any(codes):
        time.sleep(POLL_S)
        codes = [process.poll() for process in processes]
    failed = [number for number, code in enumerate(codes) if code]
    if not failed:
        return 0
    with suppress(subprocess.TimeoutExpired):
        processes[0].wait(WORD_S)
    if not processes[0].returncode:
        said[failed[0]].seek(0)
        sys.stderr.write(said[failed[0]].read())
    code = processes[failed[0]].returncode
    if code < 0:
        print(f"nanogpt.evaluate: process {failed[0]} was ended by signal {-code}", file=sys.stderr)
    return code if code > 0 else 128 - code
