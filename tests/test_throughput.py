"""Arithmetic per token against published numbers, and the peak against what is measured."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanogpt import GPT, GPTConfig
from nanogpt.training.module import StageModule
from nanogpt.training.throughput import flops_per_token, peak_flops

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)  # named, never used


@pytest.mark.parametrize(
    ("preset", "gflops"),
    [("gpt2", 0.855), ("gpt2-medium", 2.42), ("gpt2-large", 5.20), ("gpt2-xl", 10.27)],
)
def test_flops_per_token_are_the_known_ones_of_gpt2(preset: str, gflops: float) -> None:
    assert flops_per_token(GPTConfig.preset(preset)) / 1e9 == pytest.approx(gflops, abs=5e-3)


def test_flops_count_every_matrix_but_the_position_table() -> None:
    config = GPTConfig(block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=16)
    n_matmul = sum(p.numel() for p in GPT(config).parameters() if p.ndim == 2) - 8 * 16
    assert flops_per_token(config) == 6 * n_matmul + 12 * 2 * 16 * 8


def test_mfu_divides_by_all_devices() -> None:
    # 40 % of an H100 is 463 thousand tokens per second for GPT-2 small.
    flops = flops_per_token(GPTConfig.preset("gpt2"))
    module: Any = SimpleNamespace(
        flops_per_token=flops, peak_flops=989.4e12, trainer=SimpleNamespace(world_size=8)
    )
    assert StageModule.mfu(module, 8 * 463e3) == pytest.approx(0.40, abs=2e-3)


def test_cpu_peak_is_measured() -> None:
    assert peak_flops(CPU, torch.float32, 1e11) == (1e11, "measured by a matrix product")


@pytest.mark.parametrize(
    ("name", "measured", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 270e12, 312e12),
        ("NVIDIA H100 80GB HBM3", 700e12, 989.4e12),
        ("NVIDIA H200", 700e12, 989.4e12),
        ("NVIDIA H100 NVL", 600e12, 835.5e12),
        ("NVIDIA L40S", 280e12, 280e12),
        ("NVIDIA GeForce RTX 4090", 160e12, 165.2e12),
        ("NVIDIA GeForce RTX 4080", 95e12, 95e12),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 35e12, 35e12),  # a seventh of the GPU
        ("NVIDIA of the future", 5e15, 5e15),
    ],
)
def test_the_peak_is_that_of_the_data_sheet_or_measured(
    monkeypatch: pytest.MonkeyPatch, name: str, measured: float, expected: float
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    value, source = peak_flops(GPU, torch.bfloat16, measured)
    assert value == pytest.approx(expected)
    assert source.startswith("measured" if value == measured else "data sheet")
