"""This machine: cores, memory, names, versions."""

import contextlib
import ctypes
import os
import platform
import re
import subprocess
from pathlib import Path

import lightning
import torch

from nanogpt import __version__

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
MAX_INT = 2**31 - 1


def usable_cores() -> int:
    """Return the physical cores that this process may use, within a container's quota."""
    cpus: set[int] = set(range(os.cpu_count() or 1))
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
    quota, _, period = _text("/sys/fs/cgroup/cpu.max").partition(" ")  # cgroup v2; or "max"
    most = round(int(quota) / int(period)) if quota.isdecimal() else len(cpus)
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {_text(siblings.format(cpu)) or str(cpu) for cpu in cpus}
    return max(1, min(len(cores), most))


def usable_memory_bytes() -> int:
    """Return the memory that this process may use, 8 GiB where that is unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        total = 8 * 2**30
    limit = _text("/sys/fs/cgroup/memory.max").strip()  # or "max"
    return min(total, int(limit)) if limit.isdecimal() else total


def keep_freed_memory(device: torch.device) -> None:
    """Have glibc's malloc reuse the freed memory of a CPU device rather than return it.

    Every step on a CPU allocates the same large tensors. By default each is mapped, cleared page by
    page at its first use and unmapped: a fifth of a step (docs/PERFORMANCE.md).
    """
    if device.type != "cpu":
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, MAX_INT)
        # Before version 2.35 the threshold is limited.
        mallopt(M_MMAP_THRESHOLD, MAX_INT) or mallopt(M_MMAP_MAX, 0)


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


def _cpu_model() -> str:
    found = re.search(r"^model name\s*: (.*)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _text(path: str) -> str:
    """Return a file of the kernel, empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
