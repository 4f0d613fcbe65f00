"""The command `python -m nanogpt.inspect`."""

import json
from pathlib import Path

import numpy as np
import pytest

from nanogpt import inspect
from nanogpt.data.corpus import Corpus
from nanogpt.data.preparing import Preparation, prepare
from nanogpt.data.text import TextFiles
from nanogpt.data.writer import JOURNAL
from nanogpt.inspect import main
from nanogpt.tokenizer import byte_tokenizer

EOT = byte_tokenizer().eot_id


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Ten documents of 20 bytes and a long one, as bytes, in shards of 100 tokens."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(10):
        (texts / f"{i}.txt").write_text(f"document {i}".ljust(20, "."))
    (texts / "long.txt").write_text("\x1b[31mred " + "é" * 400)
    source = TextFiles(texts, val_fraction=0.2)
    return prepare(
        Preparation(source, lambda _: byte_tokenizer(), "byte", tmp_path / "data", shard_tokens=100)
    )


def test_a_prepared_corpus_is_described_sampled_and_verified(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(corpus.directory), "--samples", "40"]) == 0
    output = capsys.readouterr().out
    train = corpus.manifest["splits"]["train"]
    assert "source     text" in output
    assert "tokenizer  byte, 273 ids" in output
    assert f"{train['tokens']:,} tokens, {train['documents']:,} documents" in output
    assert f"{train['bytes'] / train['tokens']:.2f} bytes per token" in output
    assert "  | document" in output
    assert "\x1b" not in output
    assert output.endswith("\nall shards as recorded\n")


def test_a_damaged_shard_is_named(
    corpus: Corpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanogpt.data.corpus.HASHED_TOKENS", 0)  # as for a large corpus
    path = corpus.directory / "train_000001.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main([str(corpus.directory), "--no-verify"]) == 0
    assert main([str(corpus.directory)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"nanogpt.inspect: {path} cannot be read (its SHA-256 is not that ")
    assert len(error.splitlines()) == 1


def test_shards_of_others_are_read_with_the_tokenizer_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = np.array([*b"first", EOT, *b"second ", EOT] * 300, dtype=np.uint16)
    np.save(tmp_path / "a.npy", tokens)
    assert main([str(tmp_path / "a.npy"), "--tokenizer", "byte", "--samples", "2"]) == 0
    output = capsys.readouterr().out
    assert "train      1 shard, 3,175 tokens" in output  # of 4,200, all but 1,025
    assert output.count("  | first\n") + output.count("  | second \n") == 2
    assert "no SHA-256 is recorded" in output


def test_shards_of_others_are_read_as_gpt2_whose_missing_table_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable() -> None:
        raise FileNotFoundError("no table")

    monkeypatch.setattr(inspect, "gpt2_tokenizer", unavailable)
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == "nanogpt.inspect: no table\n"


def test_without_a_path_corpora_are_listed(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir = corpus.directory.parent
    (data_dir / "begun").mkdir()
    (data_dir / "begun" / JOURNAL).write_text("{}")
    (data_dir / "another").mkdir()
    assert main(["--data-dir", str(data_dir)]) == 0
    begun, made = capsys.readouterr().out.splitlines()
    assert begun == f"{data_dir / 'begun'}  not finished; the command that began it continues"
    assert made == (
        f"{corpus.directory}  byte, {len(corpus.train):,} training and "
        f"{len(corpus.val):,} validation tokens"
    )


def test_without_corpora_it_prints_how_to_make_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data-dir", str(tmp_path)]) == 0
    assert "python -m nanogpt.prepare DATASET makes one" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["nowhere", "manifest"])
def test_bad_input_is_one_sentence(
    broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text("{")
    path = tmp_path if broken == "manifest" else tmp_path / broken
    assert main([str(path), "--tokenizer", "byte"]) == 1
    error = capsys.readouterr().err
    assert str(path) in error
    assert len(error.splitlines()) == 1


def test_the_listing_reads_manifests_only(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((corpus.directory / "manifest.json").read_text())
    for shard in manifest["splits"]["train"]["shards"]:
        (corpus.directory / shard["file"]).unlink()
    assert main(["--data-dir", str(corpus.directory.parent)]) == 0
    assert f"{manifest['splits']['train']['tokens']:,} training" in capsys.readouterr().out


def test_a_path_that_does_not_exist_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nothere")]) == 1
    assert "nothere does not exist; pass a prepared folder" in capsys.readouterr().err
