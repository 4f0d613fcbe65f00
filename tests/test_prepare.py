"""`python -m nanogpt.prepare`: what is typed is what is prepared."""

import inspect
import os
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import yaml

from nanogpt import prepare as command
from nanogpt.data.corpus import open_corpus
from nanogpt.prepare import SOURCES, choose_source, choose_tokenizer, count, main, parser

ROOT = Path(__file__).parent.parent
GENUINE = Path(os.environ.get("NANOGPT_TEST_DATA", "")) / "fineweb_edu_sample/train_chunks.parquet"


def _options(*words: str):  # type: ignore[no-untyped-def]
    return parser().parse_args(words)


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    path = tmp_path / "pages.jsonl"
    path.write_text("".join(f'{{"body": "Page {i} is about {i * i}."}}\n' for i in range(200)))
    return path


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_source_is_the_one_that_training_composes(name: str) -> None:
    config = yaml.safe_load((ROOT / "conf/data" / f"{name}.yaml").read_text())
    source = choose_source(_options(name))
    fields = inspect.signature(type(source)).parameters
    typed = {key: value for key, value in config.items() if key in fields}
    assert type(source)(**typed) == source
    assert config["_target_"] == f"{type(source).__module__}.{type(source).__name__}"


@pytest.mark.parametrize("name", ["gpt2", "byte", "bpe"])
def test_a_tokenizer_has_the_key_that_training_gives_it(name: str) -> None:
    from nanogpt.build import tokenizer_key

    config = yaml.safe_load((ROOT / "conf/tokenizer" / f"{name}.yaml").read_text())
    assert choose_tokenizer(name, _options().vocab_size)[0] == tokenizer_key(config)


@pytest.mark.parametrize(
    ("text", "number"), [("10B", 10**10), ("1.5M", 1_500_000), ("20k", 20_000), ("7", 7)]
)
def test_numbers_of_tokens_may_have_a_unit(text: str, number: int) -> None:
    assert count(text) == number


@pytest.mark.parametrize("text", ["", "B", "ten", "-5", "0.5", "1.23456k", "inf", "nan"])
def test_other_numbers_of_tokens_are_wrong_usage(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["text", f"--tokens={text}"])
    assert error.value.code == 2
    assert "--tokens: " in (output := capsys.readouterr().err)
    assert "pass one such as 500000, 100M or 10B" in output


def test_a_file_becomes_a_corpus(
    pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--path", str(pages), "--text-column", "body", "--tokenizer", "byte"]
    assert main([*words, "--out", str(tmp_path / "out"), "--val-fraction", "0.2"]) == 0
    corpus = open_corpus(tmp_path / "out")
    splits = corpus.manifest["splits"]
    assert splits["train"]["documents"] + splits["val"]["documents"] == 200
    output = capsys.readouterr().out
    assert f"train: {len(corpus.train):,} tokens" in output
    assert f"data=shards data.path={tmp_path / 'out'}" in output


def test_the_path_alone_names_a_data_set(pages: Path) -> None:
    assert choose_source(_options(str(pages))) == choose_source(_options("--path", str(pages)))


def test_a_repository_is_a_data_set_of_the_hub() -> None:
    source = choose_source(_options("owner/name", "--subset", "en", "--revision", "v1"))
    assert source.description() == {
        "repository": "owner/name",
        "subset": "en",
        "split": "train",
        "revision": "v1",
        "text_column": "text",
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["wikipedia"], "there is no data set wikipedia"),
        (["python_stdlib", "--subset", "en"], "python_stdlib has no option --subset"),
        (["text"], "text needs --path <a file"),
        (["--path", "nowhere.parquet"], "does not exist"),
    ],
)
def test_what_cannot_be_prepared_is_an_error_of_one_sentence(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--tokenizer", "byte", "--data-dir", str(tmp_path)]) == 1
    output = capsys.readouterr().err
    assert output.startswith("nanogpt.prepare: ")
    assert expected in output
    assert output.count("\n") == 1


def test_weights_are_fetched_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "fetch_pretrained", lambda name, data_dir: data_dir / name)
    assert main(["gpt2-medium", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 'gpt2-medium'}: train from it with init_from=gpt2-medium\n"
    )


@pytest.mark.skipif(not GENUINE.is_file(), reason="NANOGPT_TEST_DATA is not set")
def test_genuine_pages_have_tiktokens_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow.parquet import read_table

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.environ["NANOGPT_TEST_DATA"] + "/tiktoken_cache")
    assert main(["fineweb_edu", "--path", str(GENUINE), "--out", str(tmp_path / "out")]) == 0
    corpus = open_corpus(tmp_path / "out")
    reference = tiktoken.get_encoding("gpt2")
    pages = read_table(GENUINE).column("text").to_pylist()
    found: list[list[int]] = []
    for stream in (corpus.train, corpus.val):
        tokens = stream.read(0, len(stream))
        starts = np.flatnonzero(tokens == reference.eot_token)
        found += [part[1:].tolist() for part in np.split(tokens, starts[1:])]
    assert sorted(found) == sorted(reference.encode_ordinary_batch(pages))
    assert sorted(corpus.tokenizer.decode(ids) for ids in found) == sorted(pages)
