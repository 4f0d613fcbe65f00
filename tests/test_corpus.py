"""An opened corpus: equal to its manifest, or refused by name."""

import json
import shutil
from pathlib import Path

import pytest

from nanogpt.data.corpus import FORMAT, open_corpus
from nanogpt.data.preparing import Preparation, prepare
from nanogpt.data.text import TextFiles
from nanogpt.tokenizer import bpe_tokenizer, byte_tokenizer


def _prepare(tmp_path: Path) -> Path:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "Document {i} is about {i * i}."}}\n' for i in range(50)))
    return prepare(
        Preparation(TextFiles(text), byte_tokenizer, "byte", tmp_path / "data")
    ).directory


def _flip_a_token(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1030] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("train_000000.bin", _flip_a_token, "SHA-256 is not that in the manifest"),
        ("val_000000.bin", Path.unlink, "No such file"),
        (
            "val_000000.bin",
            lambda path: path.write_bytes(path.read_bytes()[:-2]),
            "bytes, which are not the",
        ),
        (
            "val_000000.bin",
            lambda path: shutil.copy(path.with_name("train_000000.bin"), path),
            "tokens and .* in the manifest",
        ),
        ("manifest.json", Path.unlink, "No such file"),
        ("manifest.json", lambda path: path.write_text("{"), "Expecting property name"),
        ("manifest.json", lambda path: path.write_text("[]"), "list indices"),
        ("manifest.json", lambda path: path.write_text('{"format": 99}'), "format 99"),
        ("manifest.json", lambda path: path.write_text(f'{{"format": {FORMAT}}}'), "no 'splits'"),
        ("tokenizer.json", Path.unlink, "No such file"),
        (
            "tokenizer.json",
            lambda path: path.write_text(json.dumps(bpe_tokenizer(["abab"], 300).record())),
            "not the tokenizer that made",
        ),
        ("tokenizer.json", lambda path: path.write_text("{}"), "tokenizer.json.*malformed"),
    ],
)
def test_a_damaged_corpus_is_refused_by_name(tmp_path: Path, file, damage, words) -> None:  # type: ignore[no-untyped-def]
    directory = _prepare(tmp_path)
    damage(directory / file)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        open_corpus(directory)
    assert str(directory / file) in str(error.value)
    assert "\n" not in str(error.value)
