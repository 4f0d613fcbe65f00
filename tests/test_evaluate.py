"""The evaluate command: metrics by hand, the JSON rows, and mistakes in one sentence."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt.checkpoint import Checkpoint, record, write_checkpoint
from nanogpt.classifier import Classifier
from nanogpt.evaluate import main, task_options
from nanogpt.evaluation.results import table
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
CONFIG = GPTConfig(
    block_size=16, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=1, n_embd=4, dropout=0.0
)


def saved(path: Path, model: GPT, stage: str, labels: list[str] | None) -> Path:
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    about = record(stage, CONFIG, TOKENIZER, labels=labels)
    write_checkpoint({"nanogpt": about, "state_dict": weights, "global_step": 1}, path)
    return path


@pytest.fixture
def always_ham(tmp_path: Path) -> Path:
    """A classifier that takes every text for the first of its classes."""
    model = Classifier(CONFIG, 2)
    with torch.no_grad():
        for name, tensor in model.ln_f.named_parameters():  # the last state of every text: its bias
            tensor.copy_(
                torch.eye(1, len(tensor))[0] if name == "bias" else torch.zeros(len(tensor))
            )
        model.classes.weight.zero_()[0, 0] = 5.0
    return saved(tmp_path / "ham.ckpt", model, "classify", ["ham", "spam"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "labelled.tsv"
    path.write_text("ham\tone\nham\ttwo\nham\tthree\nspam\tfour\n")
    return path


def test_it_scores_a_file_and_writes_the_rows(
    always_ham: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    code = main([str(always_ham), "--task", "classify", "--data", str(file), "--json", str(out)])
    assert code == 0
    (row,) = json.loads(out.read_text())
    assert (row["checkpoint"], row["task"]) == (str(always_ham), "classify")
    assert row["results"] == {  # ham: 2 * 3 / (2 * 3 + 1), spam: 0
        "accuracy": 0.75,
        "accuracy_stderr": 0.25,  # the deviation of 1, 1, 1, 0 is 1/2, over the root of 4
        "macro_f1": pytest.approx(3 / 7),
        "baseline_majority_accuracy": 0.75,
        "baseline_majority_macro_f1": pytest.approx(3 / 7),
        "examples": 4.0,
        "confusion_ham_as_ham": 3.0,
        "confusion_ham_as_spam": 0.0,
        "confusion_spam_as_ham": 1.0,
        "confusion_spam_as_spam": 0.0,
    }
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed[2:4]] == [["ham", "3", "0"], ["spam", "1", "0"]]
    assert printed[-3].split() == ["checkpoint", "task", "accuracy", "macro_f1", "examples"]
    assert printed[-2].split()[1:5] == ["classify", "0.7500", "±", "0.2500"]
    assert printed[-1].split() == ["majority", "(baseline)", "classify", "0.7500", "0.4286"]


def test_several_checkpoints_are_rows_of_one_table(
    always_ham: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(always_ham)] * 2 + ["--task", "classify", "--data", str(file)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[-3:]] == [str(always_ham)] * 2 + ["majority"]


def test_a_table_leaves_out_what_a_row_has_not() -> None:
    rows: list[dict[str, Any]] = [
        {"checkpoint": "a", "task": "x", "results": {"loss": 1.5}},
        {"checkpoint": "b", "task": "x", "results": {"accuracy": 1.0}},
    ]
    assert table(rows).splitlines() == [
        "checkpoint  task    loss  accuracy",
        "a           x     1.5000",
        "b           x               1.0000",
    ]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    return error


def test_an_unknown_label_is_one_sentence(
    always_ham: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.csv"
    path.write_text("text,label\none,eggs\n")
    error = fails([str(always_ham), "--task", "classify", "--data", str(path)], capsys)
    assert "the label 'eggs' and the checkpoint knows ham, spam" in error


def test_a_language_model_is_refused(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "lm.ckpt", GPT(CONFIG), "pretrain", None)
    error = fails([str(path), "--task", "classify", "--data", str(file)], capsys)
    assert "is a language model (stage pretrain)" in error


def test_a_missing_column_is_one_sentence(
    always_ham: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("body,label\none,ham\n")
    arguments = [str(always_ham), "--task", "classify", "--data", str(path)]
    assert "no column 'text'" in fails(arguments, capsys)
    assert main([*arguments, "--text-column", "body"]) == 0


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("clasify", "there is no task clasify; it is one of classify, "),
        ("json.lodas", "did you mean loads?"),
        ("no_such.task", "no_such.task cannot be imported: no_such: ModuleNotFoundError"),
        ("math.pi", "math.pi is not a class or function, but float"),
    ],
)
def test_a_task_that_is_not_there_is_wrong_usage(
    task: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["gpt2", "--task", task])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_task_gets_the_options_that_it_names_or_all_of_them() -> None:
    def own(checkpoint: Checkpoint, limit: int) -> dict[str, float]:
        return {}

    def everything(checkpoint: Checkpoint, options: Namespace, own: int = 3) -> dict[str, float]:
        return {}

    def unknown(checkpoint: Checkpoint, limit: int, size: int) -> dict[str, float]:
        return {}

    options = Namespace(task="mine", limit=2, stride=None)
    assert task_options(own, options) == {"limit": 2}
    assert task_options(everything, options) == {"options": options}
    with pytest.raises(ValueError, match="--task mine: its parameter size is no option"):
        task_options(unknown, options)


def test_the_error_without_data_names_what_to_pass(
    always_ham: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "needs --data (Score a classifier on a labelled" in fails(
        [str(always_ham), "--task", "classify"], capsys
    )


def test_a_missing_folder_is_an_error_before_scoring(
    always_ham: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "nowhere" / "out.json")
    arguments = [str(always_ham), "--task", "classify", "--data", str(file), "--json", out]
    assert "is no file of an existing folder" in fails(arguments, capsys)


@pytest.mark.parametrize(
    ("found", "key"),
    [('"confusion": [[1]]', "labels"), ('"confusion": [[1]], "labels": ["a"]', "mistakes")],
)
def test_a_summary_that_lacks_keys_is_one_sentence(
    found: str,
    key: str,
    always_ham: Path,
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(always_ham.read_bytes())
    (tmp_path / "run" / "config.yaml").write_text("stage: classify\n")
    (tmp_path / "run" / "summary.json").write_text(f'{{"steps": 1, {found}}}')
    (tmp_path / "run" / "report.html").touch()
    assert main([str(tmp_path / "run"), "--task", "classify", "--data", str(file)]) == 0
    output = capsys.readouterr()
    [sentence] = output.err.splitlines()
    assert f"run gets no new report (KeyError: '{key}')" in sentence
    assert "majority (baseline)" in output.out


def test_a_whole_evaluation_of_a_run_imports_no_lightning(
    always_ham: Path, file: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(always_ham.read_bytes())
    (tmp_path / "run" / "config.yaml").write_text("stage: classify\n")
    report = tmp_path / "run" / "report.html"
    report.touch()
    arguments = [str(tmp_path / "run"), "--task", "classify", "--data", str(file)]
    script = f"""
import sys
from nanogpt.evaluate import main
assert main({arguments!r}) == 0
assert not {{"lightning", "hydra", "torchmetrics"}} & set(sys.modules)"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Evaluations" in report.read_text()
