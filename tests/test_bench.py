"""Timings of a shape, and the file that keeps them."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

from nanogpt import GPTConfig
from nanogpt.training import bench
from nanogpt.training.bench import Bench, Measurements, undisturbed

CPU = torch.device("cpu")
TINY = GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def tiny_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(bench, "MEASURE_S", 0.02)
    return Bench(TINY, CPU, rows_per_rank=8, threads=1, local_world_size=1, data_dir=tmp_path)


def fail() -> dict[str, float]:
    raise AssertionError("measured again")


def test_rows_are_timed_in_seconds(tiny_bench: Bench) -> None:
    timings = tiny_bench.time_rows([1, 8], "32-true")
    assert set(timings) == {"1", "8"}
    assert all(0 < seconds < 1 for seconds in timings.values())


def test_precisions_are_timed_in_seconds(tiny_bench: Bench) -> None:
    assert set(tiny_bench.time_precisions(2)) == {"32-true", "bf16-mixed"}


def test_rows_grow_until_memory_is_full(tiny_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(model: object, rows: int, precision: str) -> float:
        if rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return float(rows)

    monkeypatch.setattr(tiny_bench, "_ballast", lambda model: None)
    monkeypatch.setattr(tiny_bench, "_seconds", seconds)
    trials = {str(rows): (rows, "bf16-mixed") for rows in (1, 2, 4, 8, 16)}
    assert tiny_bench._time_until_full(trials) == {"1": 1.0, "2": 2.0, "4": 4.0}


def test_other_errors_of_a_trial_are_not_swallowed(
    tiny_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(model: object, rows: int, precision: str) -> float:
        raise RuntimeError("a broken kernel")

    monkeypatch.setattr(tiny_bench, "_ballast", lambda model: None)
    monkeypatch.setattr(tiny_bench, "_seconds", seconds)
    with pytest.raises(RuntimeError, match="a broken kernel"):
        tiny_bench._time_until_full({"1": (1, "bf16-mixed")})


def test_measuring_leaves_threads_and_random_state() -> None:
    n_threads, state = torch.get_num_threads(), torch.get_rng_state()
    with contextlib.suppress(KeyError), undisturbed(CPU, n_threads + 1):
        assert torch.get_num_threads() == n_threads + 1
        torch.rand(3)
        raise KeyError
    assert torch.get_num_threads() == n_threads
    assert torch.equal(torch.get_rng_state(), state)


def test_measurement_is_taken_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "probes.json"
    assert Measurements(path, "here").recall("key", lambda: {"a": 1.5}) == {"a": 1.5}
    assert Measurements(path, "here").recall("key", fail) == {"a": 1.5}
    assert [p.name for p in path.parent.iterdir()] == ["probes.json"]


def test_another_machine_measures_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "probes.json"
    Measurements(path, "here").recall("key", lambda: {"a": 1.0})
    assert Measurements(path, "there").recall("key", lambda: {"a": 2.0}) == {"a": 2.0}
    assert Measurements(path, "here").recall("key", fail) == {"a": 1.0}


def test_what_another_process_kept_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "probes.json"

    def measure() -> dict[str, float]:
        Measurements(path, "here").recall("theirs", lambda: {"a": 1.0})
        return {"b": 2.0}

    Measurements(path, "here").recall("ours", measure)
    assert json.loads(path.read_text()) == {"here": {"theirs": {"a": 1.0}, "ours": {"b": 2.0}}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"here": {"key"',
        b"[1, 2]",
        b'{"here": 1}',
        b"\xff\xfe",
        b'{"here": {"key": {}}}',
        b'{"here": {"key": {"a": "fast"}}}',
        b'{"here": {"key": {"a": -1}}}',
    ],
)
def test_damaged_file_is_measured_again_and_rewritten(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "probes.json"
    path.write_bytes(content)
    assert Measurements(path, "here").recall("key", lambda: {"a": 1.0}) == {"a": 1.0}
    assert json.loads(path.read_text()) == {"here": {"key": {"a": 1.0}}}


def test_measurement_that_cannot_be_kept_is_used_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    measurements = Measurements(tmp_path / "file" / "probes.json", "here")
    assert measurements.recall("key", lambda: {"a": 1.0}) == {"a": 1.0}
    assert "cannot be written" in caplog.text
