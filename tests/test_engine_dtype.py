"""The precision that `dtype=auto` stands for on a CPU."""

import pytest
import torch

from serving.engine import native, runner

CPU = torch.device("cpu")


@pytest.mark.parametrize(("gain", "dtype"), [(0.8, "fp32"), (1.1, "fp32"), (1.3, "bf16")])
def test_bf16_is_chosen_where_its_kernels_are_faster(
    gain: float, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "bf16_gain", lambda: gain)
    assert runner.choose_dtype("auto", CPU) == dtype
    assert runner.choose_dtype("int8", CPU) == "int8"


def test_a_model_that_torch_computes_does_not_follow_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "bf16_gain", lambda: 3.0)
    monkeypatch.setattr(runner, "processor_flags", lambda: "avx2")
    assert runner.choose_dtype("auto", CPU, is_native=False) == "fp32"


@pytest.mark.parametrize(("flags", "dtype"), [("avx512f", "fp32"), ("avx512_bf16", "bf16")])
def test_without_kernels_the_processor_decides(
    flags: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "bf16_gain", lambda: None)
    monkeypatch.setattr(runner, "processor_flags", lambda: flags)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert runner.choose_dtype("auto", CPU) == dtype


def test_the_gain_of_bf16_is_measured_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    gain = native.bf16_gain()
    assert (gain is None) == (native.load_library() is None)
    assert gain is None or 0.2 < gain < 5
    monkeypatch.setattr(native, "load_library", lambda: None)
    assert native.bf16_gain.__wrapped__() is None
