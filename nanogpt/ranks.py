"""The ranks of a command: their launch, their process group, and decisions of rank zero for all."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
LOOPBACK = "127.0.0.1"
SHUTDOWN_S = 600  # in which ranks write a checkpoint after a signal
LAUNCHER = "NANOGPT_LAUNCHER_PID"  # of the process whose death ends the ranks


@dataclass(frozen=True)
class Ranks:
    """The rank of this process in the run, from torchrun's environment."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        names = [field.name for field in fields(cls) if field.name.upper() in os.environ]
        return cls(**{name: int(os.environ[name.upper()]) for name in names})

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.local_world_size


class RankZeroFailedError(RuntimeError):
    """Rank zero failed and reports why; the other ranks exit silently."""


class RanksFailedError(RankZeroFailedError):
    """Ranks that this process launched failed with an exit code, and have reported why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code


def is_rank() -> bool:
    """Return whether torchrun, or `launch`, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def leave_with_launcher() -> None:
    """End this rank soon after its launcher died, so that no orphan holds the run."""
    if not is_rank():
        return
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))  # it may be dead already

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def launch_ranks(n_processes: int, arguments: Sequence[str]) -> int:
    """Run Python with these arguments in n processes of this machine; return the exit code.

    The first process that fails ends the others. Raises RuntimeError where one was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_S))
    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n_processes,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint=f"{LOOPBACK}:0",
        local_addr=LOOPBACK,  # a host's own name need not resolve
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        escaped = [argument.replace("$", "$$") for argument in arguments]  # elastic has macros
        elastic_launch(config, sys.executable)("-u", *escaped)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode >= 0:
            return first.exitcode
        why = ", often by a lack of memory" if first.exitcode == -signal.SIGKILL else ""
        raise RuntimeError(
            f"process {rank} was ended by signal {-first.exitcode}{why}; "
            "issue the same command again"
        ) from None
    return 0


def join(device: torch.device) -> None:
    """Join the run's process group: gloo (decisions, signals), and nccl for GPUs."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


def gathered(value: T) -> list[T]:
    """Return the values of all ranks, in their order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_zero(decide: Callable[[], T]) -> T:
    """Return on every rank what `decide` returns on rank zero.

    Raises on rank zero what `decide` raises, RankZeroFailedError on the others.
    """
    if not dist.is_initialized():
        return decide()
    outcome: list[Any] = [None, None]
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [decide(), None]
        except Exception as error:
            failure, outcome = error, [None, str(error)]
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise RankZeroFailedError(outcome[1])
    result: T = outcome[0]
    return result
