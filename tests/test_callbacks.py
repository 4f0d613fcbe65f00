"""Retention of checkpoints, samples after a restored step, and Lightning as it is relied on."""

import threading
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nanogpt.training.checkpointing as checkpointing_module
from nanogpt.checkpoint import read_checkpoint, record
from nanogpt.disk import link_atomically
from nanogpt.model import GPT, GPTConfig
from nanogpt.runs.directory import cut_samples
from nanogpt.tokenizer import byte_tokenizer
from nanogpt.training.checkpointing import AtomicCheckpointIO, Checkpointing
from nanogpt.training.module import is_due


def checkpointing(directory: Path, keep: int) -> Checkpointing:
    built = Checkpointing(directory, every_n_steps=1, keep=keep)
    built.directory = directory
    return built


@pytest.mark.parametrize(
    ("keep", "best", "expected"),
    [(2, None, [3, 4]), (1, (0.5, 2), [2, 4]), (0, (0.5, 2), [2]), (9, None, [1, 2, 3, 4])],
)
def test_the_newest_and_the_best_stay(
    tmp_path: Path, keep: int, best: tuple[float, int] | None, expected: list[int]
) -> None:
    callback = checkpointing(tmp_path, keep)
    callback.best = best
    for step in range(1, 5):
        (tmp_path / f"step_{step:06d}.ckpt").touch()
    callback._remove_old(4)
    assert [int(p.stem[5:]) for p in sorted(tmp_path.glob("step_*.ckpt"))] == expected


def test_the_best_is_remembered_over_a_restart(tmp_path: Path) -> None:
    callback = checkpointing(tmp_path, 1)
    callback.best = (0.5, 2)
    again = checkpointing(tmp_path, 1)
    again.load_state_dict(callback.state_dict())
    assert again.best == (0.5, 2)


def test_a_link_replaces_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("new")
    (tmp_path / "last").write_text("old")
    link_atomically(tmp_path / "new", tmp_path / "last")
    assert (tmp_path / "last").read_text() == "new"


def test_without_hard_links_the_file_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("not supported")

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "new").write_text("new")
    link_atomically(tmp_path / "new", tmp_path / "last")
    assert (tmp_path / "last").read_text() == "new"


def test_samples_after_the_restored_step_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "samples.txt"
    path.write_text("=== step 5 ===\na\n=== step 10 ===\nb\n=== step 15 ===\nc\n")
    cut_samples(path, 10)
    assert path.read_text() == "=== step 5 ===\na\n=== step 10 ===\nb\n"


def test_everything_is_due_at_the_last_step() -> None:
    trainer: Any = SimpleNamespace(max_steps=7)
    assert [step for step in range(1, 8) if is_due(step, 3, trainer)] == [3, 6, 7]


@pytest.fixture
def content() -> dict[str, Any]:
    config = GPTConfig(block_size=8, vocab_size=273, n_layer=1, n_head=2, n_embd=8)
    return {
        "global_step": 1,
        "state_dict": {f"model.{name}": w for name, w in GPT(config).state_dict().items()},
        "nanogpt": record("pretrain", config, byte_tokenizer()),
    }


def test_a_checkpoint_that_cannot_be_read_back_is_not_left(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    path = tmp_path / "step_000001.ckpt"
    with pytest.raises(ValueError, match=r"step_000001\.ckpt .*holds Python objects"):
        AtomicCheckpointIO().save_checkpoint({**content, "state": Fraction(1, 2)}, path)
    assert list(tmp_path.iterdir()) == []
    AtomicCheckpointIO().save_checkpoint(content, path)
    assert path.is_file()


def test_a_checkpoint_is_written_while_training_changes_the_weights(
    tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, may_write, done = tmp_path / "step_000001.ckpt", threading.Event(), []
    write = checkpointing_module.write_checkpoint

    def write_later(*arguments: Any) -> None:
        assert may_write.wait(10)
        write(*arguments)

    monkeypatch.setattr(checkpointing_module, "write_checkpoint", write_later)
    saver = AtomicCheckpointIO()
    saver.then = lambda: done.append(path.is_file())
    name, weight = next(iter(content["state_dict"].items()))
    expected = weight.clone()
    saver.save_checkpoint(content, path)
    weight += 1
    assert not done
    may_write.set()
    saver.teardown()
    assert done == [True]
    assert torch.equal(read_checkpoint(path)["state_dict"][name], expected)


def test_what_a_thread_could_not_write_is_raised_once_and_nothing_follows(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    saver = AtomicCheckpointIO()
    saver.then = lambda: (tmp_path / "last.ckpt").touch()
    saver.save_checkpoint({**content, "state": Fraction(1, 2)}, tmp_path / "step_000001.ckpt")
    with pytest.raises(ValueError, match=r"step_000001\.ckpt .*holds Python objects"):
        saver.save_checkpoint(content, tmp_path / "step_000002.ckpt")
    saver.join()
    assert list(tmp_path.iterdir()) == []
