"""Devices, ranks, and what rank zero decides for all."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt.ranks import Ranks, launch_ranks, on_rank_zero
from nanogpt.training.launch import count_devices, resolve_device


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks(0, 0, 1, 1)


def test_nodes_follow_from_torchruns_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Ranks.from_environment().num_nodes == 2


def test_the_cpu_may_run_several_processes() -> None:
    assert count_devices(2, "cpu") == 2
    assert count_devices("auto", "cpu") == 1


def test_more_processes_than_the_machine_has_cpus_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.devices=9999 but this machine has"):
        count_devices(9999, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_accelerator_is_named_with_those_there() -> None:
    with pytest.raises(ValueError, match=r"cuda is not on this machine; choose from auto"):
        resolve_device("cuda")


def test_an_unknown_accelerator_is_refused() -> None:
    with pytest.raises(ValueError, match="tpu is not on this machine"):
        resolve_device("tpu")


def test_ranks_of_one_machine_meet_without_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[Any] = []

    def capture(config: Any, entrypoint: str) -> Any:
        configs.append(config)
        return lambda *arguments: None

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", capture)
    assert launch_ranks(2, []) == 0
    assert configs[0].local_addr == "127.0.0.1"
    assert configs[0].rdzv_endpoint == "127.0.0.1:0"


def test_alone_rank_zero_decides_at_once() -> None:
    assert on_rank_zero(lambda: 3) == 3


@pytest.mark.parametrize("code", [1, 2])
def test_ranks_that_fail_end_the_command_with_their_code(
    code: int,
    main: Callable[..., int],
    tiny_run: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nanogpt.training.launch.launch_ranks", lambda n, arguments: code)
    assert main(*tiny_run, "trainer.devices=2") == code


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for the ranks")
def test_dollar_signs_of_arguments_reach_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, written = tmp_path / "python", tmp_path / "arguments"
    script.write_text(f'#!/bin/sh\necho "$@" > {written}\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert launch_ranks(1, ["--separator", "$$", "${local_rank}"]) == 0
    assert written.read_text() == "-u --separator $$ ${local_rank}\n"
