"""python -m nanogpt.compare, and the leaderboard of a sweep: what it prints, and its bad input."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanogpt.compare import leaderboard, main
from nanogpt.evaluation.results import STORED_ROWS
from tests.test_comparison import write_run

Train = Callable[..., int]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two learning rates with two seeds each, and a run that is not finished."""
    monkeypatch.chdir(tmp_path)
    for lr, bits in ((1, [1.0, 1.2]), (2, [1.4, 1.5])):
        for seed in (1, 2):
            shifted = [b + seed / 100 * lr for b in bits]
            write_run(tmp_path / "runs" / "sweep", f"lr{lr}-{seed}", shifted, seed=seed, lr=lr)
    unfinished = write_run(tmp_path / "runs", "unfinished")
    (unfinished / "summary.json").unlink()
    return tmp_path / "runs"


def test_a_comparison_is_a_table_json_and_a_picture(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", "rows.json", "--picture", "picture.svg"]
    assert main(["sweep/lr1-*", "sweep/lr2-*", *files]) == 0
    header, first, second, *rest = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["run", "seeds", "bits"]
    assert first.split()[:3] == ["lr=1", "2", "1.1150"]
    assert second.split()[:2] == ["lr=2", "2"]
    assert "+0.3650" in second
    assert "variance over seeds" in rest[-1]
    base, row = STORED_ROWS.validate_json((runs.parent / "rows.json").read_bytes())
    assert base["task"] == row["task"] == "compare"
    assert row["results"]["difference"] == pytest.approx(0.365)
    assert row["about"]["seeds"] == [1, 2]
    picture = (runs.parent / "picture.svg").read_text()
    assert "lr=2 0.3650 ±" in picture
    assert "bits per byte over seconds" in picture


def test_a_directory_of_runs_is_a_leaderboard(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(runs / "sweep", "lr0", [0.5, 0.5], seed=1, lr=0)
    assert main(["sweep"]) == 0
    labels = [line.split()[0] for line in capsys.readouterr().out.splitlines()[:4]]
    assert labels == ["run", "lr=0", "lr=1", "lr=2"]


def test_runs_that_cannot_be_compared_are_left_out_of_a_directory(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs"]) == 0
    assert "left out: runs/unfinished is not finished" in capsys.readouterr().err


def test_differing_and_operational_keys_are_listed_apart(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long: dict[str, Any] = {f"key_{i}": "long value" for i in range(9)}
    write_run(runs, "wide", [1.0, 1.0], lr=1, logger={"name": "csv"}, **long)
    assert main(["sweep/lr1-1", "wide"]) == 0
    out = capsys.readouterr().out
    assert "key_0   null  long value" in out
    assert "operational: logger.name null | csv" in out
    assert "lr1-1" in out.splitlines()[1]


def test_one_group_has_its_mean_and_its_spread(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep/lr1-*"]) == 0
    out = capsys.readouterr().out
    assert "1.1150 ± 0.0050" in out
    assert "differ in nothing but the seed; the standard deviation over seeds is 0.0071" in out


def test_runs_of_one_identity_and_seed_are_compared(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(runs, "again", [1.01, 1.21], seed=1, lr=1)
    assert main(["sweep/lr1-1", "again"]) == 0
    assert "+0.0000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "there is no run 'nothing': neither a directory with runs, nor a name or a"),
        (["unfinished"], "is not finished; issue its command again: python train.py"),
        (["sweep/lr1-1", "classes"], "classes has no bits per byte (stage=classify); pass runs of"),
        (["sweep/lr1-1", "other"], "have different stages or validation sets, so that their bits"),
        (["sweep/lr1-1", "replies"], "replies (instruct, c0"),
        (["sweep", "--json", "no/folder/x.json"], "is no file of an existing folder; name one"),
        (["damaged"], "config.yaml is damaged"),
        (["torn"], "torn is damaged or incomplete (KeyError: 'nats')"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], sentence: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = write_run(runs, "classes", summary={"stage": "classify"})
    summary = json.loads((classes / "summary.json").read_text())
    del summary["val_bits_per_byte"]
    (classes / "summary.json").write_text(json.dumps(summary))
    write_run(runs, "other", corpus="c1")
    write_run(runs, "replies", corpus="c0i", summary={"stage": "instruct"})
    (write_run(runs, "damaged") / "config.yaml").write_text("{")
    (write_run(runs, "torn") / "validation.csv").write_text("start,na\n0,1\n")
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_it_starts_without_torch() -> None:
    code = "import sys, nanogpt.compare; print(*{'torch', 'matplotlib', 'hydra'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_sweep_ends_with_its_leaderboard(
    tiny_run: list[str], tmp_path: Path, main: Train, capfd: pytest.CaptureFixture[str]
) -> None:
    short = [*tiny_run[:-1], "max_steps=2", "~callbacks.samples"]
    assert main("-m", *short, "optim.learning_rate=1e-3,1e-2", "seed=1,2") == 0
    out = capfd.readouterr().out
    assert out.count("learning_rate=0.0") >= 2
    assert "variance over seeds" in out.splitlines()[-1]
    (board,) = (tmp_path / "runs").glob("sweep-*/leaderboard.json")
    assert len(STORED_ROWS.validate_json(board.read_bytes())) == 2


def test_classifiers_and_several_corpora_have_no_leaderboard(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write_run(runs / "corpora", name, corpus=name)
        path = write_run(runs / "classes", name, summary={"stage": "classify"}) / "summary.json"
        path.write_text(path.read_text().replace("val_bits_per_byte", "val_accuracy"))
    for sweep in ("corpora", "classes", "nothing"):
        leaderboard(runs / sweep)
        assert not (runs / sweep / "leaderboard.json").exists()
    assert capsys.readouterr() == ("", "")
