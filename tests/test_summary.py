"""The summary of a run at its end."""

import logging
import shlex
from pathlib import Path

import pytest

from nanogpt.training.summary import log_summary, next_commands


@pytest.mark.parametrize(("mfu", "shown"), [(0.0, ""), (0.38, ", MFU 38 %")])
def test_an_unknown_mfu_is_left_out(
    mfu: float, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = {"stage": "pretrain", "steps": 2, "tokens": 512, "wall_s": 2, "train_s": 1}
    with caplog.at_level(logging.INFO):
        log_summary(
            {**metrics, "tokens_per_s": 512.0, "mfu": mfu, "val_loss": 1.0},
            Path("r"),
            {"prompts": []},
        )
    assert f"(512 tokens/s{shown})" in caplog.text


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_the_next_command_has_the_prompt_of_the_data_whatever_it_holds(stage: str) -> None:
    prompt = 'It\'s $5: "a" `b`'
    first = next_commands({"stage": stage}, Path("runs/one"), {"prompts": ["", prompt]})[0]
    assert shlex.split(first)[-3:] == ["runs/one", "--prompt", prompt]


def test_the_next_commands_fit_what_was_done() -> None:
    run_dir, pretrained, own = Path("runs/it's"), {"stage": "pretrain"}, {"path": "a.txt"}
    assert not any("YOUR_FOLDER" in c for c in next_commands(pretrained, run_dir, own))
    large = next_commands(pretrained | {"n_params": 124_000_000}, run_dir, {})
    assert not any("gpt2_small" in command for command in large)
    init_from = shlex.split(large[2], comments=True)[-1]
    assert init_from == f"init_from={run_dir}"
    assert not any("YOUR" in c for c in next_commands({"stage": "instruct"}, run_dir, own))
    assert any("YOUR_FILE" in c for c in next_commands({"stage": "instruct"}, run_dir, {}))


def test_a_model_with_a_foreign_block_is_generated_from_with_its_package_allowed() -> None:
    commands = next_commands(
        {"stage": "pretrain"}, Path("r"), {"prompts": ["x"]}, block="my_package.blocks.MyBlock"
    )
    assert commands == [
        "python -m nanogpt.generate r --prompt x --allow-module my_package",
    ]


def test_a_classifier_writes_no_samples() -> None:
    commands = next_commands({"stage": "classify"}, Path("r"), {})
    assert not any("generate" in command for command in commands)
