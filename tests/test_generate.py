"""The command `python -m nanogpt.generate`."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt.checkpoint import load_checkpoint, record, write_checkpoint
from nanogpt.generate import main
from nanogpt.generation import Reply
from nanogpt.model import GPT, GPTConfig
from nanogpt.prompts import find_template
from nanogpt.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = GPTConfig(block_size=8, vocab_size=273, n_layer=1, n_head=2, n_embd=8)
    torch.manual_seed(0)
    weights = {f"model.{name}": t for name, t in GPT(config).state_dict().items()}
    path = tmp_path_factory.mktemp("checkpoint") / "a.ckpt"
    content = {"global_step": 1, "state_dict": weights}
    write_checkpoint(content | {"nanogpt": record("pretrain", config, byte_tokenizer())}, path)
    return str(path)


def test_the_prompt_and_its_continuation_are_printed(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([path, "--prompt", "def é", "--max-new-tokens", "20", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("def é")


def test_a_model_with_a_template_is_prompted_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = find_template("chat")
    tokenizer = byte_tokenizer().with_special_tokens(chat.special_tokens)
    config = GPTConfig(block_size=8, vocab_size=273, n_layer=1, n_head=2, n_embd=8)
    weights = {f"model.{name}": t for name, t in GPT(config).state_dict().items()}
    content = {"global_step": 1, "state_dict": weights}
    about = record("instruct", config, tokenizer, template="chat")
    write_checkpoint(content | {"nanogpt": about}, tmp_path / "a.ckpt")
    read: list[list[int]] = []

    def one_letter(model: GPT, ids: list[int], **options: Any) -> Iterator[int]:
        read.append(ids)
        return iter([65])

    monkeypatch.setattr("nanogpt.generation.generate", one_letter)
    assert main([str(tmp_path / "a.ckpt"), "--prompt", "Hi"]) == 0
    assert main([str(tmp_path / "a.ckpt"), "--prompt", "Hi", "--raw"]) == 0
    assert capsys.readouterr().out == "A\nHiA\n"
    assert read == [[256, 258, 72, 105, 259], [72, 105]]


def test_temperature_zero_repeats_itself(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for _ in range(2):
        assert main([path, "--prompt", "a", "--temperature", "0", "--max-new-tokens", "30"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_character_of_several_tokens_is_yielded_whole(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [*"é€".encode(), 0xC3]
    monkeypatch.setattr("nanogpt.generation.generate", lambda *_, **options: iter(ids))
    checkpoint = load_checkpoint(path)
    reply = Reply(checkpoint.model, checkpoint.tokenizer, "a", max_new_tokens=len(ids))
    assert list(filter(None, reply)) == ["é", "€", "�"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "there is no checkpoint 'nowhere'"),
        (["CKPT", "--temperature", "-1"], "temperature"),
        (["CKPT", "--top-k", "0"], "top_k"),
        (["CKPT", "--max-new-tokens", "-1"], "max_new_tokens"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], expected: str, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([path if word == "CKPT" else word for word in arguments]) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == 1


def test_a_closed_pipe_ends_quietly(path: str) -> None:
    command = f"{sys.executable} -m nanogpt.generate {path} --max-new-tokens 300 | head -c 1"
    done = subprocess.run(
        command, shell=True, capture_output=True, cwd=Path(__file__).parent.parent
    )
    assert done.stderr == b""
