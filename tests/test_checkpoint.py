"""The checkpoint contract: written atomically, verified when read, refused in one sentence."""

import errno
import io
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt.checkpoint import (
    Checkpoint,
    load_checkpoint,
    read_checkpoint,
    record,
    weights_sha256,
    with_special_tokens,
    write_checkpoint,
)
from nanogpt.model import GPT, GPTConfig
from nanogpt.runs.directory import RunDirectory, find_checkpoint, step_checkpoints
from nanogpt.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer, byte_tokenizer

CONFIG = GPTConfig(block_size=8, vocab_size=273, n_layer=1, n_head=2, n_embd=8)


def content(model: GPT) -> dict[str, Any]:
    return {
        "global_step": 3,
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "nanogpt": record("pretrain", CONFIG, byte_tokenizer()),
    }


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


@pytest.fixture
def path(tmp_path: Path, model: GPT) -> Path:
    write_checkpoint(content(model), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_a_loaded_checkpoint_is_the_model_and_its_tokenizer(path: Path, model: GPT) -> None:
    loaded = load_checkpoint(path)
    assert weights_sha256(loaded.model) == weights_sha256(model)
    assert loaded.tokenizer.encode("é") == byte_tokenizer().encode("é")
    assert (loaded.stage, loaded.step, loaded.config) == ("pretrain", 3, CONFIG)
    assert not loaded.model.training


def test_it_loads_as_plain_types_and_memory_mapped(path: Path) -> None:
    raw = torch.load(path, weights_only=True, mmap=True)
    assert raw["nanogpt"]["model"]["n_embd"] == 8


def test_loading_brings_in_neither_lightning_nor_hydra(path: Path) -> None:
    code = (
        "import sys; from nanogpt import load_checkpoint; load_checkpoint(sys.argv[1]);"
        "assert not {'lightning', 'hydra'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_a_failed_write_leaves_the_old_file_and_no_rest(
    path: Path, model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: save(content, Full()))
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(content(model), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_every_flipped_byte_of_the_weights_is_noticed(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size)
    data = bytearray(path.read_bytes())
    data[entry.header_offset + 200 + entry.file_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is truncated, altered"):
        read_checkpoint(path)


@pytest.mark.parametrize("size", [0, 10, 1000, -1])
def test_a_truncated_file_is_refused_and_an_older_one_named(path: Path, size: int) -> None:
    (path.parent / "step_000001.ckpt").write_bytes(path.read_bytes())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"an older one is .*step_000001\.ckpt"):
        load_checkpoint(path)


def test_the_other_name_of_the_same_file_is_no_alternative(path: Path) -> None:
    os.link(path, path.parent / "step_000003.ckpt")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="use another checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("newest_is_intact", [True, False])
def test_the_file_that_is_recommended_verifies_and_is_the_newest_by_number(
    path: Path, newest_is_intact: bool
) -> None:
    older, newest = path.parent / "step_999999.ckpt", path.parent / "step_1000000.ckpt"
    older.write_bytes(path.read_bytes())
    newest.write_bytes(path.read_bytes() if newest_is_intact else b"torn")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=(newest if newest_is_intact else older).name):
        load_checkpoint(path)


def test_a_step_of_another_form_is_no_checkpoint_of_a_step(tmp_path: Path) -> None:
    for name in ("step_2.ckpt", "step_000010.ckpt", "step_best.ckpt", "step_3.ckpt.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "step_000011.ckpt").symlink_to(tmp_path / "gone")
    assert list(step_checkpoints(tmp_path)) == [2, 10]


def test_a_file_with_two_names_is_one_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.create()
    for number in (4, 8, 12):
        (run.checkpoints_dir / f"step_{number:06d}.ckpt").touch()
    assert [p.stem for p in run.checkpoints()] == [f"step_{n:06d}" for n in (12, 8, 4)]
    os.link(run.checkpoints_dir / "step_000008.ckpt", run.last_checkpoint)
    assert [p.stem for p in run.checkpoints()] == ["step_000012", "last", "step_000004"]
    (run.checkpoints_dir / "step_000008.ckpt").unlink()
    assert [p.stem for p in run.checkpoints()] == ["last", "step_000012", "step_000004"]


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch pwned",))


def test_objects_that_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"nanogpt": Malicious()}, "bad.ckpt")
    with pytest.raises(ValueError, match="can run code"):
        read_checkpoint(Path("bad.ckpt"))
    assert not Path("pwned").exists()


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(pickle.dumps({"nanogpt": 1}))
    with pytest.raises(ValueError, match="of another kind"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_a_newer_format_is_refused(tmp_path: Path, model: GPT) -> None:
    newer = content(model)
    newer["nanogpt"]["format"] = 99
    write_checkpoint(newer, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="format 99"):
        read_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("key", ["state_dict", "global_step"])
def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path: Path, model: GPT, key: str) -> None:
    partial = content(model)
    del partial[key]
    write_checkpoint(partial, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=f"{key} must be given"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_weights_of_another_shape_than_recorded_are_refused(tmp_path: Path, model: GPT) -> None:
    other = content(model)
    other["nanogpt"]["model"]["n_embd"] = 16
    write_checkpoint(other, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"size mismatch for .*\[273, 8\].*\[273, 16\]"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_a_run_is_found_by_path_directory_and_name(tmp_path: Path, model: GPT) -> None:
    file = tmp_path / "runs" / "mine" / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True)
    write_checkpoint(content(model), file)
    for reference in (file, file.parent.parent, "mine"):
        assert find_checkpoint(reference, tmp_path / "runs") == file


def test_the_error_for_a_missing_checkpoint_names_the_places_searched(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nor a run under"):
        find_checkpoint("nowhere", tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\0" * 99, b"\xff", b'{"stage": "pretrain"', b"[" * 100_000]
)
def test_latest_skips_a_damaged_summary(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("whole", "damaged", "fifo"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "last.ckpt").touch()
    (tmp_path / "whole" / "summary.json").write_text('{"stage": "pretrain", "steps": 1}')
    (tmp_path / "damaged" / "summary.json").write_bytes(content)
    os.mkfifo(tmp_path / "fifo" / "summary.json")
    assert find_checkpoint("latest", tmp_path).parent.parent == tmp_path / "whole"
    assert str(tmp_path / "damaged" / "summary.json") in caplog.text


def test_latest_is_the_newest_finished_pretraining_run(tmp_path: Path, model: GPT) -> None:
    for i, (name, stage) in enumerate(
        [("old", "pretrain"), ("new", "pretrain"), ("c", "classify")]
    ):
        file = tmp_path / name / "checkpoints" / "last.ckpt"
        file.parent.mkdir(parents=True)
        write_checkpoint(content(model), file)
        summary = tmp_path / name / "summary.json"
        summary.write_text(f'{{"stage": "{stage}", "steps": 1}}')
        os.utime(summary, ns=(i, i))
    assert find_checkpoint("latest", tmp_path) == tmp_path / "new" / "checkpoints" / "last.ckpt"


def test_a_special_token_takes_a_reserved_id_and_its_row(path: Path, model: GPT) -> None:
    named = with_special_tokens(load_checkpoint(path), ["<|user|>"])
    assert named.tokenizer.special_tokens["<|user|>"] == 257
    assert weights_sha256(named.model) == weights_sha256(model)


@pytest.mark.parametrize("n_tokens", [300, 9000], ids=["unpadded", "padded"])
def test_without_reserved_ids_a_special_token_gets_a_mean_row(n_tokens: int, path: Path) -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, vocab_size=n_tokens)
    tokens = [bytes([i]) for i in range(256)]
    tokens += [b"%d" % i for i in range(10, n_tokens - 256 + 9)]
    tokenizer = Tokenizer("own", GPT2_PATTERN, tokens, [END_OF_TEXT])
    start = Checkpoint(GPT(config), tokenizer, None, None, "pretrain", config, 0, path)
    grown = with_special_tokens(start, ["<|user|>", "<|assistant|>"])
    assert grown.config.vocab_size == grown.tokenizer.vocab_size == n_tokens + 2
    before = start.model.state_dict()["wte.weight"]
    rows = grown.model.state_dict()["wte.weight"]
    assert torch.equal(rows[:n_tokens], before)
    torch.testing.assert_close(rows[n_tokens:], before.mean(0).expand(2, -1))
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(grown.model(ids)[..., :n_tokens], start.model(ids))
