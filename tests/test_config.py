"""Paths and names on the command line, as Hydra reads them."""

import os
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

import serve
import train
from nanogpt.command import parse
from nanogpt.config import as_overrides
from nanogpt.generate import parser
from serving import environment
from serving.engine.messages import Settings

CONF = Path(__file__).parent.parent / "conf"
ODD = [
    "<|endoftext|>",
    "数据 (a=b), [1].txt",
    "données/é.txt",
    "{a}#b&c;d",
    "it's",
    'say "a"',
    "'half",
    "back\\slash\\",
    "back\\'s",
    "1e5",
    "true",
    "a,b",
    " a ",
    "choice(a)",
    "$HOME:%!?*",
    "C:\\new\\file.txt",
]


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize(
    "key", ["data.path", "name", "runs_dir", "init_from", "data.text_column", "data.separator"]
)
def test_paths_and_names_are_taken_as_they_stand(key: str, text: str) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config: Any = compose("train", overrides=as_overrides(["data=text", f"{key}={text}"]))
    for part in key.split("."):
        config = config[part]
    assert config == text


@pytest.mark.parametrize(
    "word",
    [
        "data.path=null",
        "data.path=''",
        "name='a b'",
        'name="a, b"',
        "seed=1,2",
        "--cfg",
        "~data.path",
    ],
)
def test_what_hydra_reads_as_meant_stays(word: str) -> None:
    assert as_overrides([word]) == [word]


def test_an_interpolation_in_a_path_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/somewhere")
    word = "data.path=${oc.env:WHERE}/数据 ${seed}.txt"
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose("train", overrides=as_overrides(["data=text", word]))
    assert config.data.path == "/somewhere/数据 1337.txt"


@pytest.mark.parametrize(
    ("value", "choices"),
    [
        ("a (1).txt,b.txt", ["a (1).txt", "b.txt"]),
        ("'a, b.txt',数据", ["a, b.txt", "数据"]),
        ("choice(a,b)", ["a", "b"]),
    ],
)
def test_a_comma_separates_the_paths_of_a_sweep(value: str, choices: list[str]) -> None:
    _, word = as_overrides(["-m", f"data.path={value}"])
    override = OverridesParser.create().parse_override(word)
    values: Any = override.sweep_iterator()
    assert [getattr(value, "text", value) for value in values] == choices


def test_home_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert as_overrides(["runs_dir=~/runs", "name=~x"]) == ["runs_dir=/home/me/runs", "name='~x'"]
    assert parse(parser(), ["~/a.ckpt", "--runs-dir=~/r", "--prompt=~/p"]).checkpoint == (
        "/home/me/a.ckpt"
    )
    read = environment.read(Settings, {"NANOGPT_MODELS": "~/m", "NANOGPT_RUNS_DIR": "~"})
    assert (read.models, read.runs_dir) == ("/home/me/m", "/home/me")


def test_home_is_expanded_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANOGPT_RUNS_DIR", "~/runs")
    monkeypatch.setattr("sys.argv", ["train.py"])
    train.main(["--cfg", "job", "--resolve"])
    assert f"runs_dir: {tmp_path}/runs" in capsys.readouterr().out
    assert os.environ["NANOGPT_RUNS_DIR"] == f"{tmp_path}/runs"


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("batch_size", "tokens_per_step"),
        ("max_iters", "max_steps"),
        ("learning_rate", "optim.learning_rate"),
        ("optim.lr", "optim.learning_rate"),
        ("epochs", "max_steps"),
        ("device", "trainer.accelerator"),
        ("dtype", "trainer.precision"),
    ],
)
def test_a_key_of_another_program_has_the_hint_of_ours(typed: str, ours: str) -> None:
    hint = train.explain_composition(ValueError(f"Could not override '{typed}'"))
    assert f"did you mean {ours}" in hint


@pytest.mark.parametrize("main", [train.main, serve.main])
def test_what_hydra_cannot_parse_is_one_sentence(
    main: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert main(["dtype=数据 ("]) == 2
    error = capsys.readouterr().err
    assert "dtype=数据 ( is not an override of the form key=value" in error
    assert "'dtype=\"数据 (\"'" in error
    assert error.count("\n") == 1
