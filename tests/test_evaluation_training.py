"""HellaSwag while training: the metrics of the checkpoint, on any number of ranks."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nanogpt.evaluate import main as evaluate
from nanogpt.runs.metrics import read_metrics

Command = Callable[..., subprocess.CompletedProcess[str]]
Main = Callable[..., int]


@pytest.fixture
def items_path(tmp_path: Path) -> Path:
    """Items whose endings differ in length, so that ranks have unlike shares."""
    rows = [
        {
            "activity_label": "Counting",
            "ctx": f"Line {i}: the square of",
            "endings": [f"{i} is {i * i}.", "no", f"Line {i + 1}", "the square"],
            "label": i % 4,
        }
        for i in range(7)
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_the_figures_are_those_of_the_checkpoint(
    main: Main, tiny_run: list[str], items_path: Path, tmp_path: Path
) -> None:
    keys = ["callbacks.hellaswag.every_n_steps=4", f"callbacks.hellaswag.path={items_path}"]
    assert main(*tiny_run, *keys) == 0
    run_dir = tmp_path / "runs" / "tiny"
    metrics = read_metrics(run_dir / "metrics.csv")
    assert [step for step, _ in metrics["hellaswag/acc"]] == [4, 8, 12]
    summary = json.loads((run_dir / "summary.json").read_text())
    arguments = [str(run_dir), "--task", "hellaswag", "--data", str(items_path)]
    assert evaluate([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    [row] = json.loads((tmp_path / "out.json").read_text())
    for name in ("acc", "acc_norm"):
        assert (
            summary[f"hellaswag_{name}"]
            == row["results"][name]
            == metrics[f"hellaswag/{name}"][-1][1]
        )


def test_ranks_share_the_items(
    command: Command, tiny_run: list[str], items_path: Path, tmp_path: Path
) -> None:
    keys = ["callbacks.hellaswag.every_n_steps=12", f"callbacks.hellaswag.path={items_path}"]
    done = command(*tiny_run, *keys, "trainer=ddp", "trainer.devices=2")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    arguments = [str(tmp_path / "runs" / "tiny"), "--task", "hellaswag", "--data", str(items_path)]
    assert evaluate([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    [row] = json.loads((tmp_path / "out.json").read_text())
    assert summary["hellaswag_acc_norm"] == row["results"]["acc_norm"]


def test_what_is_measured_of_a_run_is_in_its_report(
    main: Main, tiny_run: list[str], items_path: Path, tmp_path: Path
) -> None:
    assert main(*tiny_run) == 0
    run_dir = tmp_path / "runs" / "tiny"
    arguments = [str(run_dir), "--task", "hellaswag", "--data", str(items_path)]
    assert evaluate([*arguments, "--no-report"]) == 0
    assert not (run_dir / "evaluations.json").exists()
    assert (
        evaluate(arguments) == evaluate(arguments) == 0
    )  # the second takes the place of the first
    [stored] = json.loads((run_dir / "evaluations.json").read_text())
    assert stored["about"] == {"step": 12, "data": str(items_path), "limit": None}
    report = (run_dir / "report.html").read_text()
    assert "Evaluations" in report
    assert "gpt2 124M (published)" in report


def test_a_classifier_in_training_is_refused_at_once(
    main: Main, tmp_path: Path, items_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = ["callbacks.hellaswag.every_n_steps=4", f"callbacks.hellaswag.path={items_path}"]
    code = main("stage=classify", f"runs_dir={tmp_path}", "init_from=null", *keys)
    assert code == 2
    assert "stage=classify trains none" in capfd.readouterr().err


def test_a_missing_file_is_an_error_before_anything_else(
    main: Main, tiny_run: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = ["callbacks.hellaswag.every_n_steps=4", "callbacks.hellaswag.path=nowhere.jsonl"]
    assert main(*tiny_run, *keys) == 1
    assert "nowhere.jsonl is no file" in capfd.readouterr().err
    assert not (tmp_path / "data").exists()
