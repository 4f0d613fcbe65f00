"""Instruction tuning as a person sees it: what it starts from, what it learns, and its files."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanogpt.checkpoint import load_checkpoint
from nanogpt.config import unknown_key
from nanogpt.data.instructions import Instructions
from nanogpt.prompts import find_template
from tests.killed import kill_run
from tests.test_train import DROPOUT, Command, fit

TINY = (
    "tokenizer=byte",
    "model.block_size=64",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=16",
    "tokens_per_step=256",
    "max_steps=12",
    "compile=false",
    "threads=1",
    "trainer.precision=32-true",
    "callbacks.log_every_n_steps=1",
    "callbacks.validation.every_n_steps=4",
    "callbacks.checkpoint.every_n_steps=4",
    "callbacks.samples.every_n_steps=6",
    "callbacks.samples.max_new_tokens=8",
)
COLUMNS = ("step", "train/loss", "train/grad_norm", "learning_rate", "val/loss")


@pytest.fixture
def data_path(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    records = [{"instruction": f"Double {i}.", "response": f"It is {2 * i}."} for i in range(60)]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.fixture
def tiny_run(data_path: Path, tmp_path: Path) -> list[str]:
    """The command line of a run of a second, from random weights."""
    return [
        "stage=instruct",
        *TINY,
        "data=instructions",
        f"data.path={data_path}",
        "init_from=null",
        f"runs_dir={tmp_path / 'runs'}",
        f"data_dir={tmp_path / 'data'}",
        "name=tiny",
    ]


def columns_of(run_dir: Path, *columns: str) -> list[list[str]]:
    with open(run_dir / "metrics.csv", newline="") as file:
        return [[row[c] for c in columns] for row in csv.DictReader(file)]


def test_the_checkpoint_knows_its_template_and_turn_markers(
    tiny_run: list[str], tmp_path: Path
) -> None:
    fit(*tiny_run)
    checkpoint = load_checkpoint("tiny", runs_dir=tmp_path / "runs")
    assert (checkpoint.stage, checkpoint.template) == ("instruct", "chat")
    assert checkpoint.tokenizer.special_tokens["<|assistant|>"] == 259
    assert checkpoint.config.vocab_size == 273


def test_the_summary_records_each_split_by_hash(tiny_run: list[str], data_path: Path) -> None:
    summary = fit(*tiny_run, "max_steps=1")
    splits = summary["splits"]
    assert splits["train"]["examples"] + splits["val"]["examples"] == 60
    assert len({splits["train"]["sha256"], splits["val"]["sha256"]}) == 2
    assert {summary["template"], summary["loss_on"]} == {"chat", "responses"}


def test_replies_before_and_after_are_side_by_side(tiny_run: list[str], tmp_path: Path) -> None:
    fit(*tiny_run, "data.prompts=[Double 7.]")
    samples = (tmp_path / "runs" / "tiny" / "samples.txt").read_text()
    assert [line for line in samples.splitlines() if line.startswith("===")] == [
        f"=== step {step} ===" for step in (0, 6, 12)
    ]
    replies = samples.split("> Double 7.\n")[1:]
    assert all(reply.partition("\n===")[0].strip() for reply in replies)
    report = (tmp_path / "runs" / "tiny" / "report.html").read_text()
    assert report.index("Before the first step") < report.index("Step 12")


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_the_validation_loss_is_that_of_unpacked_responses(
    template: str, tiny_run: list[str], data_path: Path, tmp_path: Path
) -> None:
    size = ["model.block_size=256", "tokens_per_step=512", f"instruct.template={template}"]
    summary = fit(*tiny_run, *size, "max_steps=3", "optim.learning_rate=1e-4")
    checkpoint = load_checkpoint("tiny", runs_dir=tmp_path / "runs")
    nats, n_targets = 0.0, 0
    for conversation in Instructions(data_path).splits()["val"]:
        ids, is_response = find_template(template).encode(checkpoint.tokenizer, conversation)
        with torch.no_grad():
            logits = checkpoint.model(torch.tensor([ids[:-1]]))[0]
        losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        nats += losses[torch.tensor(is_response[1:])].sum().item()
        n_targets += sum(is_response)
    assert summary["val_loss"] == pytest.approx(nats / n_targets, abs=1e-5)


def test_it_starts_from_the_newest_pretraining_run(
    tiny_run: list[str], corpus_path: Path, tmp_path: Path
) -> None:
    where = [word for word in tiny_run if word.startswith(("runs_dir", "data_dir"))]
    fit(*TINY, *where, "data=text", f"data.path={corpus_path}", "max_steps=3", "name=base")
    from_latest = [word for word in tiny_run if word != "init_from=null"]
    summary = fit(*from_latest, "max_steps=3", "model.n_layer=7")
    base = load_checkpoint("base", runs_dir=tmp_path / "runs")
    config = (tmp_path / "runs" / "tiny" / "config.yaml").read_text()
    assert "base/checkpoints/last.ckpt" in config
    assert summary["n_params"] == base.model.num_parameters()


def test_a_tokenizer_is_learnt_from_the_conversations(tiny_run: list[str], tmp_path: Path) -> None:
    own = [word for word in tiny_run if word != "tokenizer=byte"]
    fit(*own, "max_steps=1", "tokenizer=bpe", "tokenizer.vocab_size=300")
    tokenizer = load_checkpoint("tiny", runs_dir=tmp_path / "runs").tokenizer
    assert b"Double" in tokenizer.token_bytes()


def test_it_ends_after_the_passes_unless_a_budget_is_typed(
    tiny_run: list[str], tmp_path: Path, main: Callable[..., int]
) -> None:
    summary = fit(*tiny_run, "max_steps=100", "instruct.max_passes=2", "name=passes")
    assert summary["steps"] == math.ceil(2 * summary["splits"]["train"]["rows"] * 64 / 256)
    assert main(*tiny_run, "max_steps=9", "instruct.max_passes=1", "name=typed") == 0
    assert json.loads((tmp_path / "runs/typed/summary.json").read_text())["steps"] == 9


def test_every_micro_batch_gives_the_same_losses(tiny_run: list[str], tmp_path: Path) -> None:
    reached = []
    options = [*tiny_run, DROPOUT]
    for micro_batch in (4, 1):
        fit(*options, f"micro_batch={micro_batch}", f"name=m{micro_batch}")
        reached.append(columns_of(tmp_path / "runs" / f"m{micro_batch}", "train/loss"))
    for [one], [other] in zip(*reached, strict=True):
        assert abs(float(one) - float(other)) < 1e-5


def test_a_killed_run_continues_to_the_same_bits(tiny_run: list[str], tmp_path: Path) -> None:
    options = [*tiny_run, "model.dropout=0.1", "micro_batch=2"]
    whole = fit(*options, "name=whole")
    kill_run("nanogpt.training.language_model.next_token_loss", 20, options, tmp_path)
    continued = fit(*options)
    assert continued["weights_sha256"] == whole["weights_sha256"]
    runs = tmp_path / "runs"
    assert columns_of(runs / "tiny", *COLUMNS) == columns_of(runs / "whole", *COLUMNS)
    assert (runs / "tiny" / "samples.txt").read_text() == (
        runs / "whole" / "samples.txt"
    ).read_text()


def test_two_ranks_learn_the_same_as_one(
    tiny_run: list[str], tmp_path: Path, command: Command
) -> None:
    options = [*tiny_run, DROPOUT]
    ranks = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    two = command(*options, "name=two", *ranks)
    assert two.returncode == 0, two.stderr
    fit(*options, "name=one")
    for column in ("train/loss", "val/loss"):
        pairs = zip(
            *(columns_of(tmp_path / "runs" / n, column) for n in ("one", "two")), strict=True
        )
        for [a], [b] in pairs:
            assert a == b == "" or abs(float(a) - float(b)) < 1e-5


def test_other_conversations_are_another_corpus(
    tiny_run: list[str], data_path: Path, tmp_path: Path
) -> None:
    fit(*tiny_run)
    (tmp_path / "runs" / "tiny" / "summary.json").unlink()
    with open(data_path, "a") as file:
        file.write('{"instruction": "Double 60.", "response": "It is 120."}\n')
    with pytest.raises(ValueError, match="another corpus"):
        fit(*tiny_run)


def test_the_error_for_a_misspelt_key_of_the_stage_names_the_nearest() -> None:
    assert "did you mean instruct.template?" in unknown_key("instruct.templat")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["data=python_stdlib"],
            "data=python_stdlib has no conversations for stage=instruct; pass data=dolly",
        ),
        (["data=instructions"], "data=instructions needs data.path="),
        (["instruct.template=vicuna"], "template='vicuna' is unknown; choose one of chat"),
        (["instruct.template=plain"], "template=plain ends no response"),
        (["instruct.loss_on=prompts"], "loss_on='prompts' should be 'responses' or 'all'"),
        (["init_from=latest"], "found no finished pretraining run"),
    ],
)
def test_a_mistake_in_the_command_is_one_sentence(
    arguments: list[str], expected: str, tiny_run: list[str], tmp_path: Path
) -> None:
    replaced = [argument.partition("=")[0] for argument in arguments]
    words = [word for word in tiny_run if word.partition("=")[0] not in replaced]
    if "data" in replaced:
        words = [word for word in words if not word.startswith("data.path")]
    with pytest.raises((ValueError, FileNotFoundError), match=expected) as error:
        fit(*words, *arguments)
    assert "\n" not in str(error.value)
