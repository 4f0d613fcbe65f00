"""What a command continues, what it refuses, and what a failed one leaves behind."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nanogpt.checkpoint import read_checkpoint
from tests.test_train import fit, metrics

SHORT = ("max_steps=4", "callbacks.checkpoint.every_n_steps=2")


def lose_the_end(run_dir: Path) -> None:
    """Make a finished run one that was interrupted after step 2."""
    (run_dir / "summary.json").unlink()
    (run_dir / "checkpoints" / "step_000004.ckpt").unlink()
    (run_dir / "checkpoints" / "last.ckpt").unlink()


def test_another_runs_checkpoint_is_refused_and_the_runs_own_continued_without_it(
    tiny_run: list[str], tmp_path: Path
) -> None:
    fit(*tiny_run, *SHORT)
    fit(*tiny_run, *SHORT, "seed=2", "name=other")
    own = tmp_path / "runs" / "tiny" / "checkpoints"
    lose_the_end(own.parent)
    other = tmp_path / "runs" / "other" / "checkpoints" / "last.ckpt"
    shutil.copy(other, own / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt is a checkpoint of another run; remove it"):
        fit(*tiny_run, *SHORT)
    assert (own / "last.ckpt").read_bytes() == other.read_bytes()
    (own / "last.ckpt").unlink()
    assert fit(*tiny_run, *SHORT)["steps"] == 4


def test_a_checkpoint_of_the_same_settings_on_another_corpus_is_refused(
    tiny_run: list[str], tmp_path: Path
) -> None:
    fit(*tiny_run, *SHORT)
    (tmp_path / "own.txt").write_text("one two three four five six seven eight nine " * 40)
    fit(*tiny_run, *SHORT, f"data.path={tmp_path / 'own.txt'}", "name=other")
    runs = tmp_path / "runs"
    lose_the_end(runs / "tiny")
    shutil.copy(runs / "other/checkpoints/last.ckpt", runs / "tiny/checkpoints/last.ckpt")
    with pytest.raises(ValueError, match="another run"):
        fit(*tiny_run, *SHORT)


def test_a_checkpoint_without_its_run_is_continued(tiny_run: list[str], tmp_path: Path) -> None:
    import torch

    fit(*tiny_run, *SHORT)
    lose_the_end(tmp_path / "runs" / "tiny")
    path = tmp_path / "runs" / "tiny" / "checkpoints" / "step_000002.ckpt"
    content = read_checkpoint(path)
    del content["nanogpt"]["run"]
    torch.save(content, tmp_path / "older")
    os.replace(tmp_path / "older", path)
    assert fit(*tiny_run, *SHORT)["steps"] == 4


@pytest.mark.parametrize("data_is_lost", [False, True])
def test_a_run_continues_with_the_pattern_that_it_began_with(
    data_is_lost: bool, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bpe = ("tokenizer=bpe", "tokenizer.vocab_size=280")
    with monkeypatch.context() as patch:
        for module in ("tokenizer", "data.preparing"):
            patch.setattr(f"nanogpt.{module}.BPE_PATTERN", r" ?\w+|\s+|.")
        whole = fit(*tiny_run, *SHORT, *bpe)
    lose_the_end(tmp_path / "runs" / "tiny")
    if data_is_lost:
        shutil.rmtree(tmp_path / "data")
    assert fit(*tiny_run, *SHORT, *bpe)["weights_sha256"] == whole["weights_sha256"]
    record = read_checkpoint(tmp_path / "runs" / "tiny" / "checkpoints" / "last.ckpt")
    assert record["nanogpt"]["tokenizer"]["pattern"] == r" ?\w+|\s+|."


def test_a_dangling_link_is_no_checkpoint(
    tiny_run: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fit(*tiny_run, *SHORT)
    lose_the_end(tmp_path / "runs" / "tiny")
    last = tmp_path / "runs" / "tiny" / "checkpoints" / "last.ckpt"
    last.symlink_to(tmp_path / "nowhere")
    assert fit(*tiny_run, *SHORT)["weights_sha256"] == whole["weights_sha256"]
    assert "continuing at step 2, from" in caplog.text
    assert "step_000002.ckpt" in caplog.text


def test_a_finished_run_given_other_data_is_refused(tiny_run: list[str], tmp_path: Path) -> None:
    fit(*tiny_run, *SHORT)
    (tmp_path / "own.txt").write_text("one two three four five six seven eight nine " * 40)
    with pytest.raises(ValueError, match="another corpus"):
        fit(*tiny_run, *SHORT, f"data.path={tmp_path / 'own.txt'}")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        fit(*tiny_run, *SHORT, f"data.path={tmp_path / 'nowhere.txt'}")
    assert (tmp_path / "runs" / "tiny" / "summary.json").exists()


def test_another_seed_does_not_take_over_a_run_that_lost_its_checkpoints(
    tiny_run: list[str], tmp_path: Path
) -> None:
    fit(*tiny_run, *SHORT)
    shutil.rmtree(tmp_path / "runs" / "tiny" / "checkpoints")
    (tmp_path / "runs" / "tiny" / "summary.json").unlink()
    with pytest.raises(ValueError, match="seed: 1337 is recorded, 2 is configured"):
        fit(*tiny_run, *SHORT, "seed=2")
    assert len(metrics(tmp_path / "runs" / "tiny", "step")) == 4


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_whose_raw_text_is_gone_continues_with_its_shards(
    is_finished: bool, tiny_run: list[str], tmp_path: Path
) -> None:
    text = tmp_path / "own.txt"
    text.write_text("one two three four five six seven eight nine ten " * 40)
    whole = fit(*tiny_run, *SHORT, f"data.path={text}")
    text.unlink()
    if not is_finished:
        lose_the_end(tmp_path / "runs" / "tiny")
    again = fit(*tiny_run, *SHORT, f"data.path={text}")
    assert again["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.parametrize(
    "option",
    [
        "model.activation=tanh",
        "data.path=nowhere.txt",
        "grad_clip=-1",
        "optim.learning_rate=abc",
        "init_from=nowhere",
        "tokens_per_step=100",
        "data=labelled",
    ],
)
def test_a_failed_command_leaves_no_run_directory(
    option: str,
    tiny_run: list[str],
    tmp_path: Path,
    main: Callable[..., int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        assert main(*tiny_run, option) in (1, 2)
    assert not (tmp_path / "runs").exists()
    assert "a new run" not in caplog.text


def test_an_old_run_is_replaced_only_once_its_replacement_can_begin(
    tiny_run: list[str], tmp_path: Path
) -> None:
    summary = fit(*tiny_run, *SHORT)
    with pytest.raises(FileNotFoundError):
        fit(*tiny_run, *SHORT, "resume=false", "overwrite=true", "data.path=nowhere.txt")
    assert fit(*tiny_run, *SHORT) == summary


def test_nothing_of_a_replaced_run_is_left(tiny_run: list[str], tmp_path: Path) -> None:
    fit(*tiny_run, *SHORT)
    (tmp_path / "runs" / "tiny" / "evaluations.json").write_text("[]\n")
    fit(*tiny_run, "max_steps=1", "resume=false", "overwrite=true")
    assert not (tmp_path / "runs" / "tiny" / "evaluations.json").exists()
    left = {path.name for path in (tmp_path / "runs" / "tiny" / "checkpoints").iterdir()}
    assert left == {"last.ckpt", "step_000001.ckpt"}
