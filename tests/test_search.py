"""The sweeper of hparams_search=optuna: its trials, with launchers that train nothing, and runs."""

import csv
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from hydra_plugins.nanogpt_optuna import OptunaSweeper, distribution
from tests.conftest import ROOT

optuna = pytest.importorskip("optuna", reason="pip install -e '.[sweep]'")
DISTRIBUTIONS = optuna.distributions
SAMPLER = {"_target_": "optuna.samplers.TPESampler", "seed": 7, "n_startup_trials": 3}
Jobs = list[dict[str, str]]


class Launcher:
    """A launcher whose jobs return (x - 3)^2, or whatever `results` has for their number."""

    def __init__(self, results: Mapping[int, Any]) -> None:
        self.results, self.jobs = results, Jobs()

    def launch(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        (words,) = jobs
        self.jobs.append(dict(word.split("=") for word in words))
        result = self.results.get(len(self.jobs), (float(self.jobs[-1]["x"]) - 3) ** 2)
        if isinstance(result, BaseException):
            raise result
        return [SimpleNamespace(return_value=result)]


def search(
    directory: Path, n_trials: int, results: Mapping[int, Any] | None = None, *more: str
) -> Jobs:
    """Search for x and y in this process; return the jobs that were launched."""
    sweeper = OptunaSweeper(n_trials, SAMPLER, {"x": "interval(0, 10)"})
    launcher: Any = Launcher(results or {})
    sweeper.loader, sweeper.directory, sweeper.launcher = None, directory, launcher
    with suppress(KeyboardInterrupt):
        sweeper.sweep(["y=a,b", "fixed=1", *more])
    return launcher.jobs


def rows(directory: Path) -> list[dict[str, str]]:
    with open(directory / "trials.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("interval(1e-3,0.1)", DISTRIBUTIONS.FloatDistribution(1e-3, 0.1)),
        ("tag(log,interval(1e-3,0.1))", DISTRIBUTIONS.FloatDistribution(1e-3, 0.1, log=True)),
        ("int(interval(1,8))", DISTRIBUTIONS.IntDistribution(1, 8)),
        ("range(2,9,3)", DISTRIBUTIONS.IntDistribution(2, 8, step=3)),
        ("range(0,0.35,0.1)", DISTRIBUTIONS.FloatDistribution(0, 0.3, step=0.1)),
        ("choice(a,2,true)", DISTRIBUTIONS.CategoricalDistribution(["a", "2", "True"])),
        ("16,32", DISTRIBUTIONS.CategoricalDistribution(["16", "32"])),
    ],
)
def test_hydras_sweep_syntax_gives_distributions(value: str, expected: Any) -> None:
    override = OverridesParser.create().parse_override(f"key={value}")
    assert distribution(override) == expected


@pytest.mark.parametrize("value", ["interval(3,1)", "range(3,1)", "tag(log,interval(0,1))"])
def test_an_empty_distribution_is_refused_with_its_key(value: str) -> None:
    override = OverridesParser.create().parse_override(f"key={value}")
    with pytest.raises(ValueError, match=r"^key=.*: .*low"):
        distribution(override)


def test_the_trials_approach_the_minimum(tmp_path: Path) -> None:
    jobs = search(tmp_path, 12)
    assert {job["y"] for job in jobs} == {"a", "b"}
    assert {job["fixed"] for job in jobs} == {"1"}
    assert abs(float(rows(tmp_path)[0]["params_x"]) - 3) < 1


def test_an_interrupted_search_has_the_trials_of_one_that_was_not(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", 4)
    first = search(tmp_path / "twice", 4, {2: KeyboardInterrupt()})
    second = search(tmp_path / "twice", 4, {2: KeyboardInterrupt()})
    third = search(tmp_path / "twice", 4)
    assert (first[-1], second[-1]) == (second[0], third[0])
    assert [*first[:-1], *second[:-1], *third] == whole
    assert rows(tmp_path / "twice") == rows(tmp_path / "whole")


def test_a_search_killed_while_a_trial_was_recorded_has_the_same_trials(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", 2)
    half = search(tmp_path / "half", 1)
    (study,) = optuna.get_all_study_names(storage := f"sqlite:///{tmp_path}/half/optuna.db")
    optuna.load_study(study_name=study, storage=storage).ask()  # without its parameters
    assert half + search(tmp_path / "half", 2) == whole


def test_more_trials_continue_a_search_and_another_search_begins_anew(tmp_path: Path) -> None:
    assert len(search(tmp_path, 1)) == 1
    assert len(search(tmp_path, 3)) == 2
    assert search(tmp_path, 3) == []
    assert len(search(tmp_path, 1, None, "fixed=2")) == 1
    assert len(search(tmp_path, 1, None, "data.path=other.txt")) == 1
    assert search(tmp_path, 1, None, "threads=2") == []


def test_a_failed_trial_is_no_finished_one(tmp_path: Path) -> None:
    assert len(search(tmp_path, 2, {1: math.nan})) == 3
    assert [row["state"] for row in rows(tmp_path)] == ["COMPLETE", "COMPLETE", "FAIL"]


def test_three_failures_in_a_row_end_a_search(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 trials in a row failed, 1 of 9 finished; correct"):
        search(tmp_path, 9, {1: math.nan, 3: math.nan, 4: math.nan, 5: math.nan})


def test_a_search_in_use_is_refused(tmp_path: Path) -> None:
    from nanogpt.runs.directory import lock_run

    with lock_run(tmp_path), pytest.raises(ValueError, match="in use by another process"):
        search(tmp_path, 1)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("hydra.sweeper.n_trials=0", "hydra.sweeper.n_trials=0 should be at least 1"),
        ("hydra.sweeper.params=null", "no parameter varies; pass one such as"),
        ("hydra.sweeper.sampler._target_=optuna.samplers.TPESample", "did you mean TPESampler"),
        ("hydra.sweeper.sampler=null", "hydra.sweeper.sampler has no _target_"),
    ],
)
def test_a_mistake_is_one_sentence(
    word: str, sentence: str, main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("-m", "hparams_search=optuna", word) == 2
    assert sentence in capsys.readouterr().err


def test_without_optuna_the_package_is_named(
    main: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main("-m", "hparams_search=optuna") == 2
    assert "needs Optuna; pip install -e '.[sweep]'" in capsys.readouterr().err


def test_a_killed_search_continues_the_run_of_its_trial(
    tiny_run: list[str], tmp_path: Path, main: Callable[..., int]
) -> None:
    words = ["-m", "hparams_search=optuna", "hydra.sweeper.n_trials=2", *tiny_run, "name=s"]
    slow = [*words, "callbacks.checkpoint.every_n_steps=1", "max_steps=24", "~callbacks.samples"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *slow], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not [*tmp_path.glob("runs/s/*/checkpoints/last.ckpt")]:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(*slow) == 0
    runs = sorted((tmp_path / "runs" / "s").glob("*/summary.json"))
    assert len(runs) == len(rows(tmp_path / "runs" / "s")) == 2
    logs = [(run.parent / "train.log").read_text(encoding="utf-8") for run in runs]
    assert sum("continuing at step" in log for log in logs) == 1
    assert (tmp_path / "runs" / "s" / "slice.svg").stat().st_size > 1000
