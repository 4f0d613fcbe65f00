"""Facts about the machine."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from nanogpt.training import machine
from nanogpt.training.machine import (
    machine_id,
    usable_cores,
    usable_memory_bytes,
)

CPU = torch.device("cpu")


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Eight logical CPUs, two to a core, and no container; return the kernel's files."""
    path = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = {path.format(cpu): f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "_text", lambda path: files.get(path, ""))
    return files


@pytest.mark.usefixtures("eight_cpus")
def test_two_logical_cpus_of_a_core_count_once() -> None:
    assert usable_cores() == 4


@pytest.mark.usefixtures("eight_cpus")
def test_only_allowed_cpus_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4, 5}, raising=False)
    assert usable_cores() == 2


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("300000 100000\n", 3),
        ("200000 100000\n", 2),
        ("50000 100000\n", 1),
        ("20000 100000\n", 1),
        ("max 100000\n", 4),
    ],
)
def test_container_quota_limits_the_cores(
    eight_cpus: dict[str, str], text: str, cores: int
) -> None:
    eight_cpus["/sys/fs/cgroup/cpu.max"] = text
    assert usable_cores() == cores


@pytest.mark.parametrize(("text", "limited"), [("12345\n", True), ("max\n", False)])
def test_container_limits_the_memory(eight_cpus: dict[str, str], text: str, limited: bool) -> None:
    eight_cpus["/sys/fs/cgroup/memory.max"] = text
    assert (usable_memory_bytes() == 12345) is limited


def test_this_machine_has_cores_memory_and_a_name() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert usable_memory_bytes() > 2**28
    assert f"torch {torch.__version__}" in machine_id(CPU)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it sets glibc's malloc")
def test_kept_memory_is_not_mapped_again() -> None:
    program = """
import resource, torch
from nanogpt.training.machine import keep_freed_memory
def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24)  # 16384 pages, beyond what glibc keeps by default
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keep_freed_memory(torch.device("cpu"))
print([page_faults() for _ in range(5)][-1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert int(done.stdout) < 100
