"""Preparing a corpus: the documents, split by content, whatever interrupts it or helps with it."""

import errno
import gzip
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.data import preparing, tokenizing
from nanogpt.data.corpus import Corpus, open_corpus
from nanogpt.data.preparing import Preparation, prepare
from nanogpt.data.shards import TokenStream
from nanogpt.data.source import Source
from nanogpt.data.text import TextFiles
from nanogpt.data.tokenizing import choose_split
from nanogpt.tokenizer import Tokenizer, bpe_tokenizer, byte_tokenizer


@dataclass(frozen=True)
class Documents(Source):
    """A source that is a list."""

    texts: tuple[str | None, ...]
    val_fraction: float = 0.2
    name: str = "documents"

    def documents(self, skip: int = 0) -> Iterator[str | None]:
        return iter(self.texts[skip:])

    def fingerprint(self) -> str:
        return json.dumps(self.texts)


MANY = Documents(tuple(f"Document {i} is about {i * i}.\n" * 3 for i in range(100)))


def _prepare(source: Source, data_dir: Path, **how: Any) -> Corpus:
    return prepare(Preparation(source, byte_tokenizer, "byte", data_dir, **how))


def _documents(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
    tokens = stream.read(0, len(stream))
    starts = np.flatnonzero(tokens == tokenizer.eot_id)
    assert starts[0] == 0, "each document has <|endoftext|> before it"
    return [tokenizer.decode(part.tolist()) for part in np.split(tokens, starts[1:])]


def _splits(source: Documents) -> tuple[list[str], list[str]]:
    split = choose_split(source)
    parts = [part for document in source.documents() for part in split.parts(document or "")]
    return [t for s, t in parts if s == "train"], [t for s, t in parts if s == "val"]


def test_decoded_shards_are_the_documents_in_order(tmp_path: Path) -> None:
    corpus = _prepare(MANY, tmp_path)
    train = _documents(corpus.train, corpus.tokenizer)
    val = _documents(corpus.val, corpus.tokenizer)
    assert (train, val) == _splits(MANY)
    assert Counter(train + val) == Counter(MANY.texts)


def test_a_trained_tokenizer_learns_from_the_training_split_and_stays(tmp_path: Path) -> None:
    seen: list[str] = []

    def make_tokenizer(documents: Iterable[str]) -> Tokenizer:
        seen.extend(documents)
        return bpe_tokenizer(seen, vocab_size=300)

    corpus = prepare(Preparation(MANY, make_tokenizer, "bpe-300", tmp_path))
    assert seen == _splits(MANY)[0]
    assert corpus.tokenizer == bpe_tokenizer(seen, vocab_size=300)
    assert open_corpus(corpus.directory).tokenizer == corpus.tokenizer


@settings(deadline=None)
@given(st.lists(st.text(min_size=1), min_size=2, unique=True))
def test_neither_split_is_empty_where_documents_differ(texts: list[str]) -> None:
    train, val = _splits(Documents(tuple(texts)))
    assert train
    assert val
    assert Counter(train + val) == Counter(texts)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(min_size=1), max_size=30))
def test_documents_keep_their_split_when_others_come(texts: list[str]) -> None:
    before, after = _splits(MANY), _splits(Documents((*texts, *MANY.texts)))
    assert set(before[0]) <= set(after[0])
    assert set(before[1]) <= set(after[1])


def test_copies_of_a_document_share_a_split() -> None:
    train, val = _splits(Documents(MANY.texts * 2))
    assert not set(train) & set(val)


def test_split_has_about_the_given_fraction() -> None:
    texts = tuple(str(i) for i in range(5000))
    _, val = _splits(Documents(texts, val_fraction=0.1))
    assert abs(len(val) / len(texts) - 0.1) < 0.015


def test_the_last_tenth_of_a_single_document_is_validation(tmp_path: Path) -> None:
    text = "".join(chr(0x400 + i % 50) for i in range(1001))
    corpus = _prepare(Documents((text,), val_fraction=0.3), tmp_path)
    assert _documents(corpus.train, corpus.tokenizer) == [text[:900]]
    assert _documents(corpus.val, corpus.tokenizer) == [text[900:]]


def test_empty_documents_are_passed_over(tmp_path: Path) -> None:
    corpus = _prepare(Documents(("", "one", "", "two")), tmp_path)
    splits = corpus.manifest["splits"]
    assert splits["train"]["documents"] == splits["val"]["documents"] == 1


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no text"):
        _prepare(Documents(("", "")), tmp_path)
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize("val_fraction", [0, 1, -0.1, 1.5])
def test_a_fraction_outside_0_to_1_is_refused(tmp_path: Path, val_fraction: float) -> None:
    with pytest.raises(ValueError, match="val_fraction"):
        _prepare(replace(MANY, val_fraction=val_fraction), tmp_path)


@pytest.mark.parametrize(
    "limits", [{"shard_tokens": 0}, {"shard_tokens": 2**31}, {"workers": 0}, {"workers": -1}]
)
def test_impossible_limits_are_refused(tmp_path: Path, limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(limits))}.* must"):
        _prepare(MANY, tmp_path, **limits)


def test_half_of_a_surrogate_pair_is_taken(tmp_path: Path) -> None:
    corpus = _prepare(Documents(("a\ud800", "b\udfff")), tmp_path)
    texts = _documents(corpus.train, corpus.tokenizer) + _documents(corpus.val, corpus.tokenizer)
    assert sorted(texts) == ["a\ufffd", "b\ufffd"]


def test_manifest_describes_the_corpus(tmp_path: Path) -> None:
    corpus = _prepare(MANY, tmp_path)
    train, val = _splits(MANY)
    manifest = json.loads((corpus.directory / "manifest.json").read_text())
    assert manifest == corpus.manifest
    assert manifest["source"] == {"name": "documents", "fingerprint": MANY.fingerprint()}
    assert manifest["tokenizer"]["fingerprint"] == byte_tokenizer().fingerprint
    for split, texts in (("train", train), ("val", val)):
        assert manifest["splits"][split]["documents"] == len(texts)
        assert manifest["splits"][split]["bytes"] == len("".join(texts).encode())
        assert manifest["splits"][split]["tokens"] == len("".join(texts).encode()) + len(texts)
        (shard,) = manifest["splits"][split]["shards"]
        assert (corpus.directory / shard["file"]).suffix == ".bin"


def test_manifest_has_gzips_bits_per_byte(tmp_path: Path) -> None:
    corpus = _prepare(MANY, tmp_path)
    data = "".join(_splits(MANY)[1]).encode()
    expected = 8 * len(gzip.compress(data, 9)) / len(data)
    assert corpus.manifest["gzip_bits_per_byte"] == expected


def test_a_pattern_of_bpe_is_another_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preparation = partial(Preparation, MANY, partial(bpe_tokenizer, vocab_size=300))
    bpe, byte = (preparation(key, tmp_path).directory for key in ("bpe-300", "byte"))
    monkeypatch.setattr("nanogpt.data.preparing.BPE_PATTERN", "other")
    assert preparation("bpe-300", tmp_path).directory != bpe
    assert preparation("byte", tmp_path).directory == byte


def test_directory_names_source_and_tokenizer(tmp_path: Path) -> None:
    name = prepare(Preparation(MANY, byte_tokenizer, "bpe 2,048", tmp_path)).directory.name
    assert name.startswith("documents-bpe-2-048-")
    assert int(name[-8:], 16) >= 0


@pytest.mark.parametrize(
    ("source", "key"),
    [
        (replace(MANY, texts=MANY.texts[1:]), "byte"),
        (replace(MANY, val_fraction=0.3), "byte"),
        (replace(MANY, name="other"), "byte"),
        (MANY, "other"),
    ],
)
def test_another_corpus_has_another_directory(tmp_path: Path, source: Documents, key: str) -> None:
    one = _prepare(MANY, tmp_path)
    assert prepare(Preparation(source, byte_tokenizer, key, tmp_path)).directory != one.directory


def test_a_prepared_corpus_is_found_without_work(tmp_path: Path) -> None:
    first = _prepare(MANY, tmp_path)

    def make_tokenizer(documents: Iterable[str]) -> Tokenizer:
        raise AssertionError("it was made again")

    again = prepare(Preparation(MANY, make_tokenizer, "byte", tmp_path))
    assert again.fingerprint == first.fingerprint
    assert again.directory == first.directory


def test_a_corpus_made_twice_is_the_same_to_the_byte(tmp_path: Path) -> None:
    make = partial(bpe_tokenizer, vocab_size=300)
    one = prepare(Preparation(MANY, make, "bpe", tmp_path / "1")).directory
    two = prepare(Preparation(MANY, make, "bpe", tmp_path / "2")).directory
    files = sorted(_bytes_of(one))
    assert files == ["manifest.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"]
    assert _bytes_of(one) == _bytes_of(two)


def test_fingerprint_distinguishes_tokens_and_tables(tmp_path: Path) -> None:
    corpora = [
        _prepare(MANY, tmp_path),
        _prepare(replace(MANY, texts=MANY.texts[1:]), tmp_path),
        prepare(Preparation(MANY, partial(bpe_tokenizer, vocab_size=300), "bpe-300", tmp_path)),
    ]
    assert len({corpus.fingerprint for corpus in corpora}) == 3


# Whatever interrupts it


def _bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


@dataclass(frozen=True)
class Breaking(Documents):
    """Documents that cannot all be read the first time: it breaks once, after `breaks_after`."""

    breaks_after: int = 0
    flag: Path = Path()

    def documents(self, skip: int = 0) -> Iterator[str | None]:
        for i, text in enumerate(super().documents(skip), start=skip):
            if i >= self.breaks_after and self.flag.exists():
                self.flag.unlink()
                raise OSError("the connection was lost")
            yield text


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many batches, cut inside documents too, and a journal after each."""
    monkeypatch.setattr(tokenizing, "BATCH_CHARS", 200)
    monkeypatch.setattr(preparing, "COMMIT_EVERY_S", 0.0)
    monkeypatch.setattr("nanogpt.tokenizer.PIECE_CHARS", 150)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("breaks_after", [3, 20, 57, 99])
def test_a_broken_preparation_continues_to_the_same_bytes(
    tmp_path: Path, breaks_after: int
) -> None:
    whole = _prepare(MANY, tmp_path / "whole", shard_tokens=1000)
    flag = tmp_path / "flag"
    source = Breaking(MANY.texts, breaks_after=breaks_after, flag=flag)
    split = choose_split(source)
    assert split == choose_split(MANY)
    (tmp_path / "broken").mkdir()
    preparation = Preparation(
        source, partial(_break_later, flag), "byte", tmp_path / "broken", shard_tokens=1000
    )
    with pytest.raises(OSError, match="connection was lost"):
        prepare(preparation)
    assert not (preparation.directory / "manifest.json").exists()
    seen: list[int] = []
    object.__setattr__(source, "documents", _counting(source, seen))
    assert _bytes_of(prepare(preparation).directory) == _bytes_of(whole.directory)
    assert seen
    assert seen[0] > breaks_after - 20, "it goes on where it was, but for a few batches"


def _break_later(flag: Path, documents: Iterable[str]) -> Tokenizer:
    flag.touch()
    return byte_tokenizer()


def _counting(source: Source, seen: list[int]) -> Callable[[int], Iterator[str | None]]:
    documents = source.documents

    def counted(skip: int = 0) -> Iterator[str | None]:
        seen.append(skip)
        return documents(skip)

    return counted


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
from nanogpt.data import preparing, tokenizing
from nanogpt.data.preparing import Preparation, prepare
from nanogpt.data.text import TextFiles
from nanogpt.tokenizer import byte_tokenizer

tokenizing.BATCH_CHARS, preparing.COMMIT_EVERY_S = 20_000, 0.0
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])

def kill() -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
source = TextFiles(folder / "text.jsonl")
prepare(Preparation(source, byte_tokenizer, "byte", folder, shard_tokens=100_000))
"""


def test_killed_at_any_moment_it_continues_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "BATCH_CHARS", 20_000)
    lines = (json.dumps({"text": f"Document {i} is about {i * i}. " * 40}) for i in range(4000))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    source = TextFiles(tmp_path / "text.jsonl")
    whole = _prepare(source, tmp_path / "whole", shard_tokens=100_000)
    killed = 0
    for seconds in (0.02, 0.1, 0.05, 0.2, 0.15, 60):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), str(seconds)],
            cwd=Path(__file__).parent.parent,
            check=False,
        )
        killed += done.returncode == -signal.SIGKILL
        if done.returncode == 0:
            break
    assert killed
    directory = _prepare(source, tmp_path, shard_tokens=100_000).directory
    assert _bytes_of(directory) == _bytes_of(whole.directory)


KILLED_AFTER_COMMIT = """
import os, signal, sys
from pathlib import Path
from nanogpt.data import preparing, tokenizing, writer
from nanogpt.data.preparing import Preparation, prepare
from nanogpt.data.text import TextFiles
from nanogpt.tokenizer import byte_tokenizer

tokenizing.BATCH_CHARS, preparing.COMMIT_EVERY_S = 20_000, 0.0
folder, commits_to_come = Path(sys.argv[1]), int(sys.argv[2])
write_json = writer.write_json

def dying(path: Path, *args: object) -> None:
    global commits_to_come
    write_json(path, *args)
    commits_to_come -= path.name == writer.JOURNAL
    if not commits_to_come:
        os.kill(os.getpid(), signal.SIGKILL)

writer.write_json = dying
prepare(Preparation(TextFiles(folder / "text.jsonl"), byte_tokenizer, "byte", folder))
"""


@pytest.mark.parametrize("n_commits", [1, 2, 4])
def test_killed_after_a_commit_it_continues_with_all_that_was_counted(
    tmp_path: Path, n_commits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "BATCH_CHARS", 20_000)
    lines = (json.dumps({"text": f"Document {i} is about {i * i}. " * 40}) for i in range(400))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    source = TextFiles(tmp_path / "text.jsonl")
    whole = _prepare(source, tmp_path / "whole")
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AFTER_COMMIT, str(tmp_path), str(n_commits)],
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert _bytes_of(_prepare(source, tmp_path).directory) == _bytes_of(whole.directory)


def test_a_lost_unfinished_shard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "COMMIT_EVERY_S", 0.0)
    monkeypatch.setattr(tokenizing, "BATCH_CHARS", 100)
    monkeypatch.setattr(preparing.CorpusWriter, "finish", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        _prepare(MANY, tmp_path, out=tmp_path)
    (tmp_path / "train_000000.bin.partial").unlink()
    with pytest.raises(ValueError, match=r"train_000000\.bin\.partial is missing or shorter"):
        _prepare(MANY, tmp_path, out=tmp_path)


def test_a_full_disk_keeps_what_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*arguments: object) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(preparing.CorpusWriter, "append", no_room)
        with pytest.raises(OSError, match="is full; the prepared part is safe: make room"):
            _prepare(MANY, tmp_path)
    assert len(_prepare(MANY, tmp_path).train) > 0


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/corpus"):
        _prepare(MANY, tmp_path, out=tmp_path / "file" / "corpus")


def test_an_unfinished_folder_is_no_corpus(tmp_path: Path) -> None:
    directory = _prepare(MANY, tmp_path).directory
    (directory / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read \(No such file"):
        open_corpus(directory)


def test_shards_of_others_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "fineweb_train_000001.bin").write_bytes(b"precious")
    with pytest.raises(
        ValueError, match=r"train_000001\.bin was not written here .*; pass another folder"
    ):
        _prepare(MANY, tmp_path, out=tmp_path)
    assert (tmp_path / "fineweb_train_000001.bin").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"model": {"type": "BPE"}}'),
        ("journal.json", '{"entries": []}'),
        ("journal.json", "Monday: sunny"),
    ],
)
def test_files_of_others_are_not_written_over(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} (was|is) not .*; pass another folder"):
        _prepare(MANY, tmp_path, out=tmp_path)
    assert (tmp_path / name).read_text() == content


def test_a_folder_of_another_corpus_is_refused(tmp_path: Path) -> None:
    _prepare(MANY, tmp_path, out=tmp_path / "out")
    with pytest.raises(ValueError, match="holds another corpus"):
        _prepare(replace(MANY, texts=MANY.texts[1:]), tmp_path, out=tmp_path / "out")


# However it is done


@pytest.mark.usefixtures("small_batches")
def test_a_folder_of_unknown_identity_is_refused(tmp_path: Path) -> None:
    path = _prepare(MANY, tmp_path).directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "identity": [2, "documents"]}))
    with pytest.raises(ValueError, match="holds another corpus"):
        _prepare(MANY, tmp_path)


def test_a_file_that_changes_while_it_is_read_makes_no_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "Document {i}"}}\n' for i in range(100)))
    with monkeypatch.context() as patch:
        patch.setattr(
            preparing.CorpusWriter,
            "finish",
            lambda writer: path.write_text(path.read_text() + "\n"),
        )
        with pytest.raises(ValueError, match="changed while it was read"):
            _prepare(TextFiles(path), tmp_path)
    assert len(_prepare(TextFiles(path), tmp_path).train) > 0


def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    made = [
        _bytes_of(_prepare(MANY, tmp_path / str(n), workers=n, shard_tokens=1000).directory)
        for n in (1, 2, 4)
    ]
    assert made[0] == made[1] == made[2]


@pytest.mark.usefixtures("small_batches")
def test_documents_longer_than_a_batch_come_back(tmp_path: Path) -> None:
    texts = tuple(f"Number {i} is a long one.\n" * 30 for i in range(20))
    corpus = _prepare(Documents(texts), tmp_path)
    train, val = _splits(Documents(texts))
    assert _documents(corpus.train, corpus.tokenizer) == train
    assert _documents(corpus.val, corpus.tokenizer) == val


@pytest.mark.parametrize("limit", [1, 500, 1777, 3000])
def test_it_stops_with_the_document_that_reaches_the_limit(tmp_path: Path, limit: int) -> None:
    whole = _documents(_prepare(MANY, tmp_path).train, byte_tokenizer())
    corpus = _prepare(MANY, tmp_path, tokens=limit)
    documents = _documents(corpus.train, corpus.tokenizer)
    assert documents == whole[: len(documents)]
    assert len(corpus.train) >= limit
    assert len(corpus.train) - 1 - len(documents[-1]) < limit
    counts = corpus.manifest["splits"]["train"]
    assert counts["documents"] == len(documents)
    assert counts["bytes"] == len("".join(documents))


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("limit", [500, 1777])
def test_the_limit_is_the_same_in_small_batches(tmp_path: Path, limit: int) -> None:
    test_it_stops_with_the_document_that_reaches_the_limit(tmp_path, limit)


def test_shards_are_cut_to_size_and_their_validation_with_them(tmp_path: Path) -> None:
    corpus = _prepare(MANY, tmp_path, shard_tokens=2000)
    splits = corpus.manifest["splits"]
    sizes = [shard["n_tokens"] for shard in splits["train"]["shards"]]
    assert sizes == [2000] * (len(sizes) - 1) + [len(corpus.train) - 2000 * (len(sizes) - 1)]
    assert len(splits["val"]["shards"]) in (len(sizes), len(sizes) - 1)
    assert _documents(corpus.train, corpus.tokenizer) == _splits(MANY)[0]


def test_records_that_were_passed_over_are_counted(tmp_path: Path) -> None:
    corpus = _prepare(Documents((None, "one", None, "two")), tmp_path)
    assert corpus.manifest["bad_records"] == 2
    assert corpus.manifest["records"] == 4


PREPARE = """
import sys
from pathlib import Path
from nanogpt.data.preparing import Preparation, prepare
from nanogpt.data.text import TextFiles
from nanogpt.tokenizer import byte_tokenizer

def make_tokenizer(documents):
    with open(sys.argv[1] + "/made", "a") as file:
        file.write("once\\n")
    return byte_tokenizer()

source = TextFiles(sys.argv[1] + "/text.txt")
print(prepare(Preparation(source, make_tokenizer, "byte", Path(sys.argv[1]))).fingerprint)
"""


def test_of_several_processes_one_works(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(filter(None, MANY.texts)))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        for _ in range(3)
    ]
    fingerprints = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(fingerprints) == 1
    assert (tmp_path / "made").read_text() == "once\n"
