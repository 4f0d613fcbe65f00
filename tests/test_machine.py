"""Facts about the machine."""

import os
from pathlib import Path

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
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight logical CPUs, two to a core, and no container."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "_siblings", lambda cpu: f"{cpu % 4},{cpu % 4 + 4}")
    monkeypatch.setattr(machine, "_cpu_quota", lambda: 64)


@pytest.mark.usefixtures("eight_cpus")
def test_two_logical_cpus_of_a_core_count_once() -> None:
    assert usable_cores() == 4


@pytest.mark.usefixtures("eight_cpus")
def test_only_allowed_cpus_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4, 5}, raising=False)
    assert usable_cores() == 2


@pytest.mark.usefixtures("eight_cpus")
def test_container_quota_limits_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cpu_quota", lambda: 3)
    assert usable_cores() == 3


@pytest.mark.parametrize(
    ("text", "quota"), [("200000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", None)]
)
def test_quota_is_read_from_the_control_group(
    monkeypatch: pytest.MonkeyPatch, text: str, quota: int | None
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert machine._cpu_quota() == (quota if quota is not None else machine.sys.maxsize)


def test_this_machine_has_cores_memory_and_a_name() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert usable_memory_bytes() > 2**28
    assert f"torch {torch.__version__}" in machine_id(CPU)
