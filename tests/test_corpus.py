"""Corpora: made once and whole, split by content, verified when opened; their sources."""

import gzip
import json
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.data.corpus import Corpus, choose_split, open_corpus, prepare
from nanogpt.data.python_stdlib import PythonStdlib
from nanogpt.data.shards import TokenStream
from nanogpt.data.text import TextFiles
from nanogpt.tokenizer import Tokenizer, bpe_tokenizer, byte_tokenizer


@dataclass(frozen=True)
class Documents:
    """A source that is a list."""

    texts: tuple[str, ...]
    val_fraction: float = 0.2
    name: str = "documents"

    def documents(self) -> Iterator[str]:
        return iter(self.texts)

    def fingerprint(self) -> str:
        return json.dumps(self.texts)


MANY = Documents(tuple(f"Document {i} is about {i * i}.\n" * 3 for i in range(100)))


def _prepare(source: Documents | TextFiles | PythonStdlib, data_dir: Path) -> Corpus:
    return prepare(source, byte_tokenizer, "byte", data_dir)


def _documents(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
    tokens = stream.read(0, len(stream))
    starts = np.flatnonzero(tokens == tokenizer.eot_id)
    assert starts[0] == 0, "each document has <|endoftext|> before it"
    return [tokenizer.decode(part.tolist()) for part in np.split(tokens, starts[1:])]


def _splits(source: Documents) -> tuple[list[str], list[str]]:
    split = choose_split(source)
    parts = [part for document in source.documents() for part in split.parts(document)]
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

    corpus = prepare(MANY, make_tokenizer, "bpe-300", tmp_path)
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


def test_split_has_about_the_fraction_asked_for() -> None:
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
    assert not list(tmp_path.glob("documents*"))


@pytest.mark.parametrize("val_fraction", [0, 1, -0.1, 1.5])
def test_a_fraction_outside_0_to_1_is_refused(tmp_path: Path, val_fraction: float) -> None:
    with pytest.raises(ValueError, match="val_fraction"):
        _prepare(replace(MANY, val_fraction=val_fraction), tmp_path)


def test_half_of_a_surrogate_pair_is_taken(tmp_path: Path) -> None:
    corpus = _prepare(Documents(("a\ud800", "b\udfff")), tmp_path)
    texts = _documents(corpus.train, corpus.tokenizer) + _documents(corpus.val, corpus.tokenizer)
    assert sorted(texts) == ["a\ufffd", "b\ufffd"]


def test_manifest_says_what_the_corpus_is(tmp_path: Path) -> None:
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


def test_directory_says_source_and_tokenizer(tmp_path: Path) -> None:
    name = prepare(MANY, byte_tokenizer, "bpe 2,048", tmp_path).directory.name
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
    assert prepare(source, byte_tokenizer, key, tmp_path).directory != one.directory


def test_a_prepared_corpus_is_found_without_work(tmp_path: Path) -> None:
    first = _prepare(MANY, tmp_path)

    def make_tokenizer(documents: Iterable[str]) -> Tokenizer:
        raise AssertionError("it was made again")

    again = prepare(MANY, make_tokenizer, "byte", tmp_path)
    assert again.fingerprint == first.fingerprint
    assert again.directory == first.directory


def test_a_corpus_made_twice_is_the_same_to_the_byte(tmp_path: Path) -> None:
    make = partial(bpe_tokenizer, vocab_size=300)
    one = prepare(MANY, make, "bpe", tmp_path / "1").directory
    two = prepare(MANY, make, "bpe", tmp_path / "2").directory
    files = sorted(path.name for path in one.iterdir())
    assert files == ["manifest.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"]
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


def test_fingerprint_tells_tokens_and_tables_apart(tmp_path: Path) -> None:
    corpora = [
        _prepare(MANY, tmp_path),
        _prepare(replace(MANY, texts=MANY.texts[1:]), tmp_path),
        prepare(MANY, partial(bpe_tokenizer, vocab_size=300), "bpe-300", tmp_path),
    ]
    assert len({corpus.fingerprint for corpus in corpora}) == 3


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def make_tokenizer(documents: Iterable[str]) -> Tokenizer:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        prepare(MANY, make_tokenizer, "byte", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(_prepare(MANY, tmp_path).train) > 0


def test_leftovers_of_a_killed_process_are_no_corpus(tmp_path: Path) -> None:
    directory = _prepare(MANY, tmp_path).directory
    leftover = directory.with_name(f".{directory.name}.partial")
    directory.rename(leftover)
    (leftover / "train_000000.bin.partial").write_bytes(b"half")
    made = _prepare(MANY, tmp_path).directory
    assert not leftover.exists()
    assert not list(made.glob("*.partial"))


PREPARE = """
import sys
from pathlib import Path
from nanogpt.data.corpus import prepare
from nanogpt.data.text import TextFiles
from nanogpt.tokenizer import byte_tokenizer

def make_tokenizer(documents):
    with open(sys.argv[1] + "/made", "a") as file:
        file.write("once\\n")
    return byte_tokenizer()

source = TextFiles(sys.argv[1] + "/text.txt")
print(prepare(source, make_tokenizer, "byte", Path(sys.argv[1])).fingerprint)
"""


def test_of_several_processes_one_works(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(MANY.texts))
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


def _flip_a_token(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1030] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("train_000000.bin", _flip_a_token, "was altered"),
        ("val_000000.bin", Path.unlink, "is missing"),
        ("val_000000.bin", lambda path: path.write_bytes(path.read_bytes()[:-2]), "cut short"),
        (
            "val_000000.bin",
            lambda path: shutil.copy(path.with_name("train_000000.bin"), path),
            "the manifest beside it says",
        ),
        ("manifest.json", Path.unlink, "is missing"),
        ("manifest.json", lambda path: path.write_text("{"), "is not JSON"),
        ("manifest.json", lambda path: path.write_text("[]"), "holds no JSON object"),
        ("manifest.json", lambda path: path.write_text('{"format": 99}'), "format 99"),
        ("manifest.json", lambda path: path.write_text('{"format": 1}'), "lacks"),
        ("tokenizer.json", Path.unlink, "is missing"),
        (
            "tokenizer.json",
            lambda path: path.write_text(json.dumps(bpe_tokenizer(["abab"], 300).record())),
            "not the tokenizer that made",
        ),
        ("tokenizer.json", lambda path: path.write_text("{}"), "tokenizer.json.*malformed"),
    ],
)
def test_a_damaged_corpus_is_refused_by_name(tmp_path: Path, file, damage, words) -> None:  # type: ignore[no-untyped-def]
    directory = _prepare(MANY, tmp_path).directory
    damage(directory / file)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        _prepare(MANY, tmp_path)
    assert str(directory / file) in str(error.value)
    assert "\n" not in str(error.value)


# The standard library


def test_python_stdlib_is_source_code_without_its_tests(monkeypatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name in ("os.py", "json/decoder.py", "test/x.py", "idlelib/idle_test/x.py", "a/tests/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"# {name}\r\n".encode())
    for name in ("site-packages/x.py", "dist-packages/x.py", "__pycache__/x.py", "x.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("left out")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(PythonStdlib().documents()) == ["# json/decoder.py\r\n", "# os.py\r\n"]


def test_python_stdlib_is_on_this_machine() -> None:
    first = next(PythonStdlib().documents())
    assert "import" in first
    assert PythonStdlib().fingerprint() == PythonStdlib().fingerprint()


def test_python_without_sources_says_what_to_do(monkeypatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="data=text"):
        PythonStdlib().fingerprint()


# Text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / "b/two.MD").write_bytes("# zwei\r\n\u2028ä".encode())
    (folder / "c.jsonl").write_text('{"text": "three", "n": 1}\n\n{"text": "vier\\n"}')
    (folder / "a.txt").write_text("one")
    (folder / "empty.py").write_text("")
    (folder / "image.png").write_bytes(b"\xff")
    (folder / ".hidden.txt").write_text("left out")
    return folder


def test_text_is_every_file_and_every_json_line_in_order(folder: Path) -> None:
    documents = list(TextFiles(folder).documents())
    assert documents == ["one", "# zwei\r\n\u2028ä", "three", "vier\n", ""]


def test_text_may_be_one_file(folder: Path) -> None:
    assert list(TextFiles(str(folder / "a.txt")).documents()) == ["one"]


def test_text_of_json_lines_may_have_another_name(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"body": "here"}\n')
    assert list(TextFiles(path, field="body").documents()) == ["here"]


def test_text_fingerprint_follows_names_and_contents_not_the_place(folder: Path) -> None:
    before = TextFiles(folder).fingerprint()
    moved = folder.rename(folder.with_name("moved"))
    assert TextFiles(moved).fingerprint() == before
    assert TextFiles(moved, field="body").fingerprint() != before
    (moved / "a.txt").write_text("ONE")
    assert TextFiles(moved).fingerprint() != before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, None, "data=text needs data.path="),
        ("absent.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("data.csv", b"a,b", "holds no file that ends in .txt, .md, .py or .jsonl"),
        ("bad.txt", b"caf\xe9", "bad.txt is not UTF-8 at byte 3 .0xe9."),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "bad.jsonl is not UTF-8 at byte 24"),
        (
            "no.jsonl",
            b'{"text": "a"}\n\n{"body": "b"}',
            "no.jsonl, line 3 .*'text'.*body.*data.field",
        ),
        ("list.jsonl", b"[1]", "line 1 has no text under 'text'"),
        ("number.jsonl", b'{"text": 1}', "line 1 has no text under 'text'"),
        ("cut.jsonl", b'{"text": "a"}\n{"text":', "cut.jsonl, line 2 is not JSON"),
    ],
)
def test_bad_text_is_refused_in_one_sentence(
    tmp_path: Path, name: str | None, content: bytes | None, words: str
) -> None:
    path = None if name is None else tmp_path / name
    if path is not None and content is not None:
        path.write_bytes(content)
    source = TextFiles(path)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        list(source.documents())
    assert "\n" not in str(error.value)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no file that ends in"):
        TextFiles(tmp_path).fingerprint()
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="holds only empty files"):
        TextFiles(tmp_path).fingerprint()
