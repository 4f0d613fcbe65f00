"""Which models there are, and what they are called."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from serving.engine.registry import Entry, Registry, find_entries, model_id
from tests.engine_models import write_model


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pretrain-gpt2_small-text", "pretrain-gpt2_small-text"),
        ("Quick Start!", "quick-start"),
        ("sweeps/lr/3", "sweeps-lr-3"),
        ("gpt2-adamw", "gpt2-a-damw"),  # chat clients drop ids with "ada"
        ("whisper-tts", "w-hisper-t-ts"),
        ("o1-mini", "model-o1-mini"),
        ("...", "model"),
    ],
)
def test_ids_are_slugs_that_chat_clients_show(name: str, expected: str) -> None:
    assert model_id(name) == expected


def test_every_run_under_a_directory_is_a_model(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "checkpoints" / "last.ckpt")
    touch(tmp_path / "a" / "checkpoints" / "step_000010.ckpt")
    touch(tmp_path / "sweep" / "b" / "checkpoints" / "last.ckpt")
    assert [entry.id for entry in find_entries(tmp_path)] == ["a", "sweep-b"]


def test_a_run_and_its_file_have_the_run_s_name(tmp_path: Path) -> None:
    path = touch(tmp_path / "my run" / "checkpoints" / "last.ckpt")
    for models in (path, tmp_path / "my run"):
        (entry,) = find_entries(models)
        assert entry.id == "my-run"
        assert {"my run", "my run.ckpt", "my run.pt", "my-run.pt"} <= set(entry.aliases)


def test_a_run_is_found_by_its_name_under_runs_dir(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "checkpoints" / "last.ckpt")
    assert [entry.id for entry in Registry("a", str(tmp_path)).entries] == ["a"]


def test_equal_ids_are_numbered(tmp_path: Path) -> None:
    for name in ("a b", "a-b", "a_b"):
        touch(tmp_path / name / "checkpoints" / "last.ckpt")
    assert [entry.id for entry in find_entries(tmp_path)] == ["a-b", "a-b-2", "a_b"]


@pytest.mark.parametrize(
    ("runs", "name", "path"),
    [
        (("a/q", "q"), "q", "q"),
        (("a/q", "q"), "q.ckpt", "q"),
        (("a/q", "q"), "a/q", "a/q"),
        (("A/Q Run", "Q Run"), "Q Run", "Q Run"),
        (("a b", "a-b"), "a-b", "a-b"),
        (("q", "q.pt"), "q.pt", "q.pt"),
        (("a/q", "b/q"), "q", "a/q"),
    ],
)
def test_a_name_is_one_model_s_only(
    tmp_path: Path, runs: tuple[str, ...], name: str, path: str
) -> None:
    for run in runs:
        touch(tmp_path / run / "checkpoints" / "last.ckpt")
    named = [e.path for e in find_entries(tmp_path) if name == e.id or name in e.aliases]
    assert named == [tmp_path / path / "checkpoints" / "last.ckpt"]


def test_names_are_keys_and_never_paths(tmp_path: Path) -> None:
    path = touch(tmp_path / "runs" / "a" / "checkpoints" / "last.ckpt")
    registry = Registry(str(tmp_path / "runs"))
    for name in (str(path), "../runs/a", "a/checkpoints/last.ckpt", ""):
        assert registry.find(name) is None
    assert registry.find("a.pt") == registry.find("a") == registry.default


def test_the_default_is_the_one_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        touch(tmp_path / name / "checkpoints" / "last.ckpt")
    default = Registry(str(tmp_path), default="a.ckpt").default
    assert default is not None
    assert default.id == "a"


def test_the_default_to_generate_is_the_newest_that_can(tmp_path: Path) -> None:
    kinds = {"older": None, "newer": None, "spam": ["ham", "spam"], "broken": None}
    for seconds, (name, labels) in enumerate(kinds.items()):
        path = tmp_path / name / "checkpoints" / "last.ckpt"
        touch(path) if name == "broken" else write_model(path, labels=labels)
        os.utime(path, (seconds, seconds))
    registry = Registry(str(tmp_path))
    assert (id_of(registry.default), id_of(registry.default_to_generate)) == ("broken", "newer")
    shutil.rmtree(tmp_path / "newer")
    registry.rescan()
    assert id_of(registry.default_to_generate) == "older"
    shutil.rmtree(tmp_path / "older")
    registry.rescan()
    assert registry.default_to_generate == registry.default


def id_of(entry: Entry | None) -> str:
    assert entry is not None
    return entry.id


def test_the_default_that_is_named_is_the_default_to_generate_too(tmp_path: Path) -> None:
    write_model(tmp_path / "spam" / "checkpoints" / "last.ckpt", labels=["ham", "spam"])
    write_model(tmp_path / "text" / "checkpoints" / "last.ckpt")
    assert id_of(Registry(str(tmp_path), default="spam").default_to_generate) == "spam"


def test_a_directory_that_vanishes_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "gone", "z"):
        touch(tmp_path / name / "checkpoints" / "last.ckpt")
    listed = os.scandir

    def vanishing(path: Any) -> Any:
        if Path(path).name == "gone":
            raise FileNotFoundError(path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert [entry.id for entry in find_entries(tmp_path)] == ["a", "z"]


def test_a_directory_may_fill_later(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "runs"))
    assert registry.default is None
    touch(tmp_path / "runs" / "a" / "checkpoints" / "last.ckpt")
    assert registry.rescan()
    assert not registry.rescan()
    assert registry.find("a")
