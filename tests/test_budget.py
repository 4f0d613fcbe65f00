"""The depth dial, and a budget in minutes: chosen once, and kept wherever the run continues."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanogpt import plan
from nanogpt.runs.directory import read_config
from nanogpt.training import budget, module
from nanogpt.training.autotune import Timings, Trials
from nanogpt.training.recipe import MAX_PASSES, choices, step_tokens, tokens_of, with_choices

Main = Callable[..., int]


def config(**typed: Any) -> dict[str, Any]:
    """Return a configuration as far as the rules read it."""
    return {"typed": typed, "tokens_per_step": 2048, "model": {"block_size": 128}}


def at_speed(monkeypatch: pytest.MonkeyPatch, step_s: float, left_s: float = 10.0) -> None:
    timings = Timings(step_s, 0.0, 0.0, "given")
    monkeypatch.setattr(Trials, "step", lambda *_: timings)
    monkeypatch.setattr(Trials, "guess_s", lambda *_: step_s)
    monkeypatch.setattr(budget, "_left_s", lambda _: left_s)


def test_the_rules_by_hand() -> None:
    assert tokens_of(4) == 5 * 12 * 4 * 256**2
    assert step_tokens(2_048_000, 128) == 2048
    assert step_tokens(4 * 2_048_000, 128) == 4096  # 2048 x 4**0.38 = 3468, 27.1 rows
    assert step_tokens(10, 128) == 128


def test_the_anchor_keeps_its_values() -> None:
    chosen = choices(config(), 4, 1_228_800)
    assert chosen == {
        "model.n_layer": 4,
        "model.n_head": 4,
        "model.n_embd": 256,
        "tokens_per_step": 2048,
        "max_steps": 600,
        "max_tokens": None,
    }


def test_typed_values_win() -> None:
    typed = {"tokens_per_step": 2048, "model.n_head": 8, "max_tokens": 10_000}
    chosen = choices(config(**typed), 16, 2_048_000)
    assert chosen == {"model.n_layer": 16, "model.n_embd": 1024}


def test_choices_are_values_of_the_configuration() -> None:
    settled = with_choices(config(), {"model.n_layer": 2, "max_steps": 5})
    assert settled["model"] == {"block_size": 128, "n_layer": 2}
    assert settled["max_steps"] == 5
    assert settled["chosen"] == {"model.n_layer": 2, "max_steps": 5}


def test_a_depth_gives_the_run_its_shape(tiny_run: list[str], main: Main, tmp_path: Path) -> None:
    run = [word for word in tiny_run if not word.startswith(("model.n_", "tokens_per_step"))]
    run += ["model=auto", "depth=1", "max_steps=2"]
    assert main(*run) == 0
    found = read_config(tmp_path / "runs" / "tiny" / "config.yaml")
    assert [found["model"][key] for key in ("n_layer", "n_head", "n_embd")] == [1, 1, 64]
    assert found["tokens_per_step"] == found["chosen"]["tokens_per_step"] == 1024
    assert main(*run) == 0
    assert "already finished" in (tmp_path / "runs" / "tiny" / "train.log").read_text()


def test_steps_follow_a_typed_number_of_tokens(
    tiny_run: list[str], main: Main, tmp_path: Path
) -> None:
    run = [
        word for word in tiny_run if not word.startswith(("model.n_", "tokens_per_step", "max_"))
    ]
    assert main(*run, "model=auto", "depth=1", "max_tokens=500") == 0
    found = read_config(tmp_path / "runs" / "tiny" / "config.yaml")
    assert found["tokens_per_step"] == 128  # 2048 x (500 / 1,228,800)**0.38 = 106, 6.6 rows of 16
    assert json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())["steps"] == 4


@pytest.mark.parametrize("step_of_failure", [2, 7])  # before and after the steps are fixed
def test_minutes_become_steps_that_a_run_keeps(
    step_of_failure: int,
    tiny_run: list[str],
    main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = [word for word in tiny_run if not word.startswith("max_steps")]
    assert main(*run, "max_steps=17", "name=whole") == 0
    at_speed(monkeypatch, step_s=1.0)
    with monkeypatch.context() as failing:
        original = module.set_learning_rates
        calls: list[None] = []

        def step(*args: Any) -> None:
            calls.append(original(*args))
            if len(calls) == step_of_failure:
                raise OSError("the power failed")

        failing.setattr(module, "set_learning_rates", step)
        assert main(*run, "minutes=1") == 1
    at_speed(monkeypatch, step_s=0.1)  # another machine
    assert main(*run, "minutes=1") == 0  # 9 steps were estimated and up to 17 fit
    summaries = [
        json.loads((tmp_path / "runs" / name / "summary.json").read_text())
        for name in ("tiny", "whole")
    ]
    assert [summary["steps"] for summary in summaries] == [17, 17]
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]
    found = read_config(tmp_path / "runs" / "tiny" / "config.yaml")
    assert (found["minutes"], found["max_steps"]) == (1, 17)


def test_a_choice_outlives_a_kill_before_the_first_step(
    tiny_run: list[str], main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [*(word for word in tiny_run if not word.startswith("max_steps")), "minutes=1"]
    at_speed(monkeypatch, step_s=2.0)
    assert main(*run) == 0
    run_dir = tmp_path / "runs" / "tiny"
    for path in [*run_dir.glob("checkpoints/*"), run_dir / "metrics.csv", run_dir / "summary.json"]:
        path.unlink()
    at_speed(monkeypatch, step_s=0.1)
    assert main(*run) == 0
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 7
    assert main(*run, "resume=false", "overwrite=true", "max_steps=6") == 0
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 6  # the first reached


def test_other_minutes_are_another_run(
    tiny_run: list[str],
    main: Main,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = [word for word in tiny_run if not word.startswith("max_steps")]
    at_speed(monkeypatch, step_s=5.0)
    assert main(*run, "minutes=1") == 0
    assert main(*run, "minutes=2") == 1
    assert "(minutes: 1 is recorded, 2 is configured)" in capsys.readouterr().err


def test_the_depth_is_that_whose_tokens_fit(
    tiny_run: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def step(trials: Trials, *_: Any) -> Timings:
        tokens = trials.rows_per_rank * trials.config.block_size
        return Timings(1e-4 * tokens * trials.config.n_layer**3, 0.0, 0.0, "given")

    at_speed(monkeypatch, 1.0, left_s=1e-4 * 6**3 * tokens_of(6) * 1.1)
    monkeypatch.setattr(Trials, "step", step)
    run = [w for w in tiny_run if not w.startswith(("max_steps", "model.n_", "tokens_per_step"))]
    assert plan.main([*run, "model=auto", "minutes=1", "micro_batch=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["total"] == "6 layers"
    assert found["tokens"]["total"] == pytest.approx(1.1 * tokens_of(6), rel=0.05)


def test_minutes_end_with_the_passes_that_gain(
    tiny_run: list[str],
    main: Main,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = [word for word in tiny_run if not word.startswith("max_steps")]
    assert main(*run, "max_steps=1", "name=prepared") == 0
    at_speed(monkeypatch, step_s=1e-5)
    capsys.readouterr()
    assert plan.main([*run, "minutes=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tokens"]
    assert MAX_PASSES - 0.02 < found["passes"] <= MAX_PASSES  # a step is 0.01 passes
    assert plan.main([*run, "minutes=1", "max_tokens=1_000_000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"]["passes"] > MAX_PASSES


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["depth=3"], "depth=3 needs model=auto"),
        (["model=auto"], "model=auto needs depth=N, or minutes=N"),
        (["minutes=0"], "minutes=0 should be above 0"),
        (["minutes=-1.5"], "minutes=-1.5 should be above 0"),
        (["depth=0", "model=auto"], "depth=0 should be at least 1"),
        (["minutes=1"], "what is left of minutes=1 is 10 s"),
        (["stage=classify", "minutes=1"], "stage=classify trains none; pass max_steps"),
    ],
)
def test_what_no_budget_can_be_is_refused(
    words: list[str],
    sentence: str,
    tiny_run: list[str],
    main: Main,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    at_speed(monkeypatch, step_s=100.0)
    kept = [w for w in tiny_run if not w.startswith(("max_steps", "model.n_"))]
    assert main(*kept, "model.n_layer=2" if "depth=3" in words else "seed=1", *words) in (1, 2)
    assert sentence in capsys.readouterr().err
