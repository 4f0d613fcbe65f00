"""Token shards of any make: recognized by content, read in place, refused by name."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nanogpt.data import pretokenized
from nanogpt.data.corpus import FORMAT, Corpus
from nanogpt.data.pretokenized import TokenShards, fetch_pretokenized
from nanogpt.data.writer import JOURNAL
from nanogpt.tokenizer import Tokenizer, byte_tokenizer
from tests.hub_server import Hub, serving

BYTES = byte_tokenizer()  # ids 0 .. 272
TOKENS = np.arange(3000) % 250


def write_bin(path: Path, tokens: np.ndarray, dtype: str = "<u2") -> Path:
    """Write a shard as llm.c does (dev/data/data_common.py, write_datafile)."""
    header = np.zeros(256, "<i4")
    header[:3] = (*{"<u2": (20240520, 1), "<u4": (20240801, 7)}[dtype], len(tokens))
    path.write_bytes(header.tobytes() + tokens.astype(dtype).tobytes())
    return path


def write_bare(path: Path, tokens: np.ndarray) -> Path:
    """Write tokens as nanoGPT does (data/shakespeare_char/prepare.py: ndarray.tofile)."""
    tokens.astype(np.uint16).tofile(path)
    return path


def write_npy(path: Path, tokens: np.ndarray, dtype: Any = np.uint16) -> Path:
    """Write tokens as build-nanogpt does (fineweb.py: np.save)."""
    np.save(path, tokens.astype(dtype))
    return path


def write_prepared(directory: Path, key: str = "byte") -> Path:
    """Write what a preparation with the byte tokenizer leaves."""
    splits = {}
    for split in ("train", "val"):
        path = write_bin(directory / f"{split}_000000.bin", TOKENS)
        shard = {"file": path.name, "n_tokens": 3000, "sha256": _sha256(path)}
        splits[split] = {"documents": 1, "bytes": 2999, "tokens": 3000, "shards": [shard]}
    tokenizer = {"key": key, "name": "byte", "fingerprint": BYTES.fingerprint, "vocab_size": 273}
    manifest = {
        "format": FORMAT,
        "source": {"name": "text", "fingerprint": "abc"},
        "split": {"val_fraction": 0.1, "val_below": 0.1},
        "tokenizer": tokenizer,
        "splits": splits,
    }
    (directory / "tokenizer.json").write_text(json.dumps(BYTES.record()))
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_shards(path: Path, tokenizer: Tokenizer = BYTES, **values: Any) -> Corpus:
    return TokenShards(path, **values).open(tokenizer, tokenizer.name)


def all_tokens(corpus: Corpus) -> tuple[list[int], list[int]]:
    train, val = (s.read(0, len(s)).tolist() for s in (corpus.train, corpus.val))
    return train, val


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (write_bin, ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]),
        (write_bin, ["tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin"]),
        (lambda path, tokens: write_bin(path, tokens, "<u4"), ["train.bin", "val.bin"]),
        (write_bare, ["train.bin", "val.bin"]),
        (write_npy, ["edufineweb_train_000001.npy", "edufineweb_val_000000.npy"]),
        (lambda path, tokens: write_npy(path, tokens, ">i8"), ["train.npy", "validation.npy"]),
        (lambda path, tokens: write_npy(path, tokens, np.int32), ["a.npy", "a-test.npy"]),
    ],
)
def test_every_make_is_read_and_split_by_name(
    write: Callable[[Path, np.ndarray], Path], names: list[str], tmp_path: Path
) -> None:
    train, val = names
    write(tmp_path / train, TOKENS)
    write(tmp_path / val, TOKENS[:100])
    (tmp_path / "input.txt").write_text("not a shard")
    corpus = open_shards(tmp_path)
    assert all_tokens(corpus) == (TOKENS.tolist(), TOKENS[:100].tolist())
    assert corpus.tokenizer is BYTES
    assert corpus.directory == tmp_path


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        write_bin(tmp_path / f"train_{number:06d}.bin", np.full(5, number))
    write_bin(tmp_path / "val_000000.bin", np.full(5, 9))
    train, _ = all_tokens(open_shards(tmp_path))
    assert train == [0] * 5 + [1] * 5 + [2] * 5


def test_without_a_validation_file_the_last_tokens_are_held_out(tmp_path: Path) -> None:
    write_npy(tmp_path / "a_0.npy", np.arange(10_000) % 200)
    write_npy(tmp_path / "a_1.npy", np.arange(2000) % 200)
    train, val = all_tokens(open_shards(tmp_path, val_fraction=0.25))  # 3,000 of 12,000
    assert len(val) == 3000
    assert train + val == [*(np.arange(10_000) % 200).tolist(), *(np.arange(2000) % 200).tolist()]


@pytest.mark.parametrize(
    ("n_tokens", "n_val"),
    [
        (100_000, 1025),  # a row of GPT-2's, not 0.001 of them
        (100, 50),  # never more than half
    ],
)
def test_what_is_held_out_is_at_least_a_row_and_at_most_half(
    n_tokens: int, n_val: int, tmp_path: Path
) -> None:
    write_bin(tmp_path / "a.bin", np.zeros(n_tokens))
    assert len(open_shards(tmp_path).val) == n_val


def test_a_single_file_is_a_corpus_whatever_its_name(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "fineweb_val_000000.bin", TOKENS)
    write_bin(tmp_path / "fineweb_train_000002.bin", TOKENS)
    train, val = all_tokens(open_shards(path, val_fraction=0.5))
    assert train + val == TOKENS.tolist()


def test_a_prepared_folder_is_opened_with_its_own_tokenizer(tmp_path: Path) -> None:
    corpus = open_shards(write_prepared(tmp_path))
    assert corpus.tokenizer.fingerprint == BYTES.fingerprint
    assert corpus.manifest["source"]["name"] == "text"


def test_a_learnt_tokenizer_comes_with_a_prepared_folder_by_its_name(tmp_path: Path) -> None:
    write_prepared(tmp_path, key="bpe-2048")
    assert TokenShards(tmp_path).open(None, "bpe-2048").tokenizer.vocab_size == 273
    with pytest.raises(ValueError, match=r"bpe-2048 .* pass tokenizer=bpe tok.*=2048"):
        TokenShards(tmp_path).open(None, "bpe-4096")


def test_another_tokenizer_than_the_recorded_one_is_refused(tmp_path: Path) -> None:
    write_prepared(tmp_path, key="bpe-4096")
    other: Any = SimpleNamespace(name="gpt2", fingerprint="other", vocab_size=50257)
    with pytest.raises(
        ValueError,
        match=r"was tokenized with bpe-4096 and not with gpt2; pass tokenizer=bpe",
    ):
        TokenShards(tmp_path).open(other, "gpt2")


def test_a_corpus_that_is_not_finished_is_not_taken_for_foreign_shards(tmp_path: Path) -> None:
    write_prepared(tmp_path)
    (tmp_path / "manifest.json").rename(tmp_path / JOURNAL)
    for path in (tmp_path, tmp_path / "train_000000.bin"):
        with pytest.raises(ValueError, match="where it is not finished, issue"):
            open_shards(path)


def test_a_manifest_of_another_project_is_no_manifest(tmp_path: Path) -> None:
    write_bin(tmp_path / "train.bin", TOKENS)
    (tmp_path / "manifest.json").write_text('{"files": []}')
    assert len(open_shards(tmp_path).train) + len(open_shards(tmp_path).val) == 3000


def test_fingerprint_is_of_content_and_tokenizer_not_of_paths(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    for folder in (a, b, c):
        folder.mkdir()
        write_bin(folder / "train.bin", TOKENS)
        write_bin(folder / f"val_{folder.name}.bin", TOKENS[:10])
    one, same = open_shards(a).fingerprint, open_shards(b).fingerprint
    changed = TOKENS.copy()
    changed[1500] += 1
    write_bin(c / "train.bin", changed)
    other_tokenizer: Any = SimpleNamespace(name="gpt2", fingerprint="other", vocab_size=50257)
    assert one == same
    assert len({one, open_shards(c).fingerprint, open_shards(a, other_tokenizer).fingerprint}) == 3


def test_manifest_holds_what_is_known(tmp_path: Path) -> None:
    write_bin(tmp_path / "train_1.bin", TOKENS)
    write_bin(tmp_path / "val_1.bin", TOKENS[:10])
    manifest = open_shards(tmp_path).manifest
    assert manifest["tokenizer"]["fingerprint"] == BYTES.fingerprint
    assert manifest["splits"]["val"] == {
        "tokens": 10,
        "shards": [{"file": "val_1.bin", "n_tokens": 10}],
    }


def test_large_shards_are_checked_in_blocks_with_the_first_and_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretokenized, "READ_WHOLE_BYTES", 1000)
    monkeypatch.setattr(pretokenized, "SAMPLE_BYTES", 8)  # 4 tokens; 64 blocks are 256 of 600
    write_bin(tmp_path / "val.bin", TOKENS[:10])
    seen = []
    for at in range(600):
        tokens = TOKENS[:600].copy()
        tokens[at] = 300
        write_bin(tmp_path / "train.bin", tokens)
        try:
            open_shards(tmp_path)
        except ValueError as error:
            assert "train.bin holds the ids " in str(error)  # noqa: PT017
            seen.append(at)
    assert len(seen) == 256
    assert seen[:4] == [0, 1, 2, 3]
    assert seen[-4:] == [596, 597, 598, 599]
    assert np.diff(seen[::4]).max() <= 10  # evenly: 596 / 63 is 9.5


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _begin_differently(path: Path) -> None:
    path.write_bytes(b"abcd" + path.read_bytes()[4:])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: None, "holds no token shards"),
        (
            lambda d: write_bin(d / "train.bin", np.array([5, 273])),
            "train.bin holds the ids 5 to 273 ",
        ),
        (lambda d: write_npy(d / "t.npy", np.array([5, -1]), "i4"), "t.npy holds the ids -1 to 5 "),
        (lambda d: write_npy(d / "t.npy", TOKENS, "f4"), "array of float32"),
        (lambda d: write_npy(d / "t.npy", TOKENS.reshape(2, -1)), r"shape \(2, 1500\)"),
        (
            lambda d: np.save(d / "t.npy", np.array([None, 1])),
            "t.npy cannot be read .*Python objects",
        ),
        (lambda d: _cut_short(write_npy(d / "t.npy", TOKENS)), "t.npy cannot be read"),
        (
            lambda d: _cut_short(write_bin(d / "t.bin", TOKENS)),
            "t.bin cannot be read .7023 bytes, which are not the 3000 tokens",
        ),
        (lambda d: _cut_short(write_bare(d / "train.bin", TOKENS)), "no whole number of uint16"),
        (
            lambda d: (d / "a.bin").write_bytes(b"\x88\xd8\x34\x01"),
            "a.bin cannot be read .not a token",
        ),
        (lambda d: (d / "t.npy").write_bytes(b"\x93NUMPY\x01\x00v"), "t.npy cannot be read"),
        (
            lambda d: (d / "t.npy").write_bytes(b"\x93NUMPY\x07\x00\x02\x00{}"),
            "t.npy cannot be read .*version",
        ),
        (
            lambda d: _begin_differently(write_bin(d / "a_1.bin", TOKENS)),
            "a_1.bin cannot be read .not a token",
        ),
        (
            lambda d: [write_bin(d / "a.bin", TOKENS), write_bin(d / "b.bin", TOKENS, "<u4")],
            r"holds .bin of uint16 \(a.bin\) and .bin of uint32 \(b.bin\); keep one",
        ),
        (
            lambda d: [write_bare(d / "train.bin", TOKENS), (d / "meta.pkl").write_bytes(b"x")],
            "characters in its meta.pkl",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(
    make: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        open_shards(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_that_are_no_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data=shards needs data\.path="):
        TokenShards().open(BYTES, "byte")
    with pytest.raises(FileNotFoundError, match="nowhere holds no token shards"):
        open_shards(tmp_path / "nowhere")
    prepared = write_prepared(tmp_path)
    with pytest.raises(ValueError, match=r"is a corpus of nanogpt\.prepare; pass"):
        open_shards(prepared / "train_000000.bin")
    (prepared / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        open_shards(prepared)


def test_validation_shards_alone_are_not_trained_on(tmp_path: Path) -> None:
    write_bin(tmp_path / "val_1.bin", TOKENS)
    assert len(open_shards(tmp_path).train) == 0
    assert len(open_shards(tmp_path / "val_1.bin").train) == 1975


def test_tokens_alone_teach_no_tokenizer(tmp_path: Path) -> None:
    write_bin(tmp_path / "train.bin", TOKENS)
    with pytest.raises(ValueError, match="no text to learn tokenizer bpe-2048 from"):
        TokenShards(tmp_path).open(None, "bpe-2048")


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    assert fetch_pretokenized(str(tmp_path), tmp_path / "data") == tmp_path
    with pytest.raises(FileNotFoundError, match="pass a folder of token shards or a data set"):
        fetch_pretokenized(str(tmp_path / "no" / "such"), tmp_path)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own: huggingface_hub reads its environment once."""
    return subprocess.run(
        [sys.executable, "-c", f"from nanogpt.data.pretokenized import *\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0", **environment},
    )


def test_without_a_network_it_fails_within_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    code = f"fetch_pretokenized('someone/shards', Path({str(tmp_path)!r}))"
    done = run(code, HF_ENDPOINT="http://127.0.0.1:9")
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith("ConnectionError: someone/shards (a data set, as no local folder")
    assert "pass a folder of token shards" in last_line
    assert time.monotonic() - began < 30  # seconds, where the library alone would retry for minutes


def test_a_repository_is_fetched_once_and_found_again_without_a_network(tmp_path: Path) -> None:
    folder = tmp_path / "served" / "someone" / "something"
    folder.mkdir(parents=True)
    for name in ("edu_train_000001.bin", "edu_val_000000.bin"):
        write_bin(folder / name, TOKENS)
    (folder / "README.md").write_text("not a shard")
    code = (
        f"path = fetch_pretokenized('someone/something', Path({str(tmp_path / 'data')!r}))\n"
        "print(path)"
    )
    with serving(Hub(tmp_path / "served")) as hub:
        done = run(code, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    fetched = tmp_path / "data" / "pretokenized" / "someone--something"
    assert done.stdout.strip() == str(fetched)
    assert all_tokens(open_shards(fetched)) == (TOKENS.tolist(), TOKENS.tolist())
    assert not (fetched / "README.md").exists()
    assert run(code, HF_HUB_OFFLINE="1").stdout.strip() == str(fetched)


def test_a_repository_without_shards_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "someone" / "something"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("text")
    data = tmp_path / "data"
    with serving(Hub(tmp_path)) as hub:
        for repository, words in (
            (
                "something",
                f"FileNotFoundError: {data}/pretokenized/someone--something holds no tok",
            ),
            (
                "else",
                "PermissionError: someone/else (a data set, as no local folder has that name)",
            ),
        ):
            code = f"TokenShards(fetch_pretokenized('someone/{repository}', Path({str(data)!r})))"
            done = run(f"{code}.fingerprint()", HF_ENDPOINT=hub.url)
            assert done.stderr.splitlines()[-1].startswith(words)


def test_an_interrupted_fetch_names_how_to_continue_and_leaves_no_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx

    def broken(repository: str, **options: Any) -> None:
        write_bin(Path(options["local_dir"]) / "train.bin", TOKENS)
        raise httpx.ReadTimeout("The read operation timed out")

    api = SimpleNamespace(dataset_info=lambda _: SimpleNamespace(sha="abc"))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    monkeypatch.setattr("nanogpt.hub.problem_of", lambda _: "")
    for _ in range(2):
        with pytest.raises(ConnectionError, match=r"timed out\); the same command continues it"):
            fetch_pretokenized("someone/shards", tmp_path)
