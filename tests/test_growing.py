"""A corpus that is trained on while it is prepared: the same rows whenever its shards come."""

import json
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from nanogpt.data import growing, tokenizing
from nanogpt.data.corpus import Corpus
from nanogpt.data.growing import GrowingStream, open_growing
from nanogpt.data.module import TokenDataModule
from nanogpt.data.preparing import Preparation, prepare
from nanogpt.data.shards import UINT16
from nanogpt.data.text import TextFiles
from nanogpt.data.writer import CorpusWriter, Tokenized
from nanogpt.tokenizer import byte_tokenizer

SHARD_TOKENS = 5_000


@pytest.fixture
def preparation(tmp_path: Path) -> Preparation:
    lines = (json.dumps({"text": f"Document {i} is about {i * i}. " * 20}) for i in range(400))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return Preparation(
        TextFiles(tmp_path / "text.jsonl"),
        byte_tokenizer,
        "byte",
        tmp_path / "data",
        shard_tokens=SHARD_TOKENS,
    )


def _writer(directory: Path) -> CorpusWriter:
    return CorpusWriter(directory, UINT16, shard_tokens=10, settled={})


def _append(writer: CorpusWriter, tokens: range) -> None:
    nothing = Tokenized(np.empty(0, dtype=np.uint16), documents=0, n_bytes=0)
    writer.append({"train": Tokenized(np.array(tokens), documents=1, n_bytes=1), "val": nothing})
    writer.commit()


def test_a_read_waits_for_its_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "POLL_S", 0.01)
    read: list[np.ndarray] = []
    with growing.lock(tmp_path), _writer(tmp_path) as writer:
        _append(writer, range(15))
        stream = GrowingStream(tmp_path, "train")
        assert stream.n_tokens(at_least=3) == 10
        assert stream.read(0, 10).tolist() == list(range(10))
        reader = threading.Thread(target=lambda: read.append(stream.read(8, 17)))
        reader.start()
        reader.join(0.1)
        assert not read
        _append(writer, range(15, 21))
        reader.join(10)
    assert read[0].tolist() == list(range(8, 17))


def test_its_length_is_known_at_the_end(tmp_path: Path, preparation: Preparation) -> None:
    whole = prepare(preparation)
    stream = GrowingStream(whole.directory, "train")
    assert len(stream) == len(whole.train)
    last = stream.read(len(stream) - 5, len(stream)).tolist()
    assert last == whole.train.read(len(stream) - 5, len(stream)).tolist()
    assert stream.n_tokens(at_least=10**9) == len(stream)


def _first_steps(corpus: Corpus, steps: int) -> list[list[int]]:
    data = TokenDataModule(
        corpus, block_size=64, tokens_per_step=640, micro_batch=10, seed=1, workers=0
    )
    return [data.order.rows_of_step(step, 10).tolist() for step in range(steps)]


def test_the_rows_are_the_same_early_and_late(preparation: Preparation) -> None:
    early = open_growing(preparation, wait=2)
    steps = 2 * (len(early.train) // 640)  # two passes, which wait for the rest
    rows = _first_steps(early, steps)
    late = open_growing(preparation, wait=2)
    assert early.fingerprint == late.fingerprint
    assert rows == _first_steps(late, steps)
    n_val = len(early.val)
    assert n_val == len(late.val)
    assert early.val.read(0, n_val).tolist() == late.val.read(0, n_val).tolist()


def test_the_window_is_part_of_what_the_corpus_is(
    preparation: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "BATCH_CHARS", 3_000)
    whole = prepare(preparation)
    two, three = open_growing(preparation, wait=2), open_growing(preparation, wait=3)
    assert len({whole.fingerprint, two.fingerprint, three.fingerprint}) == 3
    assert len(two.val) < len(three.val) < len(whole.val)


def test_the_first_window_has_only_rows_of_its_shards(preparation: Preparation) -> None:
    corpus = open_growing(preparation, wait=2)
    in_window = (2 * SHARD_TOKENS - 1) // 64
    rows = [row for step in _first_steps(corpus, in_window // 10) for row in step]
    assert max(rows) < in_window
    assert len(set(rows)) == len(rows)


def test_a_preparation_that_fails_ends_the_waiting(
    tmp_path: Path, preparation: Preparation, capfd: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write("\nno json")
    with pytest.raises(ChildProcessError, match="has stopped before its end"):
        len(open_growing(preparation, wait=1).train)
    assert "text.jsonl, line 401" in capfd.readouterr().err


def test_a_finished_corpus_that_was_altered_is_refused(preparation: Preparation) -> None:
    shard = prepare(preparation).directory / "train_000001.bin"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"train_000001\.bin was altered since it was written"):
        open_growing(preparation, wait=1)


def test_it_can_be_sent_to_a_loader_process(preparation: Preparation) -> None:
    stream = open_growing(preparation, wait=1).train
    assert len(pickle.loads(pickle.dumps(stream))) == len(stream)
