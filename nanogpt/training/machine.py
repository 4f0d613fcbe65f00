"""This machine: cores, memory, names, versions."""

import contextlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import lightning
import torch

from nanogpt import __version__


def usable_cores() -> int:
    """Return the physical cores that this process may use."""
    cpus: set[int] = set(range(os.cpu_count() or 1))
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
    cores = {_siblings(cpu) for cpu in cpus}
    return max(1, min(len(cores), _cpu_quota()))


def usable_memory_bytes() -> int:
    """Return the memory that this process may use, 8 GiB where that is unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8 * 2**30
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


def machine_id(device: torch.device) -> str:
    """Return the scope of measurements: the device, the CPU, its cores and torch's version."""
    parts = [_cpu_model(), f"{usable_cores()} cores", f"torch {torch.__version__}"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        parts.insert(0, f"{properties.name} {properties.total_memory / 2**30:.0f} GiB")
    elif device.type != "cpu":
        parts.insert(0, device.type)
    return ", ".join(parts)


def device_name(device: torch.device) -> str:
    """Return the device as a person names it, a CPU with the threads that are used of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with_what = "MPS" if device.type == "mps" else f"{torch.get_num_threads()} threads"
    return f"{_cpu_model()} ({with_what})"


def git_revision() -> str | None:
    """Return the commit of the code, `-dirty` where it was changed; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        done = subprocess.run([*command, "--abbrev=12"], capture_output=True, text=True)
        return done.stdout.strip() or None
    return None


def versions() -> dict[str, str]:
    """Return the versions of what a result may depend on."""
    return {
        "nanogpt": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _siblings(cpu: int) -> str:
    """Return the name of a logical CPU's physical core; its own number where that is unknown."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text()
    except OSError:
        return str(cpu)


def _cpu_quota() -> int:
    """Return how many CPUs a container may use (cgroup v2)."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):  # none, or "max"
        return sys.maxsize


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
