"""Damaged files of a run: each is made anew, or named in one sentence; no work is lost."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from nanogpt.checkpoint import read_checkpoint
from nanogpt.evaluation.results import add_evaluation
from nanogpt.training.checkpointing import Checkpointing
from tests.conftest import TINY_RUN

OPTIONS = (
    "max_steps=6",
    "callbacks.checkpoint.every_n_steps=2",
    "callbacks.samples.every_n_steps=2",
)
TEXTS = "config.yaml metrics.csv samples.txt summary.json report.html evaluations.json"
CHECKPOINTS = "last.ckpt step_000004.ckpt"

Damage = Callable[[Path], object]
WAYS: dict[str, Damage] = {
    "deleted": lambda path: path.unlink(),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "NULs": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x80" * 50 + b"\n" + path.read_bytes()),
    "nested deeply": lambda path: path.write_text("[" * 3000 + "]" * 3000),
    "a list": lambda path: path.write_text("- 1\n" if path.suffix == ".yaml" else "[1]\n"),
}
CHECKPOINT_WAYS: dict[str, Damage] = {
    **{name: WAYS[name] for name in ("deleted", "truncated", "NULs")},
    "a bit flipped in the directory": lambda path: flip(path, -60),
    "a bit flipped in the weights": lambda path: flip(path, path.stat().st_size // 2),
}


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def command(folder: Path, *options: str) -> int:
    """Issue the run's command in this process; return its exit code."""
    places = [f"{key}_dir={folder / key}" for key in ("runs", "data")]
    corpus = f"data.path={folder / 'corpus.txt'}"
    return train.main([*TINY_RUN, *OPTIONS, *places, corpus, "name=tiny", *options])


@pytest.fixture(scope="module")
def runs(corpus_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run, and one that was interrupted after its checkpoint at step 4."""
    folders = {state: tmp_path_factory.mktemp(state) for state in ("finished", "interrupted")}
    save = Checkpointing.save

    def interrupted(self: Checkpointing, *args: Any) -> None:
        save(self, *args)
        if self.saved_step == 4:
            raise OSError("interrupted")

    for state, folder in folders.items():
        shutil.copy(corpus_path, folder / "corpus.txt")
        with pytest.MonkeyPatch.context() as patch:
            if state == "interrupted":
                patch.setattr(Checkpointing, "save", interrupted)
            assert command(folder) == (state == "interrupted")
        row = {"checkpoint": "tiny", "task": "perplexity", "results": {"perplexity": 2.0}}
        add_evaluation(folder / "runs" / "tiny", row, {"step": 4})
    return folders


@pytest.fixture
def copy(runs: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of a run's directories; hard links stay hard links."""

    def copied(state: str) -> Path:
        os.system(f"cp -a {runs[state]}/. {tmp_path}/run")
        return tmp_path / "run"

    return copied


@pytest.fixture
def weights(runs: dict[str, Path]) -> str:
    """The hash of the weights that the unbroken run ends with."""
    summary = json.loads((runs["finished"] / "runs" / "tiny" / "summary.json").read_text())
    return str(summary["weights_sha256"])


def check_finished(run_dir: Path, weights: str) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["weights_sha256"]) == (6, weights)
    assert (run_dir / "report.html").exists()
    assert read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"] == 6


@pytest.mark.parametrize("state", ["finished", "interrupted"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TEXTS.split())
def test_a_damaged_file_is_made_anew_or_named(
    name: str,
    way: str,
    state: str,
    copy: Callable[[str], Path],
    weights: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = copy(state)
    path = folder / "runs" / "tiny" / name
    if not path.exists():
        pytest.skip("an interrupted run has no such file")
    WAYS[way](path)
    code = command(folder)
    if name == "config.yaml":
        assert code == 1
        [line] = capfd.readouterr().err.splitlines()
        assert str(path.parent) in line
        assert "resume=false overwrite=true" in line
        assert len(list((path.parent / "checkpoints").glob("step_*"))) == 2
    elif name == "metrics.csv" and state == "interrupted" and way in ("not UTF-8", "a list"):
        assert code == 1
        [line] = capfd.readouterr().err.splitlines()
        assert line.startswith(f"train.py: {path} begins with")
    else:
        assert code == 0
        check_finished(path.parent, weights)


@pytest.mark.parametrize("state", ["finished", "interrupted"])
@pytest.mark.parametrize("way", CHECKPOINT_WAYS)
@pytest.mark.parametrize("name", CHECKPOINTS.split())
def test_the_newest_checkpoint_that_verifies_is_continued(
    name: str, way: str, state: str, copy: Callable[[str], Path], weights: str
) -> None:
    folder = copy(state)
    checkpoints = folder / "runs" / "tiny" / "checkpoints"
    CHECKPOINT_WAYS[way](checkpoints / name)
    assert command(folder) == 0
    check_finished(checkpoints.parent, weights)
