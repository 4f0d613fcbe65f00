"""The sources of documents: read in order, continued anywhere, refused by name where damaged."""

import gzip
import json
import logging
import os
import re
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import nanogpt.data.source
from nanogpt.data import files, records
from nanogpt.data.dolly import Dolly
from nanogpt.data.files import Reader
from nanogpt.data.fineweb_edu import FineWebEdu
from nanogpt.data.hub import HubDataset
from nanogpt.data.instructions import Instructions
from nanogpt.data.labelled import LabelledTexts
from nanogpt.data.pretokenized import TokenShards
from nanogpt.data.python_stdlib import PythonStdlib
from nanogpt.data.sms_spam import SmsSpam
from nanogpt.data.source import Source, files_fingerprint
from nanogpt.data.text import TextFiles
from nanogpt.values import explain
from tests import hub_server
from tests.hub_server import COMMIT, Hub

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write_parquet(path: Path, texts: list[str | None], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = list(range(len(texts)))
    pq.write_table(pa.table({"text": pa.array(texts, pa.string()), "n": numbers}), path, **options)


def damage_row_group(path: Path, group: int) -> None:
    chunk = pq.ParquetFile(path).metadata.row_group(group).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xa5" * chunk.total_compressed_size
    path.write_bytes(data)


def all_read(source: Source) -> list[str | None]:
    return list(source.documents())


# The standard library


def test_python_stdlib_is_source_code_without_its_tests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("os.py", "json/decoder.py", "test/x.py", "idlelib/idle_test/x.py", "a/tests/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"# {name}\r\n".encode())
    for name in ("site-packages/x.py", "dist-packages/x.py", "__pycache__/x.py", "x.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("left out")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(PythonStdlib().documents()) == ["# json/decoder.py\r\n", "# os.py\r\n"]
    assert list(PythonStdlib().documents(skip=1)) == ["# os.py\r\n"]


def test_python_stdlib_is_on_this_machine() -> None:
    first = next(PythonStdlib().documents())
    assert "import" in first
    assert PythonStdlib().fingerprint() == PythonStdlib().fingerprint()


def test_the_error_for_python_without_sources_names_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="data=text"):
        PythonStdlib().fingerprint()


# Files


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
    write_parquet(folder / "f.parquet", ["five", "", "seven"])
    with gzip.open(folder / "g.jsonl.gz", "wb") as file:
        file.write(b'\xef\xbb\xbf{"text": "eight"}\n')
    frames = [pa.compress(json.dumps({"text": text}).encode() + b"\n", "zstd") for text in "9X"]
    (folder / "h.jsonl.zst").write_bytes(b"".join(frame.to_pybytes() for frame in frames))
    return folder


IN_FOLDER = ["one", "# zwei\r\n\u2028ä", "three", "vier\n", "", *("five", "", "seven")]
IN_FOLDER += ["eight", "9", "X"]


def test_text_is_every_file_and_every_record_in_order(folder: Path) -> None:
    assert all_read(TextFiles(folder)) == IN_FOLDER


@pytest.mark.parametrize("skip", range(len(IN_FOLDER) + 2))
def test_documents_continue_after_any_number_of_them(folder: Path, skip: int) -> None:
    assert list(TextFiles(folder).documents(skip)) == IN_FOLDER[skip:]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_json_lines_are_read_in_every_compression(suffix: str, tmp_path: Path) -> None:
    n = 400
    content = b"".join(b'{"text": "%d"}\n' % i for i in range(n))
    if suffix.endswith("gz"):
        content = gzip.compress(content)
    elif suffix.endswith("zst"):
        content = pa.compress(content, "zstd").to_pybytes()
    (tmp_path / f"many.{suffix}").write_bytes(content)
    source = TextFiles(path=str(tmp_path / f"many.{suffix}"))
    assert list(source.documents()) == [str(i) for i in range(n)]


def test_text_may_be_one_file(folder: Path) -> None:
    assert all_read(TextFiles(str(folder / "a.txt"))) == ["one"]


def test_text_may_be_a_pattern(folder: Path) -> None:
    assert all_read(TextFiles(f"{folder}/*.[tj]*")) == ["one", "three", "vier\n", "eight", "9", "X"]
    assert TextFiles(f"{folder}/**/*").fingerprint() == TextFiles(folder).fingerprint()


def test_json_is_read_where_it_is_named(folder: Path) -> None:
    (folder / "d.json").write_text('{"text": "by name"}\n')
    assert all_read(TextFiles(folder)) == IN_FOLDER
    assert all_read(TextFiles(folder / "d.json")) == ["by name"]
    assert all_read(TextFiles(f"{folder}/d.*")) == ["by name"]


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder with links of every kind: to a folder, to a file, to nothing, in a loop, hard."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/far.txt").write_text("far")
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / "b/near.txt").write_text("near")
    (folder / "a_again.txt").symlink_to("b/near.txt")
    (folder / "hard.txt").hardlink_to(folder / "b/near.txt")
    (folder / "books").symlink_to(tmp_path / "elsewhere")
    (folder / "gone.txt").symlink_to("nowhere.txt")
    (folder / "self.txt").symlink_to("self.txt")
    (folder / "b/up").symlink_to("..")
    (folder / "b/up2").symlink_to("..")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    os.mkfifo(folder / "pipe.txt")
    return folder


def test_a_folder_names_what_it_leaves_out(linked: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert all_read(TextFiles(linked)) == ["near"]
    [line] = [record.getMessage() for record in caplog.records]
    names = "b/near.txt, b/up, b/up2, books, gone.txt, hard.txt, notes.pdf, pipe.txt, self.txt"
    assert f"left out 9 names ({names})" in line
    assert "links to folders, which a pattern such as DIR/**/* follows" in line


def test_a_pattern_follows_links_and_reads_each_file_once(
    linked: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert all_read(TextFiles(f"{linked}/**/*.txt")) == ["near", "far"]
    assert "left out 5 names (b/near.txt, gone.txt, hard.txt, pipe.txt, self.txt)" in caplog.text
    assert all_read(TextFiles(f"{linked}/b*/*.txt")) == ["near", "far"]
    assert all_read(TextFiles(f"{linked}/books/*.txt")) == ["far"]


def test_links_alone_are_named_in_the_error(linked: Path) -> None:
    (linked / "b/near.txt").rename(linked / "b/near.pdf")
    for name in ("a_again.txt", "hard.txt"):
        (linked / name).unlink()
    with pytest.raises(
        ValueError, match=r"holds no file that ends in .*left out 8 names \(.*books"
    ):
        all_read(TextFiles(linked))
    with pytest.raises(FileNotFoundError, match="is no file; pass a file"):
        all_read(TextFiles(linked / "pipe.txt"))


def test_an_empty_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("not meant")
    monkeypatch.chdir(tmp_path)
    for make in (TextFiles, FineWebEdu, LabelledTexts, Instructions, TokenShards):
        with pytest.raises(ValidationError) as error:
            make(path="")
        assert explain(error.value, "data").startswith("data.path is empty (an unset variable")
    assert all_read(TextFiles(".")) == ["not meant"]


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (TextFiles, "val_fraction", 0),
        (PythonStdlib, "val_fraction", 1.0),
        (FineWebEdu, "val_fraction", "0.1"),
        (HubDataset, "val_fraction", True),
        (Dolly, "val_fraction", -0.1),
        (TokenShards, "val_fraction", 1),
        (LabelledTexts, "test_fraction", 0.0),
        (SmsSpam, "test_fraction", None),
        (TextFiles, "skip_bad", "yes"),
        (Dolly, "skip_bad", 1),
        (LabelledTexts, "balance", "true"),
        (Instructions, "max_examples", 0),
        (LabelledTexts, "max_examples", 2.5),
        (LabelledTexts, "split_seed", "a"),
        (TextFiles, "separator", ""),
        (TextFiles, "text_column", 3),
        (HubDataset, "revision", 5),
        (TokenShards, "path", 5),
        (PythonStdlib, "path", "text.txt"),
    ],
)
def test_a_wrong_value_of_a_source_is_one_sentence(make: Any, key: str, value: Any) -> None:
    needed = {"repository": "owner/name"} if make is HubDataset else {}
    with pytest.raises(ValidationError) as error:
        make(**needed, **{key: value})
    sentence = explain(error.value, "data")
    assert f"data.{key}" in sentence
    assert "\n" not in sentence


MARK = "<|endoftext|>"


@pytest.mark.parametrize("buffer_bytes", [1, 2, 7, 2**20])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"one\n{MARK}\ntwo\n{MARK}\n", ["one", "two"]),
        (f"{MARK}  one\r\n{MARK}{MARK}\n\n{MARK}zwei ä{MARK}", ["  one", "zwei ä"]),
        ("<|endoftext|<|endoftext|>|>", ["<|endoftext|", "|>"]),
        ("no marker\n", ["no marker"]),
        (f"{MARK}\n {MARK}", []),
    ],
)
def test_a_separator_cuts_documents_wherever_it_is_read(
    text: str,
    expected: list[str],
    buffer_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "BUFFER_BYTES", buffer_bytes)
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": f"x{MARK}y"}))
    (tmp_path / "c.md").write_text("last")
    source = TextFiles(tmp_path, separator=MARK)
    whole = [*expected, f"x{MARK}y", "last"]
    for skip in range(len(whole) + 1):
        assert list(source.documents(skip)) == whole[skip:]


def test_a_bad_document_costs_itself_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one--\xe9--three")
    with pytest.raises(ValueError, match=r"a.txt, document 2 is not UTF-8 at byte 0 \(0xe9\)"):
        all_read(TextFiles(tmp_path, separator="--"))
    assert all_read(TextFiles(tmp_path, separator="--", skip_bad=True)) == ["one", None, "three"]


def test_the_marker_is_named_once_where_no_separator_is_passed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"one{MARK}two")
    source = TextFiles(tmp_path)
    with caplog.at_level(logging.INFO):
        assert all_read(source) == all_read(source) == [f"one{MARK}two"] * 2
    [line] = [record.getMessage() for record in caplog.records]
    assert re.search(r"text in .* holds <\|endoftext\|>, which .*data\.separator", line)


def test_the_separator_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a--b")
    prints = {TextFiles(tmp_path, separator=s).fingerprint() for s in (None, "-", "--")}
    assert len(prints) == 3


def test_text_may_have_another_name(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"body": "here"}\n')
    assert all_read(TextFiles(path, text_column="body")) == ["here"]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_arrow_type_of_text_is_read(tmp_path: Path, kind: str) -> None:
    texts = pa.array(["ä", "b", "ä"])
    if kind == "dictionary":
        column = texts.dictionary_encode()
    elif hasattr(pa, kind):
        column = texts.cast(getattr(pa, kind)())
    else:
        pytest.skip(f"this pyarrow has no {kind}")
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert all_read(TextFiles(tmp_path)) == ["ä", "b", "ä"]


def test_parquet_of_many_row_groups_is_read_and_continued(tmp_path: Path) -> None:
    texts: list[str | None] = [f"document {i}" for i in range(1000)]
    write_parquet(tmp_path / "a.parquet", texts[:600], row_group_size=130)
    write_parquet(tmp_path / "b.parquet", texts[600:], row_group_size=70)
    for skip in (0, 1, 129, 130, 131, 599, 600, 601, 669, 670, 999, 1000):
        assert list(TextFiles(tmp_path).documents(skip)) == texts[skip:]


def test_skipped_files_are_not_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["one", "two"])
    damage_row_group(tmp_path / "a.parquet", 0)
    (tmp_path / "b.jsonl").write_text("{\n{\n")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    (tmp_path / "d.txt").write_text("last")
    assert list(TextFiles(tmp_path).documents(skip=5)) == ["last"]


# Fingerprints


def test_text_fingerprint_follows_names_and_contents_not_the_place(folder: Path) -> None:
    before = TextFiles(folder).fingerprint()
    moved = folder.rename(folder.with_name("moved"))
    assert TextFiles(moved).fingerprint() == before
    assert TextFiles(moved, skip_bad=True).fingerprint() == before
    assert TextFiles(moved, text_column="body").fingerprint() != before
    (moved / "a.txt").write_text("ONE")
    assert TextFiles(moved).fingerprint() != before


@pytest.mark.parametrize("place", [0, 507_500, -1])
def test_large_files_are_distinguished_by_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(nanogpt.data.source, "HASHED_WHOLE_BYTES", 999_999)
    monkeypatch.setattr(nanogpt.data.source, "SAMPLE_BYTES", 1000)
    path = tmp_path / "a.txt"
    data = bytearray(1_000_000)
    path.write_bytes(data)
    before = files_fingerprint(tmp_path, [path])
    data[10_000] = 1  # between two of the 64 blocks of 1000 bytes
    path.write_bytes(data)
    assert files_fingerprint(tmp_path, [path]) == before
    data[place] = 1
    path.write_bytes(data)
    assert files_fingerprint(tmp_path, [path]) != before


# What cannot be read


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, None, "data=text needs data.path="),
        ("absent.txt", None, "does not exist"),
        ("absent/*.txt", None, "does not exist|holds no file"),
        ("empty.txt", b"", "only empty files"),
        ("data.csv", b"a,b", "holds no file that ends in .txt, .md, .py, .parquet, .jsonl, "),
        ("bad.txt", b"caf\xe9", "bad.txt is not UTF-8 at byte 3 .0xe9."),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "bad.jsonl, line 2 is not UTF-8 at byte"),
        (
            "no.jsonl",
            b'{"text": "a"}\n\n{"body": "b"}',
            "no.jsonl, line 3 .*'text'.*body.*data.text_column=",
        ),
        ("list.jsonl", b"[1]", "line 1 has no text under 'text'"),
        ("number.jsonl", b'{"text": 1}', r"line 1 has no text under 'text' \(1 is there"),
        ("null.jsonl", b'{"text": null}', r"under 'text' \(null is there\); write records such as"),
        ("array.json", b'[\n{"text": "a"}]', "line 1 is not JSON .*write one record per line"),
        ("zip.txt", b"PK\x03\x04\xff", "is not UTF-8 at byte 4 .*; unpack it"),
        (
            "gzip.jsonl",
            gzip.compress(b"{}", mtime=0),
            "line 1 is not UTF-8 at byte 1 .0x8b.; unpack it",
        ),
        ("utf16.txt", "ä".encode("utf-16"), "is not UTF-8 at byte 0 .*convert it with iconv"),
        ("deep.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("cut.jsonl", b'{"text": "a"}\n{"text":', "cut.jsonl, line 2 is not JSON"),
        (
            "cut.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n', mtime=0)[:-9],
            "cut.jsonl.gz, line 2 is damaged",
        ),
        ("no.jsonl.gz", b"plain", "no.jsonl.gz, line 1 is damaged"),
        ("no.jsonl.zst", b"plain text", "no.jsonl.zst, line 1 is damaged"),
        ("no.parquet", b"plain", "no.parquet is not a whole parquet file"),
    ],
)
def test_bad_text_is_refused_in_one_sentence(
    tmp_path: Path, name: str | None, content: bytes | None, words: str
) -> None:
    path = None if name is None else tmp_path / name
    if path is not None and content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        all_read(TextFiles(path))
    assert "\n" not in str(error.value)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no file that ends in"):
        TextFiles(tmp_path).fingerprint()
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match="holds only empty files"):
        TextFiles(tmp_path).fingerprint()


def test_an_unknown_column_is_refused_with_those_there_are(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["one"])
    for skip_bad in (False, True):
        source = TextFiles(tmp_path, text_column="body", skip_bad=skip_bad)
        with pytest.raises(
            ValueError, match=r"no column 'body' of text .columns of text: text.; pass"
        ):
            all_read(source)


def test_a_column_that_is_not_text_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["one"])
    with pytest.raises(ValueError, match=r"no column 'n' of text .columns of text: text."):
        all_read(TextFiles(tmp_path, text_column="n"))


def test_bad_records_are_refused_by_row_or_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pa.array([b"one", None, b"\xff", b"four"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), path)
    with pytest.raises(ValueError, match=r"a.parquet, row 2 is null .* data.skip_bad=true"):
        all_read(TextFiles(path))
    with pytest.raises(ValueError, match=r"a.parquet, row 3 is not UTF-8 at byte 0 \(0xff\)"):
        list(TextFiles(path).documents(skip=2))
    assert all_read(TextFiles(path, skip_bad=True)) == ["one", None, None, "four"]


def test_bad_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{\n\n{"text": "\xff"}\n{"body": "b"}\n[]\n{"text": "z"}\n')
    assert all_read(TextFiles(path, skip_bad=True)) == ["a", None, None, None, None, "z"]


def test_records_come_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r\n\n  \n[1]')
    assert list(records.json_records(path)) == [("line 1", {"a": "é"}), ("line 4", [1])]


def test_a_damaged_row_group_costs_its_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts: list[str | None] = [f"document {i}" for i in range(30)]
    write_parquet(path, texts, row_group_size=10)
    damage_row_group(path, 1)
    with pytest.raises(ValueError, match=r"a.parquet is damaged in row group 1, rows 11 to 20"):
        all_read(TextFiles(path))
    expected = [*texts[:10], *[None] * 10, *texts[20:]]
    for skip in (0, 5, 10, 15, 20, 25):
        assert list(TextFiles(path, skip_bad=True).documents(skip)) == expected[skip:]


def test_a_file_that_is_no_parquet_costs_one_record(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["one"] * 100)
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-1])
    (tmp_path / "b.txt").write_text("two")
    source = TextFiles(tmp_path, skip_bad=True)
    assert all_read(source) == [None, "two"]
    assert list(source.documents(skip=1)) == ["two"]


@settings(deadline=None, max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
@example(place=0.0413204742655886, value=0)  # a row group that ends early, without an error
def test_no_damage_to_parquet_breaks_reading(
    tmp_path_factory: pytest.TempPathFactory, place: float, value: int
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a.parquet"
    write_parquet(path, [f"document {i}" for i in range(40)], row_group_size=10)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] = value
    path.write_bytes(data)
    reader = Reader(skip_bad=True)
    try:
        found = list(reader.read([str(path)]))
    except ValueError:  # the footer lists other columns
        return
    assert list(reader.read([str(path)], skip=7)) == found[7:]


@pytest.mark.skipif("NANOGPT_TEST_DATA" not in os.environ, reason="needs NANOGPT_TEST_DATA")
def test_pages_of_fineweb_edu_are_read() -> None:
    path = Path(os.environ["NANOGPT_TEST_DATA"]) / "fineweb_edu_sample/train_chunks.parquet"
    expected = pq.read_table(path).column("text").to_pylist()
    source = FineWebEdu(path=str(path))
    assert list(source.documents()) == expected
    assert list(source.documents(skip=100)) == expected[100:]


# The hub

README = """---
configs:
- config_name: pages
  data_files:
  - split: train
    path: pages/train*
  - split: test
    path: pages/test*
- config_name: others
  data_files: others/*
---
"""
PAGES: list[str | None] = [f"page {i}" for i in range(100)]


@dataclass(frozen=True)
class Visit:
    """A hub, and a process for which it is the hub."""

    hub: Hub
    cache: Path
    process: Executor

    def read(self, source: HubDataset, skip: int = 0) -> list[str | None]:
        return self.process.submit(hub_server.documents, source, skip).result(timeout=60)


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    folder = tmp_path_factory.mktemp("hub")
    pages = folder / "someone/something"
    write_parquet(pages / "pages/train-0.parquet", PAGES[:60], row_group_size=25)
    write_parquet(pages / "pages/train-1.parquet", PAGES[60:], row_group_size=25)
    write_parquet(pages / "pages/test-0.parquet", ["held out"])
    write_parquet(pages / "others/train.parquet", ["other"])
    (pages / "README.md").write_text(README)
    lines = b'{"text": "first"}\n{"text": "second"}\n'
    for name, content in (
        ("lines/a.jsonl", lines),
        ("texts/a.txt", b"first"),
        ("texts/b.txt", b"second"),
        ("compressed/a.jsonl.gz", gzip.compress(lines, mtime=0)),
        ("array/a.json", b'[{"text": "first"}, {"text": "second"}]'),
        ("table/a.csv", b"text,n\nfirst,1\nsecond,2\n"),
        ("program/program.py", b"raise SystemExit"),
    ):
        path = folder / "someone" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    cache = tmp_path_factory.mktemp("cache")
    with (
        hub_server.serving(Hub(folder)) as hub,
        hub_server.visitor(hub.url, cache) as process,
    ):
        yield Visit(hub, cache, process)


DATA_SET = HubDataset(repository="someone/something", subset="pages")


@pytest.mark.parametrize("skip", [0, 1, 25, 60, 99, 100])
def test_a_data_set_of_the_hub_is_read_and_continued(visit: Visit, skip: int) -> None:
    assert visit.read(DATA_SET, skip) == PAGES[skip:]


def test_another_split_may_be_read(visit: Visit) -> None:
    assert visit.read(replace(DATA_SET, split="test")) == ["held out"]


@pytest.mark.parametrize("name", ["lines", "texts", "compressed", "array", "table"])
def test_other_kinds_of_files_are_read(visit: Visit, name: str) -> None:
    source = HubDataset(repository=f"someone/{name}")
    assert visit.read(source) == ["first", "second"]
    assert visit.read(source, skip=1) == ["second"]


def test_a_branch_is_pinned_to_its_commit(visit: Visit) -> None:
    pinned = visit.process.submit(hub_server.pinned, DATA_SET).result(timeout=60)
    assert pinned == replace(DATA_SET, revision=COMMIT)
    assert visit.read(pinned) == PAGES
    assert pinned.description()["revision"] == COMMIT


def test_the_files_are_not_stored_on_disk(visit: Visit) -> None:
    visit.read(DATA_SET)
    assert list(visit.cache.rglob("README.md"))
    assert not list(visit.cache.rglob("*.parquet"))
    assert not list(visit.cache.rglob("*.arrow"))


def test_a_busy_hub_is_retried(visit: Visit) -> None:
    visit.hub.failures[:] = [(503, "")]
    assert visit.read(DATA_SET) == PAGES


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (
            replace(DATA_SET, subset=None),
            ValueError,
            "needs data.subset=NAME, one of pages, others",
        ),
        (replace(DATA_SET, subset="x"), ValueError, "needs data.subset=NAME, one of pages, others"),
        (replace(DATA_SET, split="val"), ValueError, "no split val; .* one of test, train"),
        (replace(DATA_SET, revision="v2"), FileNotFoundError, "at v2 has no such file or revision"),
        (replace(DATA_SET, text_column="body"), ValueError, "columns of text: text.; pass"),
        (
            HubDataset(repository="someone/table", text_column="b"),
            ValueError,
            "record 1 .*it has text, n",
        ),
        (
            HubDataset(repository="someone/program"),
            ValueError,
            "is made by a program.*refs/convert",
        ),
        (
            HubDataset(repository="someone/else"),
            PermissionError,
            "is not on the hub, or is gated or private: .*HF_T",
        ),
    ],
)
def test_what_the_hub_lacks_is_an_error_of_one_sentence(
    visit: Visit, source: HubDataset, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as raised:
        visit.read(source)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("status", "code", "error", "words"),
    [
        (401, "", PermissionError, "is gated or private: .* HF_TOKEN"),
        (403, "GatedRepo", PermissionError, "accept its terms on .* HF_TOKEN"),
        (410, "", ConnectionError, "broke off .* the same command continues it"),
    ],
)
def test_a_refusal_of_the_hub_is_an_error_of_one_sentence(
    visit: Visit, status: int, code: str, error: type[Exception], words: str
) -> None:
    visit.hub.failures[:] = [(status, code)]
    with pytest.raises(error, match=words) as raised:
        visit.read(DATA_SET)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_error_without_a_network_names_what_to_do(tmp_path: Path, offline: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening: connections are refused
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code = "from nanogpt.data.fineweb_edu import FineWebEdu; next(FineWebEdu().documents())"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )
    (last,) = [line for line in done.stderr.splitlines() if line.startswith("ConnectionError: ")]
    assert "HuggingFaceFW/fineweb-edu" in last
    assert "data.path=" in last
    assert ("HF_HUB_OFFLINE" if offline == "1" else endpoint) in last


def test_the_hubs_fingerprint_needs_no_network_and_distinguishes_sources() -> None:
    sources = [
        DATA_SET,
        replace(DATA_SET, subset="others"),
        replace(DATA_SET, split="test"),
        replace(DATA_SET, revision=COMMIT),
        replace(DATA_SET, text_column="body"),
        replace(DATA_SET, repository="someone/else"),
        FineWebEdu(),
    ]
    assert len({source.fingerprint() for source in sources}) == len(sources)
    assert replace(DATA_SET, skip_bad=True).fingerprint() == DATA_SET.fingerprint()


def test_local_files_of_a_data_set_need_no_hub(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a/1.parquet", ["one", "two"])
    (tmp_path / "README.md").write_text("not a document")
    source = replace(DATA_SET, path=str(tmp_path))
    assert list(source.documents(skip=1)) == ["two"]
    assert source.pinned() == source
    before = source.fingerprint()
    write_parquet(tmp_path / "a/1.parquet", ["one", "three"])
    assert source.fingerprint() != before


def test_a_file_whose_name_begins_with_a_tilde_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~nobody, é.txt").write_text("a text")
    assert list(TextFiles("~nobody, é.txt", val_fraction=0.5).documents()) != []
