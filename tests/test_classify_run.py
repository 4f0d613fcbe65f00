"""stage=classify as a person sees it: its files, splits of a step, kills, ranks and mistakes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nanogpt.checkpoint import load_checkpoint
from nanogpt.classifier import Classifier
from nanogpt.data.labelled import LabelledTexts
from nanogpt.evaluate import main as evaluate
from tests.killed import kill_run
from tests.test_train import DROPOUT, Command, fit, metrics

COLOURS = ("red", "green", "blue")
OPTIONS = (
    "stage=classify",
    "data=labelled",
    "tokenizer=byte",
    "optim=adamw",
    "optim.learning_rate=0.02",
    "model.block_size=16",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=16",
    "model.zero_init=false",
    "model.dropout=0",
    "tokens_per_step=128",
    "max_steps=12",
    "threads=1",
    "trainer.precision=32-true",
    "callbacks.log_every_n_steps=1",
    "callbacks.validation.every_n_steps=4",
    "callbacks.checkpoint.every_n_steps=4",
    "name=tiny",
)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A hundred texts of three classes, one of them rarer."""
    path = tmp_path / "labelled.tsv"
    rows = [(COLOURS[min(i % 5, 2) if i % 10 else 1], i) for i in range(100)]
    path.write_text("".join(f"{colour}\t{colour[::-1]} {i}\n" for colour, i in rows))
    return path


@pytest.fixture
def tiny(labelled: Path, tmp_path: Path) -> list[str]:
    """The command line of a classifier's run of a second."""
    places = [f"runs_dir={tmp_path / 'runs'}", f"data_dir={tmp_path / 'data'}"]
    return [*OPTIONS, f"data.path={labelled}", *places]


def losses(run_dir: Path) -> list[tuple[str, ...]]:
    return metrics(run_dir, "step", "train/loss", "train/grad_norm", "val/loss", "val/accuracy")


def test_a_run_learns_and_reports_its_test_metrics(tiny: list[str], tmp_path: Path) -> None:
    summary = fit(*tiny, "max_steps=60")
    run_dir = tmp_path / "runs" / "tiny"
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert summary["test_accuracy"] > summary["baseline_majority_test_accuracy"]
    assert summary["labels"] == sorted(COLOURS)
    assert summary["splits"].keys() == summary["split_hashes"].keys() == {"train", "val", "test"}
    assert sum(map(sum, summary["confusion"])) == summary["splits"]["test"]
    assert '<table class="confusion">' in (run_dir / "report.html").read_text()
    assert not (run_dir / "samples.txt").exists()


def test_the_checkpoint_scores_the_test_split_as_the_run_did(
    tiny: list[str], labelled: Path, tmp_path: Path
) -> None:
    summary = fit(*tiny, "seed=3")
    loaded = load_checkpoint("tiny", runs_dir=tmp_path / "runs")
    assert isinstance(loaded.model, Classifier)
    assert loaded.labels == sorted(COLOURS)
    held_out = LabelledTexts(labelled, split_seed=3).splits().test
    path, out = tmp_path / "test.jsonl", tmp_path / "out.json"
    path.write_text("".join(json.dumps(vars(example)) + "\n" for example in held_out))
    run = str(tmp_path / "runs" / "tiny")
    assert evaluate([run, "--task", "classify", "--data", str(path), "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text())
    for name in ("accuracy", "macro_f1"):
        assert row["results"][name] == summary[f"test_{name}"]


def test_every_micro_batch_gives_the_same_losses(tiny: list[str], tmp_path: Path) -> None:
    for micro_batch in (8, 2):
        fit(
            *tiny,
            DROPOUT,
            "classify.class_weights=true",
            "optim.learning_rate=0.002",  # with ten times as much AdamW amplifies rounding
            f"micro_batch={micro_batch}",
            f"name=m{micro_batch}",
        )
    one, other = (metrics(tmp_path / "runs" / f"m{n}", "train/loss", "val/loss") for n in (8, 2))
    for rows in zip(one, other, strict=True):
        for a, b in zip(*rows, strict=True):
            assert a == b == "" or abs(float(a) - float(b)) < 1e-5


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("nanogpt.training.classify.next_token_nats", 20),
        ("nanogpt.training.classify.baselines", 1),
    ],
)
def test_a_killed_run_continues_to_the_same_bits(
    where: str, count: int, tiny: list[str], tmp_path: Path
) -> None:
    options = [*tiny, "model.dropout=0.1", "micro_batch=4"]
    whole = fit(*options, "name=whole")
    kill_run(where, count, options, tmp_path)
    continued = fit(*options)
    assert continued["weights_sha256"] == whole["weights_sha256"]
    assert continued["mistakes"] == whole["mistakes"]
    assert losses(tmp_path / "runs" / "tiny") == losses(tmp_path / "runs" / "whole")


def test_two_ranks_reach_what_one_does(tiny: list[str], tmp_path: Path, command: Command) -> None:
    options = [*tiny, DROPOUT, "optim.learning_rate=0.002"]
    ranks = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
    two = command(*options, "name=two", *ranks)
    assert two.returncode == 0, two.stderr
    fit(*options, "name=one")
    runs = [losses(tmp_path / "runs" / name) for name in ("one", "two")]
    for one, other in zip(*runs, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a == b == "" or abs(float(a) - float(b)) < 1e-4  # sums in another order


def test_a_head_on_a_frozen_model_leaves_the_model_as_it_was(
    tiny: list[str], tiny_run: list[str], tmp_path: Path
) -> None:
    fit(*tiny_run, "name=pretrained")
    start = load_checkpoint("pretrained", runs_dir=tmp_path / "runs").model
    fit(*tiny, "init_from=pretrained", "classify.layers=head")
    loaded = load_checkpoint("tiny", runs_dir=tmp_path / "runs").model
    weights = loaded.state_dict()
    assert all(weights[name].equal(tensor) for name, tensor in start.state_dict().items())
    assert isinstance(loaded, Classifier)
    assert loaded.classes.weight.abs().max() > 0


def test_other_examples_under_one_name_are_refused(
    tiny: list[str], labelled: Path, tmp_path: Path
) -> None:
    fit(*tiny)
    (tmp_path / "runs" / "tiny" / "summary.json").unlink()
    labelled.write_text(labelled.read_text() + "red\tone more\n")
    with pytest.raises(ValueError, match="another corpus"):
        fit(*tiny)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["classify.layers=last_3"], "all, head, or last_1 to last_2"),
        (["data=text"], "data=text has no labels"),
        (["classify.lm_weight=-1"], "lm_weight"),
        (["data.max_examples=3"], "which gives"),
        (["tokens_per_step=100"], "cannot be split"),
    ],
)
def test_a_mistake_is_one_sentence(options: list[str], expected: str, tiny: list[str]) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        fit(*tiny, *options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mistake", ["classify.lm_weight=-1", "classify.recase=7"])
def test_a_mistake_has_the_key_that_was_typed(
    mistake: str, tiny: list[str], main: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(*tiny, mistake) == 2
    assert f"train.py: {mistake} should be" in capfd.readouterr().err
