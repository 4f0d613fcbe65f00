"""Paths and names on the command line, as Hydra reads them, and objects built from nodes."""

import dataclasses
import importlib
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pydantic
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import serve
import train
from nanogpt.build import ConfigurationError, build, source_fingerprint
from nanogpt.command import parse
from nanogpt.config import as_overrides
from nanogpt.generate import parser
from nanogpt.ranks import RankZeroFailedError
from nanogpt.values import CHECKED, Count
from serving.api.settings import ApiSettings

CONF = Path(__file__).parent.parent / "conf"
ODD = [
    "<|endoftext|>",
    "数据 (a=b), [1].txt",
    "données/é.txt",
    "{a}#b&c;d",
    "it's",
    'quote "a"',
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
    assert as_overrides([word])[0].removeprefix("++") == word


@pytest.mark.parametrize(
    "word", ["optim.fused=true", "+optim.fused=true", "++optim.fused=true", "schedule.a={b: 1}"]
)
def test_a_node_s_key_may_be_new_without_a_plus_sign(word: str) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config: Any = compose("train", overrides=as_overrides([word]))
    assert config.optim.get("fused") is True or config.schedule.a == {"b": 1}


@pytest.mark.parametrize("word", ["hydra.searchpath=[pkg://a]", "--config-dir=a b"])
def test_options_of_hydra_are_not_quoted(word: str) -> None:
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
    read = ApiSettings(checkpoint="~/m", runs_dir="~")
    assert (read.checkpoint, read.runs_dir) == ("/home/me/m", "/home/me")


def test_home_is_expanded_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANOGPT_RUNS_DIR", "~/runs")
    monkeypatch.setattr("sys.argv", ["train.py"])
    train.main(["--cfg", "job", "--resolve"])
    assert f"runs_dir: {tmp_path}/runs" in capsys.readouterr().out
    assert os.environ["NANOGPT_RUNS_DIR"] == f"{tmp_path}/runs"


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


class Open:
    def __init__(self, model: Any = None, **more: Any) -> None:
        self.values = (model, more)


@dataclasses.dataclass
class Record:
    model: Any
    patience: int = 3


@pydantic.dataclasses.dataclass(config=CHECKED)
class Checked:
    run_dir: Path
    patience: Count = 3


@pydantic.validate_call
def validated(seed: int, patience: Annotated[int, pydantic.Field(strict=True, ge=1)] = 3) -> Any:
    return (seed, patience)


def needs_package(package: str) -> None:
    importlib.import_module(package)


def fails(error: str) -> None:
    raise {"OSError": OSError, "ValueError": ValueError, "KeyError": KeyError}[error](error)


def holds(inner: Any, name: str = "") -> Any:
    return inner, name


NOT_CALLABLE = 5
LIVE = {"model": "the model", "run_dir": Path("runs/a"), "seed": 7}


def here(name: str, **keys: Any) -> dict[str, Any]:
    return {"_target_": f"{__name__}.{name}", **keys}


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (here("Record"), ("the model", 3)),
        (here("Record", model="mine", patience=1), ("mine", 1)),
        (here("Checked"), (Path("runs/a"), 3)),
    ],
)
def test_a_class_receives_the_live_objects_that_it_names(
    node: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert tuple(vars(build(node, "it", **LIVE)).values()) == expected


def test_a_function_receives_the_live_objects_that_it_names() -> None:
    assert build(here("validated", patience=2), "it", **LIVE) == (7, 2)


def test_a_class_of_any_keys_receives_only_the_live_objects_that_it_names() -> None:
    assert build(here("Open", other=1), "it", **LIVE).values == ("the model", {"other": 1})


def test_a_partial_node_is_a_function_of_what_is_missing() -> None:
    make = build(here("Record", _partial_=True, patience=1), "it")
    assert isinstance(make, partial)
    assert make("a model") == Record("a model", 1)


def test_nested_nodes_are_built_first_in_lists_and_mappings_too() -> None:
    inner = [here("Record"), {"a": here("Record", patience=1)}, "text"]
    built, _ = build(OmegaConf.create(here("holds", inner=inner)), "it", **LIVE)
    assert built == [Record("the model"), {"a": Record("the model", 1)}, "text"]


def test_a_class_of_a_library_takes_keys_that_its_signature_leaves_open() -> None:
    strategy = "lightning.pytorch.strategies.DDPStrategy"
    assert build({"_target_": strategy, "find_unused_parameters": True}, "it", **LIVE)


def test_a_callable_without_a_signature_is_called_as_it_is() -> None:
    assert build({"_target_": "builtins.dict", "a": 1}, "it", **LIVE) == {"a": 1}


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"patience": 1}, "it has no _target_; give it the class's import path"),
        (None, "it has no _target_"),
        ({"_target_": None}, "it._target_=None cannot be imported: None: ModuleNotFoundError"),
        ({"_target_": "a..b"}, "it._target_=a..b cannot be imported: a: ModuleNotFoundError"),
        (
            {"_target_": "no_such.Thing"},
            "it._target_=no_such.Thing cannot be imported: no_such: ModuleNotFoundError: No module "
            "named 'no_such'; is it installed, or on PYTHONPATH?",
        ),
        (
            {"_target_": "nanogpt.modle.GPT"},
            "it._target_=nanogpt.modle.GPT cannot be imported: nanogpt.modle: ",
        ),
        (
            {"_target_": "nanogpt.model.GTP"},
            "it._target_=nanogpt.model.GTP cannot be imported: nanogpt.model.GTP: "
            "ModuleNotFoundError: No module named 'nanogpt.model.GTP'; 'nanogpt.model' is not a "
            "package; did you mean GPT?",
        ),
        (here("NOT_CALLABLE"), "NOT_CALLABLE is not a class or function, but int"),
        (
            here("Record", patienc=1),
            "there is no key it.patienc; did you mean it.patience? Record takes model, patience",
        ),
        (here("Checked", zzz=1), "there is no key it.zzz; Checked takes run_dir, patience"),
        (
            here("holds"),
            "it: holds(...) failed: TypeError: holds() missing 1 required positional argument: "
            "'inner'",
        ),
        (
            here("holds", inner=here("holds")),
            "it.inner: holds(...) failed: TypeError: holds() missing 1 required",
        ),
        (here("holds", inner=[here("Record", a=1)]), "there is no key it.inner[0].a"),
        (here("Checked", patience=0), "it.patience=0 should be at least 1"),
        (here("validated", patience="a"), "it.patience='a' should be a whole number"),
        (here("fails", error="ValueError"), "it: ValueError"),
        (here("fails", error="KeyError"), "it: fails(...) failed: KeyError: 'KeyError'"),
        (
            here("needs_package", package="no_such.part"),
            "it needs a package that is not installed (No module named 'no_such'); pip install "
            "no_such",
        ),
        (
            {"_target_": "lightning.pytorch.loggers.MLFlowLogger"},
            "pip install mlflow",
        ),
    ],
)
def test_a_node_that_cannot_be_built_is_one_sentence(node: Any, expected: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        build(node, "it", **LIVE)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_fails_while_it_is_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("1 / 0")
    (tmp_path / "incomplete_module.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, expected in (
        ("broken", "broken_module: ZeroDivisionError: division by zero"),
        ("incomplete", "pip install no_such_package"),
    ):
        with pytest.raises(ConfigurationError, match=expected):
            build({"_target_": f"{name}_module.Thing"}, "it")


@pytest.mark.parametrize(
    "error", [OSError(), MemoryError(), RuntimeError("CUDA out of memory. Tried")]
)
def test_an_error_of_the_machine_is_raised_as_it_is(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises() -> None:
        raise error

    monkeypatch.setattr(sys.modules[__name__], "holds", raises)
    with pytest.raises(type(error)) as caught:
        build(here("holds"), "it")
    assert caught.value is error


def test_a_data_module_may_have_a_source_of_its_own_kind() -> None:
    data = SimpleNamespace(source="https://example.org/text", fingerprint="abc")
    assert source_fingerprint(data) == "abc"


def fail_as_rank_zero_did() -> None:
    raise RankZeroFailedError


def test_a_node_that_fails_on_rank_zero_is_no_wrong_usage_on_other_ranks() -> None:
    with pytest.raises(RankZeroFailedError):
        build({"_target_": f"{__name__}.fail_as_rank_zero_did"}, "callbacks.x")
