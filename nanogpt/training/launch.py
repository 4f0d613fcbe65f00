"""The devices of a run, and the launch of its ranks."""

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from nanogpt.ranks import Ranks, RanksFailedError, is_rank, launch_ranks
from nanogpt.runs.directory import RunDirectory

STOPPED_BY_SIGNAL = (130, 143)


def resolve_device(accelerator: str) -> torch.device:
    """Return the device of this rank; `auto` is CUDA, then MPS, then the CPU.

    Raises ValueError for a device that this machine lacks.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    there = ["cpu", *([found.type] if found is not None and found.type in ("cuda", "mps") else [])]
    kind = there[-1] if accelerator == "auto" else accelerator.replace("gpu", "cuda")
    if kind not in there:
        raise ValueError(
            f"trainer.accelerator={accelerator} is not on this machine; "
            f"choose from auto, {', '.join(there)}"
        )
    index = Ranks.from_environment().local_rank
    return torch.device(f"cuda:{index}" if kind == "cuda" else kind)


def count_devices(devices: int | str, accelerator: str) -> int:
    """Return how many processes of this machine train; `auto` is one per GPU, and one without.

    Raises ValueError for more than the machine has GPUs or CPUs.
    """
    is_gpu = resolve_device(accelerator).type == "cuda"
    n_gpus = torch.cuda.device_count() if is_gpu else 1
    if isinstance(devices, str):  # auto
        return n_gpus
    most, what = (n_gpus, "GPUs") if is_gpu else (max(2, os.cpu_count() or 1), "CPUs")
    if devices > most:
        raise ValueError(
            f"trainer.devices={devices} but this machine has {most} {what}; pass at most {most}"
        )
    return devices


def run_on_ranks(
    config: dict[str, Any], train: Callable[[dict[str, Any]], Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Train on this rank, or on as many ranks as configured; return the run's summary.

    Raises ValueError for ranks that cannot be started from here, RanksFailedError after a failure
    that the ranks have reported, RuntimeError where one was killed, SystemExit after a signal.
    """
    trainer = config["trainer"]
    if is_rank():
        return train(config)
    if trainer["num_nodes"] > 1:
        raise ValueError(
            f"trainer.num_nodes={trainer['num_nodes']} needs torchrun on every node: "
            f"torchrun --nnodes={trainer['num_nodes']} --nproc_per_node=GPUS train.py ..."
        )
    n_processes = count_devices(trainer["devices"], trainer["accelerator"])
    if n_processes == 1:
        return train(config)
    # Lightning's own launcher would run a sweep once more in every child.
    with tempfile.TemporaryDirectory() as directory:
        frozen = Path(directory) / "config.yaml"
        frozen.write_text(yaml.safe_dump(config), encoding="utf-8")
        script = str(Path(sys.argv[0]).resolve())
        code = launch_ranks(n_processes, [script, "--frozen", str(frozen)])
    if code in STOPPED_BY_SIGNAL:
        raise SystemExit(code)
    if code:
        raise RanksFailedError(code)
    return RunDirectory.from_config(config).summary() or {}
