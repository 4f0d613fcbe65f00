"""The ranks of a run: joining their process group, and decisions of rank zero for all of them."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
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
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        )

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.local_world_size


class RankZeroFailedError(RuntimeError):
    """Rank zero failed and reports why; the other ranks exit silently."""


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


def join(device: torch.device) -> None:
    """Join the run's process group: gloo (decisions, signals), and nccl for GPUs."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


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
