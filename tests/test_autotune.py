"""What `auto` becomes, from measurements that are given."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt import GPTConfig
from nanogpt.training import autotune, trials
from nanogpt.training.autotune import Settings
from nanogpt.training.trials import Measured, Trials

CPU, GPU, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
TINY = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16)
GIVEN: dict[str, Any] = {
    "precision": "32-true",
    "compile": False,
    "micro_batch": 4,
    "threads": 1,
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "MEASURE_S", 0.02)
    monkeypatch.setattr(trials, "PRODUCT_S", 0.02)


class Given(Trials):
    """Trials with given results, for devices that are not here."""

    def __init__(
        self,
        device: torch.device = CPU,
        config: GPTConfig = TINY,
        rows_per_rank: int = 16,
        precisions: dict[str, float] | None = None,
        rows: dict[str, float] | None = None,
        peaks: dict[str, float] | None = None,
    ) -> None:
        self.device, self.config, self.rows_per_rank = device, config, rows_per_rank
        self.local_world_size = 1
        self.precisions, self.rows = precisions or {}, rows or {}
        self.peaks = peaks or {"32-true": 1e11, "bf16-mixed": 3e11}

    def product_rates(self, precisions: Collection[str]) -> dict[str, float]:
        return {name: self.peaks[name] for name in precisions}

    def time(self, trials: Mapping[str, tuple[int, str]]) -> dict[str, float]:
        times = self.precisions | self.rows
        return {name: times[name] for name in trials if name in times}


def decide_tiny(data_dir: Path, **values: Any) -> Settings:
    return autotune.autotune(
        TINY, device=CPU, rows_per_rank=16, max_steps=100, data_dir=data_dir, **values
    )


def test_every_auto_is_decided_and_explained(tmp_path: Path) -> None:
    decisions = decide_tiny(tmp_path)
    assert decisions.precision in ("32-true", "bf16-mixed")
    assert 16 % decisions.micro_batch == 0
    assert decisions.threads >= 1
    assert decisions.compile is False  # 100 steps of milliseconds
    assert decisions.peak_flops > 1e9
    named = [reason.split()[0] for reason in decisions.reasons]
    assert named[:5] == ["precision", "micro_batch", "compile", "threads", "peak"]


def test_second_call_measures_nothing_and_decides_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_agree(monkeypatch)
    first = decide_tiny(tmp_path, threads=1)

    def fail(*args: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(Trials, "_in_turn", fail)
    assert decide_tiny(tmp_path, threads=1) == first


def test_a_choice_without_agreement_is_provisional_and_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "AGREEMENT", 0.0)  # nothing agrees
    assert (
        decide_tiny(tmp_path, threads=1, precision="32-true")
        .reasons[5]
        .startswith("provisional: the rounds")
    )
    all_agree(monkeypatch)
    assert len(decide_tiny(tmp_path, threads=1, precision="32-true").reasons) == 5
    stored = json.loads((tmp_path / "probes.json").read_text())
    records = [record for machine in stored.values() for record in machine.values()]
    assert {record["provisional"] for record in records} == {False}


def test_remeasure_measures_everything_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_agree(monkeypatch)
    decide_tiny(tmp_path, threads=1)
    before = (tmp_path / "probes.json").read_text()
    monkeypatch.setattr(Trials, "_in_turn", lambda self, trials, _: double(trials))
    decisions = decide_tiny(tmp_path, threads=1, remeasure=True)
    assert decisions.peak_flops == 1 / 2.0
    assert (tmp_path / "probes.json").read_text() != before


def all_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "AGREEMENT", float("inf"))
    monkeypatch.setattr(trials, "MIN_CPU_SHARE", 0.0)


def double(trials: dict[str, Any]) -> Measured:
    return Measured(dict.fromkeys(trials, 2.0), False)


def test_given_values_are_taken_without_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "GPT", None)
    decisions = decide_tiny(tmp_path, **GIVEN)
    assert {key: getattr(decisions, key) for key in GIVEN} == GIVEN
    assert decisions.reasons[0] == "precision 32-true: as given"


def test_deciding_leaves_the_random_state_and_threads(tmp_path: Path) -> None:
    n_threads, state = torch.get_num_threads(), torch.get_rng_state()
    decide_tiny(tmp_path, threads=1)
    assert torch.get_num_threads() == n_threads
    assert torch.equal(torch.get_rng_state(), state)


def test_large_model_is_not_built_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "GPT", None)
    config = GPTConfig.preset("gpt2-xl")
    decisions = autotune.autotune(
        config, device=CPU, rows_per_rank=512, max_steps=1000, data_dir=tmp_path, threads=1
    )
    assert decisions.micro_batch == 1


@pytest.mark.parametrize(
    ("bf16_s", "choice"), [(0.5, "bf16-mixed"), (0.86, "bf16-mixed"), (0.88, "32-true")]
)
def test_bfloat16_must_be_worth_its_rounding(bf16_s: float, choice: str) -> None:
    measured = Given(precisions={"32-true": 1.0, "bf16-mixed": bf16_s})
    assert autotune._choose_precision(measured)[0] == choice


def test_cpu_without_bfloat16_products_is_not_tried() -> None:
    measured = Given(peaks={"32-true": 1e11, "bf16-mixed": 0.2e11})
    choice, why = autotune._choose_precision(measured)
    assert choice == "32-true"
    assert why == "matrix products in bfloat16 run 0.20 times as fast"


@pytest.mark.parametrize(
    ("has_bf16", "capability", "choice"),
    [(True, (9, 0), "bf16-mixed"), (False, (7, 5), "16-mixed"), (False, (6, 1), "32-true")],
)
def test_gpu_precision_follows_its_generation(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, capability: tuple[int, int], choice: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert autotune._choose_precision(Given(GPU))[0] == choice


def test_mps_trains_in_float32() -> None:
    assert autotune._choose_precision(Given(MPS))[0] == "32-true"


def test_fastest_micro_batch_wins() -> None:
    config = dataclasses.replace(TINY, block_size=128)  # 512 tokens are 4 rows
    measured = Given(config=config, rows={"16": 1.6, "4": 0.3})
    choice, why = autotune._choose_micro_batch(measured, "32-true")
    assert choice == 4
    assert why == "the fastest of 4, 16 (1,707 tokens/s without the optimizer)"


def test_larger_micro_batch_wins_where_nearly_as_fast() -> None:
    config = dataclasses.replace(TINY, block_size=128)
    measured = Given(config=config, rows={"16": 1.22, "4": 0.3})
    assert autotune._choose_micro_batch(measured, "32-true")[0] == 16


def test_gpu_tries_divisors_by_doubling_up_to_a_bound() -> None:
    config = GPTConfig.preset("gpt2")
    assert autotune._candidates(Given(GPU, config, 480)) == [1, 2, 4, 8, 16, 32]
    assert autotune._candidates(Given(GPU, config, 12)) == [1, 2, 4, 12]


def test_gpu_takes_one_row_where_nothing_fits() -> None:
    choice, why = autotune._choose_micro_batch(Given(GPU), "bf16-mixed")
    assert choice == 1
    assert why == "the memory is too small even for this"


def test_micro_batches_of_a_cpu_fit_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(TINY, block_size=128)
    monkeypatch.setattr(autotune, "usable_memory_bytes", lambda: 2**60)
    assert autotune._candidates(Given(config=config, rows_per_rank=64)) == [4, 16, 64]
    row_bytes = 128 * autotune._bytes_per_token(config)
    monkeypatch.setattr(autotune, "usable_memory_bytes", lambda: 4 * 16 * row_bytes)
    assert autotune._candidates(Given(config=config, rows_per_rank=64)) == [4, 16]
    monkeypatch.setattr(autotune, "usable_memory_bytes", lambda: 1)
    assert autotune._candidates(Given(config=config, rows_per_rank=64)) == [1]


@pytest.mark.parametrize(("max_steps", "choice"), [(300, False), (400, True)])
def test_compile_only_where_it_saves_more_than_it_takes(
    monkeypatch: pytest.MonkeyPatch, max_steps: int, choice: bool
) -> None:
    monkeypatch.setattr(autotune, "missing_for_compile", lambda device: None)
    measured = Given(rows={"4": 0.25})  # a second per step: 12 % of 333 s are 40 s
    compiled, why = autotune._choose_compile(measured, "32-true", 4, max_steps, False)
    assert compiled is choice
    assert why == f"would save about {0.12 * max_steps:.0f} s of the run and take 40 s"


@pytest.mark.parametrize(
    ("device", "deterministic", "missing", "why"),
    [
        (MPS, False, None, "its gain on mps is not known"),
        (GPU, True, None, "its kernels are chosen by timing, and trainer.deterministic is set"),
        (GPU, False, "triton", "this machine lacks triton"),
    ],
)
def test_compile_stays_off_where_it_cannot_help(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    deterministic: bool,
    missing: str | None,
    why: str,
) -> None:
    monkeypatch.setattr(autotune, "missing_for_compile", lambda device: missing)
    decision = autotune._choose_compile(Given(device), "32-true", 4, 10**9, deterministic)
    assert decision == (False, why)


@pytest.mark.parametrize(("ranks", "threads"), [(1, 6), (2, 3), (4, 1), (16, 1)])
def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch, ranks: int, threads: int) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(autotune, "usable_cores", lambda: 6)
    assert autotune._choose_threads(ranks)[0] == threads


def test_omp_num_threads_sets_the_threads_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setattr(autotune, "usable_cores", lambda: 8)
    assert autotune._choose_threads(1) == (5, "OMP_NUM_THREADS")
    assert autotune._choose_threads(2)[0] == 4


def test_cublas_is_deterministic_before_the_first_product_is_timed(
    main: Callable[..., int], tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen: list[str | None] = []

    def measure(*_: Any, **__: Any) -> Settings:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        raise ValueError("measured")

    monkeypatch.setattr(autotune, "autotune", measure)
    main(*tiny_run, "trainer.deterministic=true")
    assert seen == [":4096:8"]
