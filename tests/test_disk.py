"""The order in which files reach the disk: contents, then names, then what counts on them."""

import logging
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from nanogpt.checkpoint import write_checkpoint
from nanogpt.data.writer import CorpusWriter
from nanogpt.disk import link_atomically, replacing, wait_for_lock
from tests.front_end import eventually

HEADER_BYTES, TOKEN_BYTES = 1024, 2


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Record ("fsync", name, size of the file by then) and ("rename", old, new)."""
    made: list[tuple[Any, ...]] = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(handle: int) -> None:
        status = os.fstat(handle)
        [path] = [p for p in (tmp_path, *tmp_path.iterdir()) if p.stat().st_ino == status.st_ino]
        made.append(("fsync", "." if path == tmp_path else path.name, status.st_size))
        fsync(handle)

    def recording_replace(old: Path, new: Path) -> None:
        made.append(("rename", Path(old).name, Path(new).name))
        replace(old, new)

    monkeypatch.setattr("os.fsync", recording_fsync)
    monkeypatch.setattr("os.replace", recording_replace)
    return made


def without_sizes_of_directories(calls: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [call[:2] if call[:2] == ("fsync", ".") else call for call in calls]


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_the_return(
    calls: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    with replacing(tmp_path / "config.yaml", "w") as file:
        file.write("seed: 1\n")
    assert without_sizes_of_directories(calls) == [
        ("fsync", ".config.yaml.tmp", 8),
        ("rename", ".config.yaml.tmp", "config.yaml"),
        ("fsync", "."),
    ]


def test_a_checkpoint_is_on_the_disk_before_its_name_and_its_name_before_the_return(
    calls: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    path = tmp_path / "step_000001.ckpt"
    write_checkpoint({"global_step": 1}, path)
    assert without_sizes_of_directories(calls) == [
        ("fsync", ".step_000001.ckpt.tmp", path.stat().st_size),
        ("rename", ".step_000001.ckpt.tmp", "step_000001.ckpt"),
        ("fsync", "."),
    ]


@pytest.mark.parametrize("hard_links", [True, False])
def test_the_second_name_of_a_checkpoint_is_on_the_disk_before_the_return(
    calls: list[tuple[Any, ...]],
    tmp_path: Path,
    hard_links: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("not supported")

    if not hard_links:
        monkeypatch.setattr("os.link", refuse)
    (tmp_path / "step_000001.ckpt").write_bytes(b"content")
    link_atomically(tmp_path / "step_000001.ckpt", tmp_path / "last.ckpt")
    copied = [] if hard_links else [("fsync", ".last.ckpt.tmp", len(b"content"))]
    assert without_sizes_of_directories(calls) == [
        *copied,
        ("rename", ".last.ckpt.tmp", "last.ckpt"),
        ("fsync", "."),
    ]


def tokens(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.uint32)


def test_shards_are_on_the_disk_before_the_journal_that_counts_their_tokens(
    calls: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    writer = CorpusWriter(tmp_path, np.dtype("<u2"), 100, {})
    writer.append({"train": tokens(30), "val": tokens(10)})
    writer.commit()
    journal = calls.index(("rename", ".journal.json.tmp", "journal.json"))
    for name, n in (("train_000000.bin.partial", 30), ("val_000000.bin.partial", 10)):
        assert ("fsync", name, HEADER_BYTES + TOKEN_BYTES * n) in calls[:journal]
    assert without_sizes_of_directories(calls)[journal + 1] == ("fsync", ".")


def test_a_finished_shard_is_on_the_disk_before_its_name(
    calls: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    writer = CorpusWriter(tmp_path, np.dtype("<u2"), 100, {})
    writer.append({"train": tokens(100), "val": tokens(0)})
    name = "train_000000.bin"
    written = calls.index(("fsync", f"{name}.partial", HEADER_BYTES + TOKEN_BYTES * 100))
    assert written < calls.index(("rename", f"{name}.partial", name))


def test_a_lock_that_is_held_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    began = threading.Event()
    message = "waiting for the process that fetches gpt2"

    def hold() -> None:
        with FileLock(tmp_path / ".lock"):
            began.set()
            eventually(lambda: message in caplog.text)

    with caplog.at_level(logging.INFO, "nanogpt"):
        threading.Thread(target=hold).start()
        began.wait()
        wait_for_lock(tmp_path / ".lock", "fetches gpt2").lock.release()
    assert message in caplog.text


def test_a_failed_replacement_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*file'"), replacing(path) as to:
        to.write(b"new")
    with pytest.raises(ConnectionError, match=r"^broke off$"), replacing(path):
        raise ConnectionError("broke off")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
