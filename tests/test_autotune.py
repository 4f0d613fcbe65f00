"""What `auto` becomes, from measurements that are given, and how they are taken and stored."""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from nanogpt import GPTConfig
from nanogpt.ranks import Ranks
from nanogpt.training import autotune
from nanogpt.training.autotune import Measured, Settings, Trial, Trials
from nanogpt.training.memory import step_memory

CPU, GPU, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
TINY = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16)
GIVEN: dict[str, Any] = {
    "precision": "32-true",
    "compile": False,
    "micro_batch": 4,
    "threads": 1,
    "activation_checkpointing": True,
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "MEASURE_S", 0.02)
    monkeypatch.setattr(autotune, "PRODUCT_S", 0.02)


class Given(Trials):
    """Trials with given results, for devices that are not here."""

    def __init__(
        self,
        device: torch.device = CPU,
        config: GPTConfig = TINY,
        rows_per_rank: int = 16,
        seconds: dict[Trial, float] | None = None,
        peaks: dict[str, float] | None = None,
    ) -> None:
        self.device, self.config, self.rows_per_rank = device, config, rows_per_rank
        self.local_world_size, self.shape, self.recompute = 1, "", False
        self.seconds = seconds or {}
        self.peaks = peaks or {"32-true": 1e11, "bf16-mixed": 3e11}

    def rate(self, precision: str) -> float:
        return self.peaks[precision]

    def time(self, trials: Collection[Trial]) -> dict[Trial, float]:
        return {trial: self.seconds[trial] for trial in trials if trial in self.seconds}


def decide(
    data_dir: Path, shape: GPTConfig = TINY, rows_per_rank: int = 16, **values: Any
) -> Settings:
    trainer = {"precision": values.pop("precision", "auto"), "deterministic": False}
    keys = ("activation_checkpointing", "compile", "micro_batch", "threads")
    auto = dict.fromkeys(keys, "auto")
    config = {"trainer": trainer, "remeasure": False, "data_dir": data_dir}
    config |= {"tokens_per_step": rows_per_rank * shape.block_size}
    run: Any = SimpleNamespace(config=config | auto | values, recorded={}, ranks=Ranks())
    run.max_steps = 100
    return autotune.autotune(run, shape, CPU)


def test_every_auto_is_decided_and_explained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "nanogpt"):
        decisions = decide(tmp_path)
    assert decisions.precision in ("32-true", "bf16-mixed")
    assert 16 % decisions.micro_batch == 0
    assert decisions.threads >= 1
    assert decisions.compile is False  # 100 steps of milliseconds
    assert decisions.peak_flops > 1e9
    named = [reason.split()[0] for reason in caplog.messages]
    settings = ["activation_checkpointing", "micro_batch", "compile", "peak"]
    assert named[:6] == ["threads", "precision", *settings]
    assert named[-1] == "tokens_per_step"


def test_second_call_measures_nothing_and_decides_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_agree(monkeypatch)
    first = decide(tmp_path, threads=1)

    def fail(*args: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(Trials, "_in_turn", fail)
    assert decide(tmp_path, threads=1) == first


def test_a_choice_without_agreement_is_provisional_and_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(autotune, "AGREEMENT", 0.0)  # nothing agrees
    with caplog.at_level(logging.INFO, "nanogpt"):
        decide(tmp_path, threads=1, precision="32-true")
    assert "provisional: the rounds" in caplog.text
    caplog.clear()
    all_agree(monkeypatch)
    with caplog.at_level(logging.INFO, "nanogpt"):
        decide(tmp_path, threads=1, precision="32-true")
    assert "provisional" not in caplog.text
    stored = json.loads((tmp_path / "probes.json").read_text())
    assert {record["provisional"] for record in stored.values()} == {False}


def test_remeasure_measures_everything_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_agree(monkeypatch)
    decide(tmp_path, threads=1)
    before = (tmp_path / "probes.json").read_text()
    monkeypatch.setattr(Trials, "_in_turn", lambda self, trials, _: double(trials))
    decisions = decide(tmp_path, threads=1, remeasure=True)
    assert decisions.peak_flops == 2 * 1024**3 / 2.0
    assert (tmp_path / "probes.json").read_text() != before


def all_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "AGREEMENT", float("inf"))
    monkeypatch.setattr(autotune, "MIN_CPU_SHARE", 0.0)


def double(trials: dict[str, Any]) -> Measured:
    return Measured(dict.fromkeys(trials, 2.0), False)


def test_given_values_are_taken_without_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(autotune, "GPT", None)
    with caplog.at_level(logging.INFO, "nanogpt"):
        decisions = decide(tmp_path, **GIVEN)
    assert {key: getattr(decisions, key) for key in GIVEN} == GIVEN
    assert "precision 32-true: as given" in caplog.messages


def test_large_model_is_not_built_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "GPT", None)
    large = GPTConfig.preset("gpt2-xl")
    assert decide(tmp_path, large, rows_per_rank=512, threads=1).micro_batch == 1


@pytest.mark.parametrize(
    ("bf16_s", "choice"), [(0.5, "bf16-mixed"), (0.86, "bf16-mixed"), (0.88, "32-true")]
)
def test_bfloat16_must_be_worth_its_rounding(
    monkeypatch: pytest.MonkeyPatch, bf16_s: float, choice: str
) -> None:
    monkeypatch.setattr(autotune, "has_slow_bf16", lambda: False)
    measured = Given(seconds={(16, "32-true"): 1.0, (16, "bf16-mixed"): bf16_s})
    assert autotune.choose_precision(measured)[0] == choice


def test_cpu_with_slow_bfloat16_products_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "has_slow_bf16", lambda: False)
    measured = Given(peaks={"32-true": 1e11, "bf16-mixed": 0.2e11})
    choice, why = autotune.choose_precision(measured)
    assert choice == "32-true"
    assert why == "matrix products in bfloat16 run 0.20 times as fast"


def test_mps_trains_in_float32() -> None:
    assert autotune.choose_precision(Given(MPS))[0] == "32-true"


def test_fastest_micro_batch_wins() -> None:
    config = dataclasses.replace(TINY, block_size=128)  # 512 tokens are 4 rows
    measured = Given(config=config, seconds={(16, "32-true"): 1.6, (4, "32-true"): 0.3})
    choice, why = autotune._choose_micro_batch(measured, "32-true")
    assert choice == 4
    assert why == "the fastest of 4, 16 (1,707 tokens/s without the optimizer)"


def test_larger_micro_batch_wins_where_nearly_as_fast() -> None:
    config = dataclasses.replace(TINY, block_size=128)
    measured = Given(config=config, seconds={(16, "32-true"): 1.22, (4, "32-true"): 0.3})
    assert autotune._choose_micro_batch(measured, "32-true")[0] == 16


def test_gpu_tries_the_divisors_below_powers_of_two() -> None:
    config = GPTConfig.preset("gpt2")
    assert Given(GPU, config, 480).candidates() == [1, 2, 4, 8, 16, 32, 60]
    assert Given(GPU, config, 12).candidates() == [1, 2, 4, 6, 12]


def test_gpu_takes_one_row_where_nothing_fits() -> None:
    choice, why = autotune._choose_micro_batch(Given(GPU), "bf16-mixed")
    assert choice == 1
    assert why == "the memory is too small even for this"


@pytest.mark.parametrize(
    ("seconds", "given", "choice", "why"),
    [
        ({(1, "bf16-mixed"): 1.0}, "auto", False, "a row fits in memory without it"),
        ({}, "auto", True, "a row does not fit in memory without it"),
        ({}, 4, False, "micro_batch is given"),
    ],
)
def test_activations_are_recomputed_where_the_gpu_has_no_room_for_those_of_a_row(
    seconds: dict[Trial, float], given: Any, choice: bool, why: str
) -> None:
    measured = Given(GPU, seconds=seconds)
    assert autotune._choose_recompute(measured, "bf16-mixed", given) == (choice, why)


def test_activations_are_recomputed_where_a_cpu_has_no_room_for_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = step_memory(TINY, 1)
    for missing, choice in ((0, False), (1, True)):
        memory = 4 * row.weights + row.activations + row.logits - missing
        monkeypatch.setattr(autotune, "usable_memory_bytes", lambda memory=memory: memory)
        assert autotune._choose_recompute(Given(), "32-true", "auto")[0] is choice


def test_micro_batches_are_timed_with_the_recomputation(tmp_path: Path) -> None:
    trials = stored_in(tmp_path)
    for trials.recompute in (False, True):
        trials.time([(4, "32-true")])
    without, timed = json.loads((tmp_path / "probes.json").read_text())
    assert timed == f"{without}, activation checkpointing"


def test_micro_batches_of_a_cpu_fit_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(TINY, block_size=128)
    monkeypatch.setattr(autotune, "usable_memory_bytes", lambda: 2**60)
    assert Given(config=config, rows_per_rank=64).candidates() == [4, 16, 64]
    row = step_memory(config, 1)
    row_bytes = row.activations + row.logits
    monkeypatch.setattr(autotune, "usable_memory_bytes", lambda: 4 * 16 * row_bytes)
    assert Given(config=config, rows_per_rank=64).candidates() == [4, 16]
    monkeypatch.setattr(autotune, "usable_memory_bytes", lambda: 1)
    assert Given(config=config, rows_per_rank=64).candidates() == [1]


def a_second() -> Given:
    return Given(seconds={(4, "32-true"): 0.25})  # a second per step: 12 % of 333 s are 40 s


@pytest.mark.parametrize(
    ("max_steps", "compiled_s", "choice", "why"),
    [
        (300, 0.0, False, "36 s of the run and take 40 s"),  # without a measurement
        (400, 0.05, True, "80 s of the run and take 24 s"),  # 400 steps x 4 x 2 layers x 0.025 s
        (400, 0.07, False, "16 s of the run and take 24 s"),
    ],
)
def test_compile_only_where_a_compiled_block_saves_more_than_it_takes(
    monkeypatch: pytest.MonkeyPatch, max_steps: int, compiled_s: float, choice: bool, why: str
) -> None:
    trials = a_second()
    block = {"eager": 0.075, "compiled": compiled_s, "compilation": 12.0}
    monkeypatch.setattr(trials, "recall", lambda what, measure: block)
    decision = autotune._choose_compile(trials, "32-true", 4, max_steps, False)
    assert decision == (choice, f"would save about {why}")


def test_a_block_is_timed_eager_and_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    seconds = stored_in(tmp_path)._measure_block(4, "bf16-mixed").seconds
    assert set(seconds) == {"eager", "compiled", "compilation"}


def test_compile_stays_off_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nin a trace")

    monkeypatch.setattr(torch, "compile", fail)
    trials = a_second()
    trials.known, trials.scope = {}, ""
    decision = autotune._choose_compile(trials, "32-true", 4, 10**9, False)
    assert decision == (False, "it fails on this machine (No working C++ compiler found)")


@pytest.mark.parametrize(
    ("device", "deterministic", "why"),
    [
        (MPS, False, "its gain on mps is not known"),
        (GPU, True, "its kernels are chosen by timing, and trainer.deterministic is set"),
    ],
)
def test_compile_stays_off_where_it_cannot_help(
    device: torch.device, deterministic: bool, why: str
) -> None:
    decision = autotune._choose_compile(Given(device), "32-true", 4, 10**9, deterministic)
    assert decision == (False, why)


@pytest.mark.parametrize(("ranks", "threads"), [(1, 6), (2, 3), (4, 1), (16, 1)])
def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch, ranks: int, threads: int) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(autotune, "usable_cores", lambda: 6)
    assert autotune.choose_threads(ranks)[0] == threads


def test_omp_num_threads_sets_the_threads_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setattr(autotune, "usable_cores", lambda: 8)
    assert autotune.choose_threads(1) == (5, "OMP_NUM_THREADS")
    assert autotune.choose_threads(2)[0] == 4


def test_cublas_is_deterministic_before_the_first_product_is_timed(
    main: Callable[..., int], tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen: list[str | None] = []

    def measure(*_: Any) -> Measured:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        raise ValueError("measured")

    monkeypatch.setattr(Trials, "_in_turn", measure)
    main(*tiny_run, "trainer.deterministic=true")
    assert seen == [":4096:8"]


# Passes


def stored_in(data_dir: Path, scope: str = "here", remeasure: bool = False) -> Trials:
    config = {"data_dir": data_dir, "remeasure": remeasure, "tokens_per_step": 8 * TINY.block_size}
    config |= {"activation_checkpointing": False}
    trials = Trials(config | {"trainer": {"deterministic": False}}, Ranks(), TINY, CPU)
    trials.scope = scope
    return trials


@pytest.fixture
def tiny_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trials:
    monkeypatch.setattr(autotune, "MEASURE_S", 0.02)
    return stored_in(tmp_path)


def test_rows_are_timed_in_seconds(tiny_trials: Trials) -> None:
    timings = tiny_trials.time([(1, "32-true"), (8, "32-true")])
    assert set(timings) == {(1, "32-true"), (8, "32-true")}
    assert all(0 < seconds < 1 for seconds in timings.values())


def test_precisions_are_timed_in_seconds(tiny_trials: Trials) -> None:
    both = [(2, "32-true"), (2, "bf16-mixed")]
    assert list(tiny_trials.time(both)) == both


def without_a_gpu(tiny_trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trials take the path of a GPU."""
    monkeypatch.setattr(tiny_trials, "device", torch.device("cuda"))
    monkeypatch.setattr(autotune, "GPT", MagicMock())
    monkeypatch.setattr(tiny_trials, "_memory_reserve", lambda model: None)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_rows_grow_until_memory_is_full(
    error: RuntimeError, tiny_trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward_backward(model: object, rows: int, *args: object) -> None:
        if rows > 4:
            raise error

    without_a_gpu(tiny_trials, monkeypatch)
    monkeypatch.setattr(autotune, "run_pass", forward_backward)
    shapes = {(rows, "bf16-mixed"): str(rows) for rows in (1, 2, 4, 8, 16)}
    assert list(tiny_trials._measure(shapes).seconds) == ["1", "2", "4"]
    assert tiny_trials._measure({(8, "bf16-mixed"): "8"}) == Measured({}, True)


def test_other_errors_of_a_trial_are_not_swallowed(
    tiny_trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward_backward(model: object, rows: int, *args: object) -> None:
        raise RuntimeError("a broken kernel")

    without_a_gpu(tiny_trials, monkeypatch)
    monkeypatch.setattr(autotune, "run_pass", forward_backward)
    with pytest.raises(RuntimeError, match="a broken kernel"):
        tiny_trials._measure({(1, "bf16-mixed"): "1"})


def test_the_rate_of_products_is_measured(
    tiny_trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 1e9 < tiny_trials.rate("32-true") < 1e14
    clock = iter(range(1000))
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: next(clock) * 0.02)
    tiny_trials.known.clear()
    assert tiny_trials.rate("32-true") == pytest.approx(2 * 1024**3 / 0.02)


# Rounds


class Clock:
    """A clock that trials put forward, for a thread that has a share of a processor."""

    def __init__(self, cpu_share: float = 1.0) -> None:
        self.now, self.cpu_share = 0.0, cpu_share

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.now * self.cpu_share

    def trial(self, *seconds: float) -> Callable[[], None]:
        """Return a trial that takes these seconds, one after another, then always the last."""
        left = list(seconds)

        def take() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return take


def in_turn(
    tiny_trials: Trials,
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
    budget_s: float,
    *seconds: list[float],
) -> Measured:
    monkeypatch.setattr(autotune, "time", clock)
    rivals = {name: clock.trial(*some) for name, some in zip("abc", seconds, strict=False)}
    return tiny_trials._in_turn(rivals, budget_s)


def test_rivals_take_turns_and_the_best_of_each_counts(
    tiny_trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, order = Clock(), []
    monkeypatch.setattr(autotune, "time", clock)

    def noting(name: str, trial: Callable[[], None]) -> Callable[[], None]:
        return lambda: order.append(name) or trial()  # type: ignore[func-returns-value]

    rivals = {"a": noting("a", clock.trial(3, 1, 1)), "b": noting("b", clock.trial(2, 2, 4))}
    assert tiny_trials._in_turn(rivals, 0.0) == Measured({"a": 1, "b": 2}, False)
    assert order == ["a", "b"] * 3


def test_rounds_go_on_for_the_time_that_there_is(
    tiny_trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    in_turn(tiny_trials, monkeypatch, clock, 10.0, [0.75], [0.25])
    assert clock.now == 10


@pytest.mark.parametrize(
    ("seconds", "cpu_share", "provisional"),
    [
        ([1.0, 1.0, 1.0], 1.0, False),
        ([3.0, 1.05, 1.0], 1.0, False),  # warming up, and then twice the same
        ([3.0, 2.0, 1.0], 1.0, True),
        ([1.0, 1.2, 1.2], 1.0, True),
        ([1.0, 1.0, 1.0], 0.9, False),
        ([2.0, 2.0, 2.0], 0.5, True),  # always the same, while another program runs
    ],
)
def test_what_the_rounds_disagree_on_is_provisional(
    seconds: list[float],
    cpu_share: float,
    provisional: bool,
    tiny_trials: Trials,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(cpu_share)
    found = in_turn(tiny_trials, monkeypatch, clock, 0.0, [1.0], seconds)
    assert found.provisional is provisional


# The file


def fail() -> Measured:
    raise AssertionError("measured again")


def sure(seconds: float) -> Measured:
    return Measured({"a": seconds}, False)


def record(seconds: dict[str, Any]) -> dict[str, Any]:
    """Return what the file holds of reliable measurements."""
    return {"seconds": seconds, "provisional": False}


RECORD = record({"a": 1.0})
NO_SECONDS: list[Any] = ["fast", -1.0, 0.0, True, 10**400, float("nan"), float("inf"), [], {}]


def test_measurement_is_taken_once(tmp_path: Path) -> None:
    data_dir = tmp_path / "new"
    assert stored_in(data_dir).recall("key", lambda: sure(1.5)) == {"a": 1.5}
    assert stored_in(data_dir).recall("key", fail) == {"a": 1.5}
    assert [p.name for p in data_dir.iterdir()] == ["probes.json"]


def test_what_is_provisional_is_measured_again_by_the_next_run(tmp_path: Path) -> None:
    first = stored_in(tmp_path)
    assert first.recall("key", lambda: Measured({"a": 9.0}, True)) == {"a": 9.0}
    assert first.recall("key", fail) == {"a": 9.0}
    assert first.provisional
    second = stored_in(tmp_path)
    assert second.recall("key", lambda: sure(1.0)) == {"a": 1.0}
    assert not second.provisional
    assert stored_in(tmp_path).recall("key", fail) == {"a": 1.0}


def test_remeasuring_reads_nothing_and_replaces_what_was_stored(tmp_path: Path) -> None:
    stored_in(tmp_path).recall("key", lambda: sure(9.0))
    anew = stored_in(tmp_path, remeasure=True)
    assert anew.recall("key", lambda: sure(1.0)) == {"a": 1.0}
    assert anew.recall("key", fail) == {"a": 1.0}
    assert stored_in(tmp_path).recall("key", fail) == {"a": 1.0}


def test_another_machine_measures_for_itself(tmp_path: Path) -> None:
    stored_in(tmp_path).recall("key", lambda: sure(1.0))
    assert stored_in(tmp_path, "there").recall("key", lambda: sure(2.0)) == {"a": 2.0}
    assert stored_in(tmp_path).recall("key", fail) == {"a": 1.0}


def test_what_another_process_stored_meanwhile_stays(tmp_path: Path) -> None:
    def measure() -> Measured:
        stored_in(tmp_path).recall("theirs", lambda: sure(1.0))
        return sure(2.0)

    stored_in(tmp_path).recall("ours", measure)
    assert json.loads((tmp_path / "probes.json").read_text()) == {
        "here: theirs": RECORD,
        "here: ours": record({"a": 2.0}),
    }


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"here: key"',
        "[1, 2]",
        "[" * 100_000,
        '{"here": 1}',
        '{"here: key": ' * 50_000,
        "\xff\xfe",
        json.dumps({"here": {"key": record({"a": 1.0})}}),  # as earlier versions stored it
        json.dumps({"here: key": {**record({"a": 1.0}), "provisional": "no"}}),
        json.dumps({"here: key": {"seconds": {"a": 1.0}}}),
        *(json.dumps({"here: key": record({"a": value})}) for value in NO_SECONDS),
    ],
    ids=range(19),
)
def test_damaged_file_is_measured_again_and_rewritten(tmp_path: Path, content: str) -> None:
    path = tmp_path / "probes.json"
    path.write_bytes(content.encode("latin-1"))
    assert stored_in(tmp_path).recall("key", lambda: sure(1.0)) == {"a": 1.0}
    assert json.loads(path.read_text()) == {"here: key": RECORD}


def test_measurement_that_cannot_be_stored_is_used_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    measurements = stored_in(tmp_path / "file")
    assert measurements.recall("key", lambda: sure(1.0)) == {"a": 1.0}
    assert "cannot be written" in caplog.text


def test_a_processor_without_products_in_bfloat16_times_none(
    monkeypatch: pytest.MonkeyPatch, tiny_trials: Trials
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(Trials, "recall", MagicMock(side_effect=AssertionError))
    assert autotune.choose_precision(tiny_trials)[0] == "32-true"
