"""Every YAML composes and builds, and a mistake in a command is an error of one sentence."""

import copy
import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from nanogpt.build import ConfigurationError, build, build_data, build_each, check_nodes
from nanogpt.config import (
    as_overrides,
    check_values,
    clear_other_budget,
    explain_composition,
)
from nanogpt.model import GPTConfig
from nanogpt.optim import Constant, Cosine, WarmupStableDecay, check_schedule, learning_rates
from nanogpt.runs.identity import budget_steps, flatten
from nanogpt.training.budget import settle
from nanogpt.training.callbacks import Samples
from nanogpt.training.launch import count_devices
from tests.configs import CONF, options


@cache
def composed_once(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("train", overrides=list(overrides))
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return dict(config)


def composed(*overrides: str) -> dict[str, Any]:
    return deepcopy(composed_once(*overrides))


NEEDED = {"data=hub": ["data.repository=owner/name"], "model=auto": ["depth=2"]}
SAMPLING = ("max_new_tokens", "temperature", "top_k")
CHOICES = [
    f"{group}={option}"
    for group in (
        "tokenizer",
        "model",
        "data",
        "optim",
        "schedule",
        "trainer",
        "callbacks",
        "logger",
        "stage",
        "experiment",
        "hparams_search",
    )
    for option in options(group)
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_yaml_composes_and_builds(choice: str) -> None:
    config = settle({**composed(choice, *NEEDED.get(choice, ())), "name": "new", "typed": {}})
    assert isinstance(build(config["model"], "model", vocab_size=300), GPTConfig)
    check_schedule(instantiate(config["schedule"]), 100)
    assert budget_steps(config) > 0
    source = build_data(config).source
    assert callable(source.open if choice == "data=shards" else source.documents)
    make_tokenizer = instantiate(config["tokenizer"], _partial_=True)
    inspect.signature(make_tokenizer.func).bind(["a document"], **make_tokenizer.keywords)
    samples = {k: v for k, v in config["callbacks"]["samples"].items() if k in SAMPLING}
    Samples(CONF, 0, prompts=[], **samples)


@pytest.mark.parametrize("group", ["tokenizer", "model", "data", "optim", "schedule"])
@pytest.mark.parametrize("stage", options("stage"))
def test_a_group_typed_over_a_stage_leaves_nothing_of_its_preset(stage: str, group: str) -> None:
    for option in options(group):
        choice = [f"{group}={option}", *NEEDED.get(f"{group}={option}", ())]
        config = composed(f"stage={stage}", *choice)
        other_first = composed("stage=quickstart", *choice)
        assert config[group] == other_first[group]


def test_an_experiment_overrides_the_stage_and_the_command_line_both() -> None:
    config = composed("experiment=shakespeare_char", "optim.learning_rate=0.5")
    assert config["model"]["n_embd"] == 128
    assert (config["model"]["norm_weight"], config["model"]["embd_norm"]) == (True, False)
    assert config["data"]["_target_"].endswith("TextFiles")
    assert config["optim"]["learning_rate"] == 0.5


@pytest.mark.parametrize(
    ("choices", "schedule"),
    [
        ([], WarmupStableDecay()),
        (["stage=pretrain"], Cosine(700, 0.1)),
        (["stage=instruct"], Cosine(20)),
        (["stage=classify"], WarmupStableDecay(decay_fraction=0.7)),
        (["experiment=shakespeare_char"], Cosine(100, 0.1)),
        (["experiment=shakespeare_char_fast"], WarmupStableDecay(decay_fraction=1.0)),
        (["experiment=gpt2_small_fast"], WarmupStableDecay(decay_fraction=0.7)),
        (["optim=adamw"], Cosine(700, 0.1)),
        (["stage=pretrain", "optim=muon"], WarmupStableDecay()),
        (["schedule=constant", "optim=adamw"], Constant()),
        (["experiment=shakespeare_char_fast", "schedule=constant"], Constant()),
    ],
)
def test_an_optimizer_brings_its_schedule_unless_one_is_chosen(
    choices: list[str], schedule: Any
) -> None:
    assert instantiate(composed(*choices)["schedule"]) == schedule


@pytest.mark.parametrize("optim", options("optim"))
def test_an_optimizer_builds_from_its_yaml(optim: str) -> None:
    from nanogpt.model import GPT

    node = composed(f"optim={optim}")["optim"]
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8))
    optimizer = instantiate(node, _partial_=True, _convert_="all")(model)
    assert min(learning_rates(optimizer)) > 0


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("optim.learning_rat=1", "did you mean optim.learning_rate?"),
        ("optim.schedule.warmup_steps=1", "there is no key optim.schedule; "),
        ("data.my_key=1", "there is no key data.my_key; TextFiles takes path"),
        ("optim.grad_clip=0.5", "there is no key optim.grad_clip; "),
        ("max_step=1", "did you mean max_steps?"),
        ("modle=nano", "did you mean model?"),
        ("model=gpt2_smal", "did you mean gpt2_small?"),
        ("data=nothing", "data is one of"),
        ("max_steps=many", "max_steps='many'"),
        ("tokens_per_step=1000", "cannot be split"),
        ("trainer.devices=none", "trainer.devices"),
        ("+foo=1", "there is no key foo"),
        ("+optim.learning_rat=1", "did you mean optim.learning_rate?"),
        ("seed=99999999999999999999", "below 9223372036854775808"),
        ("data.val_fraction=a", "data.val_fraction='a' should be a number"),
        ("data.prompts=5", "data.prompts=5 should be a list"),
        ("model=5", "there is no model=5; model is one of auto, gpt2_large, "),
        ("threads=1000000", "threads=1000000 should be at most"),
        ("optim.learning_rate=abc", "learning_rate"),
        ("name=../x", "no directory under runs_dir"),
        ("grad_clip=-1", "grad_clip=-1 should be above 0"),
        ("callbacks.samples.top_k=0", "callbacks.samples.top_k=0 should be at least 1"),
        ("callbacks.samples.temperature=hot", "temperature='hot' should be a number"),
        ("callbacks.hellaswag.path=", "callbacks.hellaswag.path is empty"),
        ("tokenizer=bpe tokenizer.vocab_size=some", "tokenizer.vocab_size='some' is not a whole"),
        ("callbacks.progress_every_s=often", "progress_every_s='often' should be a number"),
        ("trainer.detect_anomaly=1", "trainer.detect_anomaly=1 should be true or false"),
        ("trainer.val_check_interval=0.25", "trainer.val_check_interval=0.25 should be a whole"),
        ("data=null", "data is one of dolly, "),
        ("~logger", "a run needs logger; choose one"),
        (
            "~callbacks.validation",
            "callbacks.validation.every_n_steps' not found (trainer.val_check_interval)",
        ),
        ("tokenizer.foo=1", "there is no key tokenizer.foo; byte_tokenizer takes"),
        ("model.n_head=5", "n_embd=16 should be a multiple of n_head=5"),
        ("data.path=nowhere.txt", "nowhere.txt"),
        ("trainer.num_nodes=2", "needs torchrun on every node"),
    ],
)
def test_a_mistake_in_the_command_is_one_sentence(
    argument: str,
    expected: str,
    tiny_run: list[str],
    tmp_path: Path,
    main: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(*tiny_run, *argument.split(" ")) in (1, 2)
    [line] = capfd.readouterr().err.splitlines()
    assert expected in line
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.ckpt"))


@pytest.mark.parametrize("word", ["data=txt", "model.n_heads=2", "optim=sgd", "stage=tune"])
def test_a_wrong_name_is_wrong_usage(
    word: str, main: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(word) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1


NONSENSE = ([1], {"a": 1}, "some text", -1, None)
TEXTS = {"name", "init_from", "runs_dir", "data_dir", "path", "text_column", "label_column"}
TEXTS |= {"separator", "revision", "subset", "pretokenized"}
MAY_BE_NULL = {
    "grad_clip",
    "tokens",
    "final_tokens",
    "val_tokens",
    "final_val_tokens",
    "top_k",
    "for_width",
}
MAY_BE_NULL |= {"path", "subset", "max_passes", "samples.every_n_steps"}
NEGATIVE = {"seed", "split_seed", "num_sanity_val_steps"}
CHECKED_LATER = ("stage", "classify.", "instruct.", "module.", "tokenizer.", "trainer.max_epochs")


def means_something(key: str, value: Any) -> bool:
    allowed = {"some text": TEXTS, None: MAY_BE_NULL, -1: NEGATIVE}
    last = {key.rpartition(".")[2], key.partition(".")[2]}
    return isinstance(value, str | int | None) and bool(last & allowed[value])


def refusal_of(config: dict[str, Any], run_dir: Path) -> str:
    """Return what is wrong with what train() checks and builds before it prepares data."""
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    try:
        check_values(config)
        check_nodes(config, budget_steps(config))
        build_data(config)
        build_each(config["callbacks"], "callbacks", **plain, run_dir=run_dir)
        count_devices(config["trainer"]["devices"], config["trainer"]["accelerator"])
        whole = {**config["trainer"], "precision": "32-true", "enable_progress_bar": False}
        build(whole, "trainer", logger=False)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "words", ["data=text", "data=fineweb_edu optim=adamw", "stage=instruct", "stage=classify"]
)
def test_a_value_of_the_wrong_kind_is_refused_by_the_name_of_its_key(
    words: str, tmp_path: Path
) -> None:
    config = composed(*words.split(), "trainer.accelerator=cpu", "init_from=null")
    config["data"]["path"] = str(tmp_path)
    assert not refusal_of(config, tmp_path)
    for key, right in flatten(config).items():
        if key.startswith(CHECKED_LATER) or key.endswith("_target_"):
            continue
        for value in NONSENSE:
            if value != right and not means_something(key, value):
                broken = node = copy.deepcopy(config)
                *path, last = key.split(".")
                for part in path:
                    node = node[part]
                node[last] = value
                refusal = refusal_of(broken, tmp_path)
                assert last in refusal, f"{key}={value!r}"
                assert "\n" not in refusal


def test_a_typed_budget_clears_the_other_one(tmp_path: Path) -> None:
    typed = {"max_steps": 7}
    config = composed("stage=pretrain", "max_steps=7")
    clear_other_budget(config, typed)
    assert (config["max_steps"], config["max_tokens"]) == (7, None)


@pytest.mark.parametrize("key", ["data.path", "data.separator", "data_dir", "runs_dir"])
def test_an_empty_text_is_refused_by_its_key(key: str) -> None:
    config = composed("stage=pretrain", "data=text", "init_from=null", f"{key}=")
    with pytest.raises(ValueError, match=f"^{key} is empty .an unset variable of the shell"):
        check_and_build(config)


def check_and_build(config: dict[str, Any]) -> None:
    check_values(config)
    build_data(config)


def test_a_key_of_another_data_set_is_not_suggested_for_itself() -> None:
    for key, expected in (
        ("data.balance", "the chosen data and stage have no key data.balance, which others in"),
        ("data.ballance", "did you mean data.balance?"),
    ):
        error = ValueError(f"Could not override '{key}'")
        assert expected in explain_composition(error)


class AnyValue(MagicMock):
    """A live object of any kind."""


LIVE = ("model", "tokenizer", "data", "prompts", "seed", "template", "wandb_id", "schedule")


@pytest.mark.parametrize("choice", [f"logger={o}" for o in options("logger")] + ["trainer=debug"])
def test_every_callback_logger_and_trainer_builds(choice: str, tmp_path: Path) -> None:
    config = composed(choice, "trainer.accelerator=cpu", "trainer.precision=32-true")
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    places = {"run_dir": tmp_path, "save_dir": tmp_path}
    live = {name: AnyValue() for name in LIVE} | plain | places | {"name": "a"}
    if choice == "logger=mlflow" and not find_spec("mlflow"):
        with pytest.raises(ConfigurationError, match=r"logger\.mlflow needs a package that is not"):
            build_each(config["logger"], "logger", **live)
        return
    loggers = list(build_each(config["logger"], "logger", **live).values())
    callbacks = list(build_each(config["callbacks"], "callbacks", **live).values())
    trainer = build(config["trainer"], "trainer", logger=loggers, callbacks=callbacks, max_steps=5)
    assert trainer.max_steps == 5
    assert set(callbacks) <= set(trainer.callbacks)


@pytest.mark.parametrize("word", ["~callbacks.checkpoint", "callbacks.checkpoint=null"])
def test_checkpoints_cannot_be_left_out(word: str) -> None:
    with pytest.raises(ConfigurationError, match=r"callbacks\.checkpoint is missing"):
        check_values(composed("stage=quickstart", word))


@pytest.mark.parametrize(
    ("word", "instead"),
    [
        ("trainer.max_steps=5", "pass max_steps"),
        ("trainer.max_epochs=3", "pass max_steps"),
        ("trainer.gradient_clip_val=1", "pass grad_clip"),
        ("trainer.accumulate_grad_batches=2", "pass tokens_per_step"),
        ("trainer.callbacks=[]", "pass callbacks.NAME"),
        ("trainer.logger=false", "pass logger="),
        ("trainer.overfit_batches=1", "pass a small data set"),
    ],
)
def test_what_train_hands_to_the_trainer_is_refused(word: str, instead: str) -> None:
    typed = {word.partition("=")[0]: 1}
    with pytest.raises(
        ConfigurationError, match=f"^{word.partition('=')[0]} is not used.*{instead}"
    ):
        check_values({**composed(*as_overrides([word])), "typed": typed})


def test_a_typed_budget_clears_the_passes_over_conversations() -> None:
    config = composed("stage=instruct", "max_steps=7")
    clear_other_budget(config, {"max_steps": 7})
    assert config["datamodule"]["max_passes"] is None
    assert composed("stage=instruct")["datamodule"]["max_passes"] == 4


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [
        ([], 2048),
        (["model=pico"], 1920),
        (["model=gpt2_small"], 2048),
        (["model.block_size=4096"], 4096),
    ],
)
def test_a_step_of_instruct_is_whole_rows_of_any_model(overrides: list[str], tokens: int) -> None:
    assert composed("stage=instruct", *overrides)["tokens_per_step"] == tokens


def test_a_logger_without_its_package_is_refused_before_the_data_is_prepared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nanogpt.build.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"logger\.mlflow needs .* pip install mlflow$"):
        check_nodes(composed("logger=mlflow"), 5)


def test_loggers_and_callbacks_add_up() -> None:
    early = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss}"
    words = [f"callbacks.early={early}", "~callbacks.samples", "logger=[csv,tensorboard]"]
    config = composed(*as_overrides(words))
    assert [*config["logger"]] == ["csv", "tensorboard"]
    assert config["callbacks"]["early"]["monitor"] == "val/loss"
    assert "samples" not in config["callbacks"]
