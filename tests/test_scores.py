"""Perplexity, LAMBADA, replies and the table: metrics by hand, whatever the batches."""

import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanogpt.checkpoint import Checkpoint, record, write_checkpoint
from nanogpt.classifier import Classifier
from nanogpt.evaluate import main
from nanogpt.evaluation import instructions, lambada, perplexity
from nanogpt.evaluation.results import (
    add_evaluation,
    lines,
    mean_and_error,
    read_evaluations,
    table,
)
from nanogpt.evaluation.scoring import Request, encode_pair
from nanogpt.export import main as export
from nanogpt.model import GPT, GPTConfig
from nanogpt.prompts import Message, find_template
from nanogpt.report.figures import draw_scores
from nanogpt.tokenizer import Tokenizer, bpe_tokenizer, byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXT = "A text of no great length, with ümlauts.\n" * 9


def new_model(tokenizer: Tokenizer = TOKENIZER, block_size: int = 32) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size, tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32)).eval()


def uniform(tokenizer: Tokenizer) -> GPT:
    """A model to which all tokens are equally likely."""
    model = new_model(tokenizer)
    with torch.no_grad():
        model.wte.weight.zero_()
    return model


def saved(path: Path, model: GPT, stage: str = "pretrain", **about: Any) -> Path:
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    facts = record(stage, model.config, TOKENIZER, **about)
    write_checkpoint({"nanogpt": facts, "state_dict": weights, "global_step": 3}, path)
    return path


def stream(tokenizer: Tokenizer, text: str = TEXT) -> list[int]:
    return [tokenizer.eot_id, *tokenizer.encode(text)]


@pytest.mark.parametrize("stride", [7, 16, 32])
def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary(stride: int) -> None:
    for tokenizer in (TOKENIZER, bpe_tokenizer([TEXT], 300)):
        tokens = stream(tokenizer)
        results = perplexity.scores(uniform(tokenizer), tokenizer, tokens, stride)
        n_bytes = len(TEXT.encode())
        bits = (len(tokens) - 1) * math.log2(tokenizer.vocab_size) / n_bytes
        assert results["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
        assert results["perplexity"] == pytest.approx(tokenizer.vocab_size, rel=1e-5)
        assert (results["tokens"], results["bytes"]) == (len(tokens) - 1, n_bytes)


def test_bits_per_byte_do_not_depend_on_the_batches() -> None:
    model, tokens = new_model(), stream(TOKENIZER)
    found = [perplexity.scores(model, TOKENIZER, tokens, 16, size) for size in (1, 3, 8, 100)]
    assert found[1:] == found[:-1]


@torch.no_grad()
def test_with_a_stride_of_the_context_windows_are_those_of_validation() -> None:
    model, tokens = new_model(), stream(TOKENIZER)
    nats = 0.0
    for start in range(0, len(tokens) - 1, 32):
        ids = torch.tensor(tokens[start : start + 33])
        nats += float(F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="sum"))
    results = perplexity.scores(model, TOKENIZER, tokens, 32)
    assert results["loss"] == pytest.approx(nats / (len(tokens) - 1), abs=1e-6)


def test_windows_slide_and_score_every_token_once() -> None:
    assert perplexity.windows([0, 1, 2, 3, 4, 5], block_size=3, stride=2) == [
        Request([0], [[1, 2]]),
        Request([1, 2], [[3, 4]]),
        Request([3, 4], [[5]]),
    ]


def test_the_error_of_a_mean_is_that_of_its_sample() -> None:
    found = mean_and_error("x", np.array([1.0, 2.0, 3.0, 6.0]))  # variance 14 / 3
    assert found == {"x": 3.0, "x_stderr": pytest.approx(math.sqrt(14 / 3 / 4))}


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [("ab", " c", ("ab", " c")), ("ab ", "c", ("ab", " c")), ("", "c", ("", "c"))],
)
def test_space_at_a_contexts_end_belongs_to_what_follows(
    context: str, continuation: str, expected: tuple[str, str]
) -> None:
    ids, following = encode_pair(TOKENIZER, context, continuation)
    assert (TOKENIZER.decode(ids), TOKENIZER.decode(following)) == expected
    assert ids


def test_the_last_word_is_scored_with_its_space() -> None:
    request = lambada.request(TOKENIZER, "one two three")
    assert TOKENIZER.decode(request.context) == "one two"
    assert TOKENIZER.decode(request.continuations[0]) == " three"


def test_a_uniform_models_last_words_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a bc"}\n{"text": " a bcde\\n"}\n')
    model = uniform(TOKENIZER)
    checkpoint = Checkpoint(model, TOKENIZER, None, None, "pretrain", model.config, 0, path)
    found = lambada.evaluate(checkpoint, path, None, 8, tmp_path)
    mean = (3 + 5) / 2 * math.log(TOKENIZER.vocab_size)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["acc"] == 0.0


def conversation(prompt: str, reply: str) -> tuple[Message, Message]:
    return Message("user", prompt), Message("assistant", reply)


def chat_model() -> Checkpoint:
    tokenizer = TOKENIZER.with_special_tokens(find_template("chat").special_tokens)
    model = new_model(tokenizer, block_size=64)
    return Checkpoint(
        model, tokenizer, "chat", None, "instruct", model.config, 0, Path("chat.ckpt")
    )


def test_the_loss_is_of_the_responses_and_their_ends() -> None:
    checkpoint = chat_model()
    template = find_template("chat")
    messages = conversation("Add 2 and 3.", "5")
    ids, is_response = template.encode(checkpoint.tokenizer, messages)
    logits = checkpoint.model(torch.tensor([ids[:-1]]))[0].detach()
    losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    expected = losses[torch.tensor(is_response[1:])].mean()
    found = instructions.response_loss(checkpoint, [messages])
    assert found["loss"] == pytest.approx(float(expected), abs=1e-5)


def test_metrics_of_the_replies_have_those_of_the_responses_as_baselines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [("Print a.", "aaaaaaaa"), ("Print b.", "bc")]
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in rows))
    found = instructions.evaluate(chat_model(), path, None, 8, max_new_tokens=4)
    assert found["baseline_responses_reply_tokens"] == 5.0
    assert found["baseline_responses_repetition"] == pytest.approx((4 / 5 + 0) / 2)
    assert found["reply_tokens"] <= 4


@pytest.mark.parametrize(
    ("ids", "share"), [([1, 2, 3, 4, 1, 2, 3, 4], 0.2), ([1] * 5, 0.5), ([1], 0)]
)
def test_repetition_is_the_share_of_runs_seen_before(ids: list[int], share: float) -> None:
    assert instructions.repetition(ids) == pytest.approx(share)


def test_published_metrics_are_lines_of_their_own() -> None:
    published = {"baseline_published_gpt2_124M_acc": 0.2859}
    results = {"acc": 0.3, "acc_stderr": 0.01, **published}
    rows = table([{"checkpoint": "a", "task": "hellaswag", "results": results}]).splitlines()
    assert rows[1].split() == ["a", "hellaswag", "0.3000", "±", "0.0100"]
    assert rows[2].split() == ["gpt2", "124M", "(published)", "hellaswag", "0.2859"]


def test_the_picture_has_its_values_as_text_too() -> None:
    row = {"checkpoint": "<a>", "task": "lambada", "results": {"acc": 0.5, "acc_stderr": 0.1}}
    drawn = draw_scores(lines([row]), ["acc"])
    assert drawn.startswith("<svg ")
    assert "accuracy: &lt;a&gt; 0.5000 ± 0.1000" in drawn
    assert drawn.count("<use") == 1


def test_the_limit_of_a_single_document_counts_windows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    path = saved(tmp_path / "a.ckpt", uniform(TOKENIZER))
    out = tmp_path / "out.json"
    arguments = ["--task", "perplexity", "--data", str(tmp_path / "a.txt"), "--json", str(out)]
    assert main([str(path), *arguments, "--limit", "2", "--stride", "3"]) == 0
    [row] = json.loads(out.read_text())
    assert row["results"]["tokens"] == 2 * 3


def test_a_text_is_scored_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    path = saved(tmp_path / "a.ckpt", uniform(TOKENIZER))
    out = tmp_path / "out.json"
    arguments = ["--task", "perplexity", "--data", str(tmp_path / "a.txt"), "--json", str(out)]
    assert main([str(path), *arguments]) == 0
    [row] = json.loads(out.read_text())
    n_tokens, n_bytes = len(TEXT.encode()), len(TEXT.encode())
    assert row["results"]["bits_per_byte"] == pytest.approx(math.log2(TOKENIZER.vocab_size))
    assert (row["results"]["tokens"], row["results"]["bytes"]) == (n_tokens, n_bytes)
    assert "baseline_gzip_bits_per_byte" in row["results"]
    assert "gzip (baseline)" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["hellaswag", "lambada", "perplexity"])
def test_a_classifier_is_refused_in_one_sentence(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Classifier(new_model().config, 2)
    path = saved(tmp_path / "c.ckpt", model, "classify", labels=["ham", "spam"])
    assert main([str(path), "--task", task, "--data", str(path)]) == 1
    error = capsys.readouterr().err
    assert "is a classifier of ham, spam and this task scores language models" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "hellaswag", "--data", "nowhere.jsonl"], "nowhere.jsonl is no file"),
        (["--task", "perplexity"], "--task perplexity needs --data (Score text"),
        (["--task", "perplexity", "--data", "b.txt"], "--data b.txt does not exist"),
        (["--task", "perplexity", "--data", "a.jsonl"], "pass --text-column NAME"),
        (
            ["--task", "perplexity", "--data", "a.txt", "--stride", "33"],
            "--stride 33 is not from 1",
        ),
        (["--task", "perplexity", "--data", "a.bin", "--limit", "2"], "--limit counts documents"),
        (["--task", "hellaswag", "--batch-size", "0"], "--batch-size 0 is not a number"),
        (["--task", "classify"], "--task classify needs --data"),
        (["--task", "classify", "--processes", "2"], "--task classify runs in one process"),
        (["--task", "instructions", "--data", "a.jsonl"], "a.ckpt is not instruction-tuned"),
        (["--task", "lambada", "--data", "a.txt"], "a.txt, line 1 is not JSON"),
        (["--task", "lambada", "--picture", "no/a.svg"], "no/a.svg is no file of an existing"),
        (["--task", "lambada", "--json", "."], "--json . is no file of an existing folder"),
        (["nowhere", "--task", "lambada", "--data", "none"], "there is no checkpoint 'nowhere'"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    (tmp_path / "a.bin").write_bytes(bytes(100))
    saved(tmp_path / "a.ckpt", new_model())
    assert main(["a.ckpt", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_folder_of_texts_is_one_stream(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_text(TEXT)
    path = saved(tmp_path / "a.ckpt", uniform(TOKENIZER))
    out = tmp_path / "out.json"
    arguments = ["--task", "perplexity", "--data", str(tmp_path), "--json", str(out)]
    assert main([str(path), *arguments]) == 0
    [row] = json.loads(out.read_text())
    n_bytes = 2 * len(TEXT.encode())
    assert (row["results"]["tokens"], row["results"]["bytes"]) == (n_bytes + 1, n_bytes)


def test_shards_are_scored_whole_and_a_folders_validation_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", uniform(TOKENIZER))
    for name, n_tokens in (("train.bin", 3000), ("val.bin", 50)):
        (np.arange(n_tokens, dtype="<u2") % 200).tofile(tmp_path / name)
    found = []
    for data in (tmp_path, tmp_path / "val.bin"):
        out = tmp_path / "out.json"
        arguments = ["--task", "perplexity", "--data", str(data), "--json", str(out)]
        assert main([str(path), *arguments]) == 0
        found.append(json.loads(out.read_text())[0]["results"]["tokens"])
    assert found == [49, 49]


def test_processes_share_the_work_and_give_the_same_figures(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    path = saved(tmp_path / "a.ckpt", new_model())
    found = []
    for n in ("1", "2"):
        out = tmp_path / f"{n}.json"
        arguments = ["--task", "perplexity", "--data", str(tmp_path / "a.txt"), "--json", str(out)]
        assert main([str(path), *arguments, "--processes", n]) == 0
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1]


def test_scores_before_a_failure_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    good = saved(tmp_path / "a.ckpt", uniform(TOKENIZER))
    (tmp_path / "b.ckpt").write_bytes(b"no checkpoint")
    out = tmp_path / "out.json"
    data = ["--task", "perplexity", "--data", str(tmp_path / "a.txt"), "--json", str(out)]
    assert main([str(good), str(tmp_path / "b.ckpt"), *data]) == 1
    output = capsys.readouterr()
    assert len(output.err.splitlines()) == 1
    assert "a.ckpt  perplexity" in output.out
    assert [row["checkpoint"] for row in json.loads(out.read_text())] == [str(good)]


def test_the_table_is_there_where_nothing_can_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    path = saved(tmp_path / "a.ckpt", uniform(TOKENIZER))
    monkeypatch.setattr(perplexity, "scores", lambda *_, **__: {"tokens": 3.0, "bytes": 0.0})
    data = ["--task", "perplexity", "--data", str(tmp_path / "a.txt")]
    assert main([str(path), *data, "--picture", str(tmp_path / "a.svg")]) == 1
    output = capsys.readouterr()
    assert "a.ckpt  perplexity" in output.out
    assert len(output.err.splitlines()) == 1
    assert not (tmp_path / "a.svg").exists()


def test_a_hugging_face_directory_is_scored_as_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    path = saved(tmp_path / "a.ckpt", new_model())
    assert export([str(path), str(tmp_path / "hf"), "--format", "hf"]) == 0
    out = tmp_path / "out.json"
    data = ["--task", "perplexity", "--data", str(tmp_path / "a.txt"), "--json", str(out)]
    assert main([str(path), str(tmp_path / "hf"), *data]) == 0
    first, second = json.loads(out.read_text())
    assert first["results"] == second["results"]


def test_a_run_stores_the_scores_of_other_options_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "config.yaml").write_text("stage: pretrain\n")
    (tmp_path / "checkpoints").mkdir()
    path = saved(tmp_path / "checkpoints" / "last.ckpt", uniform(TOKENIZER))
    data = ["--task", "perplexity", "--data", str(tmp_path / "a.txt")]
    for stride in ("8", "16", "8"):
        assert main([str(path), *data, "--stride", stride]) == 0
    stored = json.loads((tmp_path / "evaluations.json").read_text())
    assert [row["about"]["stride"] for row in stored] == [16, 8]


@pytest.mark.parametrize("text", ["5", "null", '[{"results": {}}]', "{", ""])
def test_a_damaged_file_of_evaluations_is_begun_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "evaluations.json").write_text(text)
    assert read_evaluations(tmp_path) == []
    add_evaluation(tmp_path, {"checkpoint": "a", "task": "b", "results": {}}, {})
    assert len(read_evaluations(tmp_path)) == 1


def test_evaluations_that_end_at_once_are_all_added(tmp_path: Path) -> None:
    def add(number: int) -> None:
        add_evaluation(tmp_path, {"checkpoint": "a", "task": f"task {number}", "results": {}}, {})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(40)))
    assert len(read_evaluations(tmp_path)) == 40


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for the processes")
@pytest.mark.parametrize(
    ("fails", "message", "code"),
    [
        ("echo 'process 1: no memory' >&2; exit 3", "process 1: no memory\n", 3),
        (
            "kill -9 $$",
            "nanogpt.evaluate: process 1 was ended by signal 9, often by a lack of memory; "
            "issue the same command again\n",
            1,
        ),
    ],
)
def test_a_process_that_fails_alone_is_heard(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fails: str,
    message: str,
    code: int,
) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nif [ $RANK = 1 ]; then {fails}; fi\nexec sleep 3600\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr("nanogpt.evaluate.find_checkpoints", lambda options: [])
    assert main(["a", "--task", "hellaswag", "--processes", "2"]) == code
    assert capfd.readouterr().err.lstrip() == message
