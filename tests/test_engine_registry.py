"""Which models there are, and what they are called."""

import json
import os
import re
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
        ("Test_2.1", "Test_2.1"),
        ("中文模型", "中文模型"),
        ("हिन्दी-модель", "हिन्दी-модель"),
        ("Cafe\u0301", "Caf\u00e9"),  # NFC
        ("gpt2-adamw", "gpt2-a-damw"),  # chat clients drop ids with "ada"
        ("whisper-tts", "w-hisper-t-ts"),
        ("o1-mini", "model-o1-mini"),
        ("Ada", "A-da"),
    ],
)
def test_ids_are_names_that_chat_clients_show(name: str, expected: str) -> None:
    assert model_id(name) == expected


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("Quick Start!", "Quick-Start"),
        ("sweeps/lr=1e-3", "sweeps-lr-1e-3"),
        ("...", "model"),
        ("🙂", "model"),
        ("一号 🙂", "一号"),
        ("gpt2-a-damw", "gpt2-a-damw"),  # reads like the id of gpt2-adamw
        ("model-o1-mini", "model-o1-mini"),
        ("x-searching-y", "x-searching-y"),
        ("caf\\xe9", "caf-xe9"),
    ],
)
def test_an_id_that_lost_characters_has_a_hash_of_the_name(name: str, start: str) -> None:
    assert re.fullmatch(re.escape(start) + "-[0-9a-f]{6}", model_id(name))


def test_ids_do_not_depend_on_what_else_exists(tmp_path: Path) -> None:
    names = [
        "中文模型",
        "测试",
        "一号",
        "a b",
        "a-b",
        "a/b",
        "A-B",
        "model",
        "...",
        "a b!",
        "model-2",
    ]
    for name in names:
        touch(tmp_path / "all" / name / "last.ckpt")
        touch(tmp_path / name / name / "last.ckpt")
    together = {entry.name: entry.id for entry in find_entries(tmp_path / "all")}
    alone = {name: find_entries(tmp_path / name)[0].id for name in names if "/" not in name}
    assert together == alone | {"a/b": model_id("a/b")}
    assert len(set(together.values())) == len(names)


def test_names_that_differ_in_their_bytes_only_are_two_models(tmp_path: Path) -> None:
    for name in ("caf\u00e9", "cafe\u0301"):
        touch(tmp_path / name / "last.ckpt")
    ids = [entry.id for entry in find_entries(tmp_path)]
    assert len(set(ids)) == 2
    assert "caf\u00e9" in ids


def test_a_name_that_is_not_utf8_is_a_model_like_others(tmp_path: Path) -> None:
    touch(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")) / "last.ckpt")
    (entry,) = find_entries(tmp_path)
    assert entry.name == "caf\\xe9"
    assert "".join((entry.id, *entry.aliases)).encode()


def test_what_is_no_file_is_no_model(tmp_path: Path) -> None:
    for name in ("fifo", "loop", "fine"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "fifo" / "last.ckpt")
    (tmp_path / "loop" / "last.ckpt").symlink_to("last.ckpt")
    touch(tmp_path / "fine" / "last.ckpt")
    assert [entry.id for entry in find_entries(tmp_path)] == ["fine"]


def test_every_run_under_a_directory_is_a_model(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "checkpoints" / "last.ckpt")
    touch(tmp_path / "a" / "checkpoints" / "step_000010.ckpt")
    touch(tmp_path / "sweep" / "b" / "checkpoints" / "last.ckpt")
    assert [entry.name for entry in find_entries(tmp_path)] == ["a", "sweep/b"]


def test_a_run_and_its_file_have_the_run_s_name(tmp_path: Path) -> None:
    path = touch(tmp_path / "my run" / "checkpoints" / "last.ckpt")
    for models in (path, tmp_path / "my run"):
        (entry,) = find_entries(models)
        assert (entry.id, entry.name) == (model_id("my run"), "my run")
        assert {"my run", "my run.ckpt", "my run.pt", "my-run.pt"} <= set(entry.aliases)


@pytest.mark.parametrize("models", ["", "sweep/hf"])
def test_the_directory_of_a_hugging_face_model_is_a_model(tmp_path: Path, models: str) -> None:
    config = {"model_type": "llama", **dict.fromkeys(("vocab_size", "num_hidden_layers"), 1)}
    config |= {"num_attention_heads": 1, "hidden_size": 8, "intermediate_size": 8}
    config |= {"max_position_embeddings": 32, "architectures": ["LlamaForCausalLM"]}
    for name in ("sweep/hf", "other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    weights = touch(tmp_path / "sweep" / "hf" / "model.safetensors")
    (entry,) = find_entries(tmp_path / models)
    assert entry.name == ("hf" if models else "sweep/hf")
    assert (entry.path, entry.task, entry.max_model_len) == (weights.parent, "generate", 32)
    os.utime(weights, (5e9, 5e9))
    assert find_entries(tmp_path / models)[0].revision != entry.revision


def test_a_run_is_found_by_its_name_under_runs_dir(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "checkpoints" / "last.ckpt")
    assert [entry.id for entry in Registry("a", str(tmp_path)).entries] == ["a"]


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
    assert registry.find("a.pt") == registry.find("a") == registry.default()


def test_the_default_is_the_one_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        touch(tmp_path / name / "checkpoints" / "last.ckpt")
    default = Registry(str(tmp_path), default="a.ckpt").default()
    assert default is not None
    assert default.id == "a"


@pytest.mark.parametrize(
    ("steps_by_age", "expected"),
    [
        ([500, None], "0"),  # finished before one that is not
        ([500, 2], "0"),  # a training before a trial
        ([20, 2], "0"),
        ([2, None], "0"),
        ([500, 400], "1"),  # of two trainings the newer
        ([None, None], "1"),
    ],
)
def test_the_default_is_the_newest_training_that_finished(
    tmp_path: Path, steps_by_age: list[int | None], expected: str
) -> None:
    for seconds, steps in enumerate(steps_by_age):
        path = touch(tmp_path / str(seconds) / "checkpoints" / "last.ckpt")
        os.utime(path, (seconds, seconds))
        if steps is not None:
            (tmp_path / str(seconds) / "summary.json").write_text(json.dumps({"steps": steps}))
    assert id_of(Registry(str(tmp_path)).default()) == expected


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, '{"steps": NaN}', "\0"])
def test_a_damaged_summary_spoils_no_other_run(tmp_path: Path, content: str) -> None:
    for name in ("a", "b"):
        touch(tmp_path / name / "checkpoints" / "last.ckpt")
    (tmp_path / "a" / "summary.json").write_text(content)
    assert {entry.id for entry in Registry(str(tmp_path)).entries} == {"a", "b"}


def test_the_default_to_classify_is_a_classifier_where_there_is_one(tmp_path: Path) -> None:
    write_model(tmp_path / "spam" / "last.ckpt", labels=["ham", "spam"])
    os.utime(tmp_path / "spam" / "last.ckpt", (1, 1))
    write_model(tmp_path / "text" / "last.ckpt")
    registry = Registry(str(tmp_path))
    assert id_of(registry.default("classify")) == "spam"
    assert id_of(registry.default()) == id_of(registry.default("generate")) == "text"
    shutil.rmtree(tmp_path / "spam")
    registry.rescan()
    assert id_of(registry.default("classify")) == "text"


def test_the_default_to_generate_is_the_newest_that_can(tmp_path: Path) -> None:
    kinds = {"older": None, "newer": None, "spam": ["ham", "spam"], "broken": None}
    for seconds, (name, labels) in enumerate(kinds.items()):
        path = tmp_path / name / "checkpoints" / "last.ckpt"
        touch(path) if name == "broken" else write_model(path, labels=labels)
        os.utime(path, (seconds, seconds))
    registry = Registry(str(tmp_path))
    assert (id_of(registry.default()), id_of(registry.default("generate"))) == ("spam", "newer")
    shutil.rmtree(tmp_path / "newer")
    registry.rescan()
    assert id_of(registry.default("generate")) == "older"
    shutil.rmtree(tmp_path / "older")
    registry.rescan()
    assert registry.default("generate") == registry.default()


def id_of(entry: Entry | None) -> str:
    assert entry is not None
    return entry.id


def test_the_default_that_is_named_is_the_default_to_generate_too(tmp_path: Path) -> None:
    write_model(tmp_path / "spam" / "checkpoints" / "last.ckpt", labels=["ham", "spam"])
    write_model(tmp_path / "text" / "checkpoints" / "last.ckpt")
    assert id_of(Registry(str(tmp_path), default="spam").default("generate")) == "spam"


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
    assert registry.default() is None
    touch(tmp_path / "runs" / "a" / "checkpoints" / "last.ckpt")
    assert registry.rescan()
    assert not registry.rescan()
    assert registry.find("a")


def test_an_entry_has_the_context_of_its_model(tmp_path: Path) -> None:
    write_model(tmp_path / "text" / "last.ckpt", block_size=48)
    touch(tmp_path / "broken" / "last.ckpt")
    found = {entry.id: entry.max_model_len for entry in find_entries(tmp_path)}
    assert found == {"text": 48, "broken": None}


def test_an_entry_that_did_not_load_is_no_default_while_there_is_another(tmp_path: Path) -> None:
    for seconds, name in enumerate(("older", "newer")):
        path = tmp_path / name / "checkpoints" / "last.ckpt"
        write_model(path)
        os.utime(path, (seconds, seconds))
    registry = Registry(str(tmp_path))
    newer = registry.default()
    assert newer is not None
    assert newer.id == "newer"
    registry.failures[newer.key] = (0.0, "injected")
    assert (id_of(registry.default()), id_of(registry.default("generate"))) == ("older", "older")
    os.utime(newer.path, (5, 5))
    registry.rescan()
    assert id_of(registry.default()) == "newer"
