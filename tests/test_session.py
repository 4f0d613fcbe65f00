"""What a run starts from may be cut to a shorter context, and never in silence."""

import logging
from dataclasses import asdict
from pathlib import Path

import pytest

from nanogpt.checkpoint import Checkpoint
from nanogpt.model import GPT, GPTConfig
from nanogpt.runs.run import adapt
from nanogpt.tokenizer import byte_tokenizer


@pytest.fixture
def start() -> Checkpoint:
    tokenizer = byte_tokenizer()
    config = GPTConfig(
        block_size=32, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8
    )
    model = GPT(config)
    return Checkpoint(
        model, tokenizer, None, None, "pretrain", config, 0, Path("data/weights/gpt2")
    )


def test_a_shorter_block_size_is_logged_in_one_line(
    start: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="nanogpt"):
        cut = adapt(start, {"block_size": 8}, {"model.block_size": 8})
    assert cut.config.block_size == 8
    assert caplog.messages == [
        "data/weights/gpt2: block_size cut from 32 to 8, with the position embeddings beyond it"
    ]


def test_a_block_size_that_was_not_typed_cuts_nothing(start: Checkpoint) -> None:
    assert adapt(start, {"block_size": 8}, {}) is start


def test_a_longer_block_size_is_refused(start: Checkpoint) -> None:
    model = {**asdict(start.config), "block_size": 64}
    with pytest.raises(ValueError, match=r"has block_size=32 but .* model\.block_size=64"):
        adapt(start, model, {"model.block_size": 64})
