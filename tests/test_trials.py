"""Timings of a shape, and the file that keeps them."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from nanogpt import GPTConfig
from nanogpt.training import trials
from nanogpt.training.trials import Measured, Measurements, Trials, isolated_measurement

CPU = torch.device("cpu")
TINY = GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def tiny_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trials:
    monkeypatch.setattr(trials, "MEASURE_S", 0.02)
    return Trials(TINY, CPU, rows_per_rank=8, threads=1, local_world_size=1, data_dir=tmp_path)


def fail() -> Measured:
    raise AssertionError("measured again")


def sure(seconds: float) -> Measured:
    return Measured({"a": seconds}, False)


def record(seconds: dict[str, Any]) -> dict[str, Any]:
    """Return what the file holds of reliable measurements."""
    return {"seconds": seconds, "provisional": False}


RECORD = record({"a": 1.0})
NO_SECONDS: list[Any] = ["fast", -1.0, 0.0, True, 10**400, float("nan"), float("inf"), [], {}]


def test_rows_are_timed_in_seconds(tiny_trials: Trials) -> None:
    timings = tiny_trials.time({"1": (1, "32-true"), "8": (8, "32-true")})
    assert set(timings) == {"1", "8"}
    assert all(0 < seconds < 1 for seconds in timings.values())


def test_precisions_are_timed_in_seconds(tiny_trials: Trials) -> None:
    both = ("32-true", "bf16-mixed")
    assert tiny_trials.time({name: (2, name) for name in both}).keys() == set(both)


def without_a_gpu(tiny_trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trials take the path of a GPU."""
    monkeypatch.setattr(tiny_trials, "device", torch.device("cuda"))
    monkeypatch.setattr(trials, "GPT", MagicMock())
    monkeypatch.setattr(tiny_trials, "_memory_reserve", lambda model: None)


def test_rows_grow_until_memory_is_full(
    tiny_trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(model: object, rows: int, precision: str) -> float:
        if rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return float(rows)

    without_a_gpu(tiny_trials, monkeypatch)
    monkeypatch.setattr(tiny_trials, "_seconds", seconds)
    shapes = {str(rows): (rows, "bf16-mixed") for rows in (1, 2, 4, 8, 16)}
    assert tiny_trials._measure(shapes).seconds == {"1": 1.0, "2": 2.0, "4": 4.0}


def test_other_errors_of_a_trial_are_not_swallowed(
    tiny_trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(model: object, rows: int, precision: str) -> float:
        raise RuntimeError("a broken kernel")

    without_a_gpu(tiny_trials, monkeypatch)
    monkeypatch.setattr(tiny_trials, "_seconds", seconds)
    with pytest.raises(RuntimeError, match="a broken kernel"):
        tiny_trials._measure({"1": (1, "bf16-mixed")})


def test_measuring_leaves_threads_and_random_state() -> None:
    n_threads, state = torch.get_num_threads(), torch.get_rng_state()
    with contextlib.suppress(KeyError), isolated_measurement(CPU, n_threads + 1):
        assert torch.get_num_threads() == n_threads + 1
        torch.rand(3)
        raise KeyError
    assert torch.get_num_threads() == n_threads
    assert torch.equal(torch.get_rng_state(), state)


# Rounds


class Clock:
    """A clock that trials put forward, for a thread that has a share of a processor."""

    def __init__(self, cpu_share: float = 1.0) -> None:
        self.now, self.cpu_share = 0.0, cpu_share

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.now * self.cpu_share

    def trial(self, *seconds: float) -> Callable[[], float]:
        """Return a trial that takes these seconds, one after another, then always the last."""
        left = list(seconds)

        def take() -> float:
            taken = left.pop(0) if len(left) > 1 else left[0]
            self.now += taken
            return taken

        return take


def in_turn(
    tiny_trials: Trials, monkeypatch: pytest.MonkeyPatch, clock: Clock, *seconds: list[float]
) -> Measured:
    monkeypatch.setattr(trials, "time", clock)
    rivals = {name: clock.trial(*some) for name, some in zip("abc", seconds, strict=False)}
    return tiny_trials._in_turn(rivals, 10.0)


def test_rivals_take_turns_and_the_best_of_each_counts(
    tiny_trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, order = Clock(), []
    monkeypatch.setattr(trials, "time", clock)

    def noting(name: str, trial: Callable[[], float]) -> Callable[[], float]:
        return lambda: order.append(name) or trial()  # type: ignore[func-returns-value]

    rivals = {"a": noting("a", clock.trial(3, 1, 1)), "b": noting("b", clock.trial(2, 2, 4))}
    assert tiny_trials._in_turn(rivals, 0.0) == Measured({"a": 1, "b": 2}, False)
    assert order == ["a", "b"] * 3


def test_rounds_go_on_for_the_time_that_there_is(
    tiny_trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    in_turn(tiny_trials, monkeypatch, clock, [0.75], [0.25])
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
    monkeypatch.setattr(trials, "MAX_ROUNDS", 3)
    clock = Clock(cpu_share)
    assert in_turn(tiny_trials, monkeypatch, clock, [1.0], seconds).provisional is provisional


# The file


def test_measurement_is_taken_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "probes.json"
    assert Measurements(path, "here").recall("key", lambda: sure(1.5)) == {"a": 1.5}
    assert Measurements(path, "here").recall("key", fail) == {"a": 1.5}
    assert [p.name for p in path.parent.iterdir()] == ["probes.json"]


def test_what_is_provisional_is_measured_again_by_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "probes.json"
    first = Measurements(path, "here")
    assert first.recall("key", lambda: Measured({"a": 9.0}, True)) == {"a": 9.0}
    assert first.recall("key", fail) == {"a": 9.0}
    assert first.provisional
    second = Measurements(path, "here")
    assert second.recall("key", lambda: sure(1.0)) == {"a": 1.0}
    assert not second.provisional
    assert Measurements(path, "here").recall("key", fail) == {"a": 1.0}


def test_remeasuring_reads_nothing_and_replaces_what_was_stored(tmp_path: Path) -> None:
    path = tmp_path / "probes.json"
    Measurements(path, "here").recall("key", lambda: sure(9.0))
    anew = Measurements(path, "here", remeasure=True)
    assert anew.recall("key", lambda: sure(1.0)) == {"a": 1.0}
    assert anew.recall("key", fail) == {"a": 1.0}
    assert Measurements(path, "here").recall("key", fail) == {"a": 1.0}


def test_another_machine_measures_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "probes.json"
    Measurements(path, "here").recall("key", lambda: sure(1.0))
    assert Measurements(path, "there").recall("key", lambda: sure(2.0)) == {"a": 2.0}
    assert Measurements(path, "here").recall("key", fail) == {"a": 1.0}


def test_what_another_process_stored_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "probes.json"

    def measure() -> Measured:
        Measurements(path, "here").recall("theirs", lambda: sure(1.0))
        return sure(2.0)

    Measurements(path, "here").recall("ours", measure)
    assert json.loads(path.read_text()) == {"here": {"theirs": RECORD, "ours": record({"a": 2.0})}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"here": {"key"',
        "[1, 2]",
        "[" * 100_000,
        '{"here": 1}',
        '{"here": {"key": ' * 50_000,
        "\xff\xfe",
        json.dumps({"here": {"key": {"a": 1.0}}}),  # as earlier versions stored it
        json.dumps({"here": {"key": record({})}}),
        json.dumps({"here": {"key": record({"b": 1.0})}}),
        json.dumps({"here": {"key": {**record({"a": 1.0}), "provisional": "no"}}}),
        json.dumps({"here": {"key": {"seconds": {"a": 1.0}}}}),
        *(json.dumps({"here": {"key": record({"a": value})}}) for value in NO_SECONDS),
    ],
    ids=range(21),
)
def test_damaged_file_is_measured_again_and_rewritten(tmp_path: Path, content: str) -> None:
    path = tmp_path / "probes.json"
    path.write_bytes(content.encode("latin-1"))
    assert Measurements(path, "here").recall("key", lambda: sure(1.0), ["a"]) == {"a": 1.0}
    assert json.loads(path.read_text()) == {"here": {"key": RECORD}}


def test_measurement_that_cannot_be_stored_is_used_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    measurements = Measurements(tmp_path / "file" / "probes.json", "here")
    assert measurements.recall("key", lambda: sure(1.0)) == {"a": 1.0}
    assert "cannot be written" in caplog.text
