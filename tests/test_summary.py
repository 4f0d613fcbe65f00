"""What a run says at its end."""

import shlex
from pathlib import Path

import pytest

from nanogpt.training.summary import next_commands


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_the_next_command_has_the_prompt_of_the_data_whatever_it_holds(stage: str) -> None:
    prompt = 'It\'s $5: "a" `b`'
    first = next_commands(stage, Path("runs/one"), prompt)[0]
    assert shlex.split(first)[-3:] == ["runs/one", "--prompt", prompt]


def test_a_classifier_is_not_asked_to_write() -> None:
    assert not any("generate" in command for command in next_commands("classify", Path("r"), "x"))
