"""The configuration: command lines, what Hydra composes of them, and its errors as sentences."""

import difflib
import hashlib
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field
from typing_extensions import NotRequired

from nanogpt.build import CallbackError, ConfigurationError
from nanogpt.command import FAILED, INTERRUPTED, WRONG_USAGE, flush_output, is_path, out_of_memory
from nanogpt.runs.identity import flatten, run_name
from nanogpt.text import first_line
from nanogpt.values import Amount, Count, Flag, Positive, Seed, Size, Text, check

CONF = Path(__file__).parent.parent / "conf"
IMPORTS_S = 1.5  # from the start of a command to the composition
SWEEP = ("-m", "--multirun")
# Last parts of keys, other than paths, whose value is text that Hydra may read as an expression.
NAMES = re.compile(
    r".*column|name|separator|repository|subset|split|revision|project|entity|default_model"
)
BUDGETS = {"max_steps", "max_tokens", "minutes"}
COUNTS_OF_TOKENS = {"max_steps", "max_tokens", "tokens_per_step", "tokens", "shard_tokens"}
NODES = ("tokenizer", "model", "data", "schedule", "optim", "trainer", "callbacks", "logger")
# Keys of nodes with a _target_, which may be new: build() checks them by its signature.
OPEN = re.compile(
    rf"({'|'.join(NODES)}|module|datamodule)\.(?!log_every|progress_every|validation)"
)
# Arguments of the Trainer that train.py hands over or does itself, and the keys to use.
INSTEAD = {
    "max_steps": "max_steps",
    "max_epochs": "max_steps (with stage=instruct, instruct.max_passes)",
    "callbacks": "callbacks.NAME={_target_: ...}",
    "logger": "logger=csv, tensorboard, wandb or mlflow, or logger.NAME={_target_: ...}",
    "default_root_dir": "runs_dir and name",
    "gradient_clip_val": "grad_clip",
    "accumulate_grad_batches": "tokens_per_step (the accumulation follows from it)",
    "overfit_batches": "a small data set, such as data=text data.path=FILE",
}
OVERRIDE = re.compile(r"(\+{0,2}[\w./@-]*[\w.])=(.*)", re.DOTALL)
CHOICE = re.compile(r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^,])+""")  # which a comma ends
FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)")

OmegaConf.register_new_resolver("times", lambda a, b: a * b, replace=True)
# ${whole_rows:2048,${model.block_size}}: about so many tokens, as whole rows of any model
OmegaConf.register_new_resolver("whole_rows", lambda n, row: max(n // row, 1) * row, replace=True)


def run_hydra(
    name: str, arguments: Sequence[str], work: Callable[[], None], program: str | None = None
) -> int:
    """Run a command on Hydra's command line; print an error as one sentence; return the exit code.

    `name` is that of the configuration and, unless `program` is given, of the command. Raises the
    error with `debug=true`.
    """
    sys.argv[1:] = as_overrides(arguments)
    try:
        work()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of Hydra's output has left
        return 0
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        if "debug=true" in arguments:
            raise
        print(f"{program or f'{name}.py'}: {explain_composition(error, name)}", file=sys.stderr)
        is_usage = isinstance(error, HydraException) or not isinstance(error, OSError)
        return WRONG_USAGE if is_usage else FAILED
    finally:
        flush_output()
    return 0


def with_job(
    arguments: Sequence[str], job: Callable[[dict[str, Any]], Any], program: str = "train.py"
) -> int:
    """Call `job` with every configuration that a command line composes; return the exit code.

    With `--frozen FILE` it is the one in that file. A job returns what a sweeper may minimise. Why
    one failed is printed, and a sweep goes on; with `debug=true` the error is raised. In the
    directories that NANOGPT_* variables name, `~` is expanded.
    """
    codes: list[int] = []

    def attempt(config: Any, freeze: Callable[[Any], dict[str, Any]]) -> Any:
        try:
            return job(freeze(config))
        except Exception as error:
            if config["debug"] is True:
                raise
            if text := explain_failure(error, config):
                print(f"{program}: {text}", file=sys.stderr)
            is_usage = isinstance(error, ConfigurationError | OmegaConfBaseException)
            codes.append(getattr(error, "exit_code", WRONG_USAGE if is_usage else FAILED))
            return math.nan

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
    def compose(cfg: DictConfig) -> Any:
        return attempt(cfg, freeze)

    def work() -> None:
        if arguments[:1] == ["--frozen"]:
            attempt(yaml.safe_load(Path(arguments[1]).read_text(encoding="utf-8")), dict)
        else:
            compose()

    for name, text in os.environ.items():
        if name.startswith("NANOGPT_") and is_path(name.removeprefix("NANOGPT_").lower()):
            os.environ[name] = expanduser(text)
    return run_hydra("train", arguments, work, program) or max(codes, default=0)


def as_overrides(arguments: Sequence[str]) -> list[str]:
    """Return a command line with the value of every path and name as one quoted text for Hydra.

    `~` becomes the home directory in paths. Quoted values and `null` stay as they are; in a sweep
    (`-m`) a comma outside quotes separates the choices. Nodes with a `_target_`, and keys under
    one, may be new (`++`).

    >>> as_overrides(["init_from=数据 (1), b.ckpt", "optim.fused=true"])
    ["init_from='数据 (1), b.ckpt'", '++optim.fused=true']
    """
    flags = [word for word in arguments if word in SWEEP]  # Hydra reads them first
    rest = [word for word in arguments if word not in SWEEP]
    return [*flags, *(_as_override(word, bool(flags)) for word in rest)]


def _as_override(word: str, sweep: bool) -> str:
    match = OVERRIDE.fullmatch(word)
    if match is None or match[1].startswith(("-", "hydra.")):
        return word
    key, value = match[1], match[2]
    is_text = is_path(key) or NAMES.fullmatch(key.rpartition(".")[2])  # of characters of any kind
    if is_text and not (sweep and FUNCTION.fullmatch(value)):
        choices = CHOICE.findall(value) if sweep else [value]
        value = ",".join(_quote(key, choice) for choice in choices)
    elif (CONF / key).is_dir() and re.fullmatch(r"null|[-+.\d]+", value):
        value = f"'{value}'"  # the name of an option, which Hydra refuses with the others' names
    is_node = value.startswith("{") and "_target_" in value
    return f"{'++' if is_node or OPEN.match(key) else ''}{key}={value}"


def _quote(key: str, text: str) -> str:
    """Return a value as Hydra reads it as text; null and what is quoted stay as they are."""
    if is_path(key):
        text = expanduser(text)
    with suppress(HydraException):
        value = OverridesParser.create().parse_override(f"key={text}").value()
        if value in (text, None) or (text[:1] in "'\"" and isinstance(value, str)):
            return text
    return QuotedString(text, Quote.single).with_quotes()


def sweep_name(arguments: Sequence[str]) -> str:
    """Return the directory of a sweep's jobs: the same for the same command.

    A search with more trials is the same one.
    """
    words = sorted(w for w in arguments if not w.startswith((*SWEEP, "hydra.sweeper.n_trials=")))
    by_hand = [word.partition("=")[2] for word in words if word.startswith("name=")]
    digest = hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]
    return by_hand[0] if by_hand else f"sweep-{digest}"


class Leaderboard(Callback):
    """Print the comparison of a sweep's runs after its last job.

    The directory of a sweep that has no run is removed.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from nanogpt.compare import leaderboard

        leaderboard(sweep := Path(config.hydra.sweep.dir))
        if {path.name for path in sweep.iterdir()} <= {"multirun.yaml"}:  # of Hydra
            shutil.rmtree(sweep)


def freeze(cfg: DictConfig) -> dict[str, Any]:
    """Return a composed job as plain values, with its name and the command that reproduces it.

    `typed` are the keys of the command line with their values, of a group its option. Raises
    ConfigurationError for a top-level value of the wrong kind.
    """
    os.environ["NANOGPT_BEGAN"] = str(time.time() - IMPORTS_S)  # of this job and its ranks
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = dict(hydra_config.runtime.choices)
    replace_nodes(cfg, parsed)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    for group in NODES:
        if config.get(group) is None:
            raise ConfigurationError(f"a run needs {group}; choose one, or leave it as it was")
    typed: dict[str, Any] = {}
    for override in parsed:
        key = override.key_or_group
        if override.is_add() and key not in choices and not OPEN.match(f"{key}."):
            raise ConfigurationError(unknown_key(key))
        value = override.value() if key in choices else OmegaConf.select(cfg, key)
        is_node = OmegaConf.is_config(value)
        typed[key] = OmegaConf.to_container(value, resolve=True) if is_node else value
    for key in ("runs_dir", "data_dir", "init_from"):  # of a YAML file of the user
        config[key] = config[key] and expanduser(config[key])
    clear_other_budget(config, typed)
    make_whole(config)
    check_values({**config, "typed": typed})
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    name = run_name(choices, typed, typed.keys() - _same_in_all_jobs() if is_sweep else ())
    if is_sweep and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError(
            "torchrun cannot run a sweep (every rank would run all of it); "
            "start it as python train.py -m ... trainer=ddp trainer.devices=N"
        )
    if is_sweep:
        config["name"] = f"{Path(hydra_config.sweep.dir).name}/{name}"
    elif config["name"] is None:
        config["name"] = name
    config["typed"] = typed
    own = [s.path for s in hydra_config.runtime.config_sources if s.provider == "command-line"]
    words = [*(f"--config-dir={path}" for path in own), *(word.lstrip("+") for word in overrides)]
    words += [word for word in hydra_config.overrides.hydra if word.startswith("hydra.searchpath")]
    config["command"] = shlex.join(["python", "train.py", *words])
    if config["trainer"].get("fast_dev_run"):  # a trial that saves nothing
        config["name"] += "-fast_dev_run"
    return config


def replace_nodes(cfg: DictConfig, overrides: Sequence[Override]) -> None:
    """Let a typed node with a `_target_` replace the whole node that Hydra merged it with."""
    replaced: list[str] = []
    for override in overrides:
        key, value = override.key_or_group, override.value()
        is_node = isinstance(value, dict) and "_target_" in value
        if is_node or key.startswith(tuple(f"{node}." for node in replaced)):
            OmegaConf.update(cfg, key, value, merge=not is_node, force_add=True)
        if is_node:
            replaced.append(key)


def _same_in_all_jobs() -> set[str]:
    """Return the keys of the command line that a sweep does not vary."""
    words = [w for w in sys.argv[1:] if re.match(r"~|[^-].*=", w)]  # no options, nor their values
    overrides = OverridesParser.create().parse_overrides(words)
    return {o.key_or_group for o in overrides if not o.is_sweep_override()}


def clear_other_budget(config: dict[str, Any], typed: Mapping[str, Any]) -> None:
    """Let a budget that was typed be the only one, whatever the preset has."""
    if BUDGETS & typed.keys():
        config |= dict.fromkeys(BUDGETS - typed.keys())
        if "max_passes" in config.get("datamodule", {}):
            config["datamodule"]["max_passes"] = None


def make_whole(config: dict[str, Any]) -> None:
    """Turn counts that were typed as 10e9 into whole numbers."""
    for node in (config, config["data"]):
        for key in COUNTS_OF_TOKENS & node.keys():
            if isinstance(node[key], float) and node[key].is_integer():
                node[key] = int(node[key])


def check_values(config: Mapping[str, Any]) -> None:
    """Raise ConfigurationError for a value of the wrong kind that no object checks when built."""
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    callbacks = config["callbacks"]
    try:
        check({key: plain[key] for key in plain.keys() - {"command"}}, VALUES, closed=True)
        check(config["trainer"], TRAINER, "trainer")
        check(callbacks, INTERVALS, "callbacks")
        check(callbacks["validation"], VALIDATION, "callbacks.validation", closed=True)
        check(config["data"], {"prompts": NotRequired[list[str]]}, "data")
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    if not callbacks.get("checkpoint"):
        raise ConfigurationError(
            "callbacks.checkpoint is missing, and a run continues from its checkpoints; to write "
            "fewer raise callbacks.checkpoint.every_n_steps"
        )
    for key, instead in INSTEAD.items():
        if f"trainer.{key}" in config.get("typed", ()):
            raise ConfigurationError(f"trainer.{key} is not used here; pass {instead}")


VALUES = {  # at the top level of conf/train.yaml
    "stage": Text,
    "name": Text | None,
    "seed": Seed,
    "init_from": Text | None,
    "max_steps": Count | None,
    "max_tokens": Count | None,
    "minutes": Positive | None,
    "depth": Count | None,
    "tokens_per_step": Count,
    "grad_clip": Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] | None,
    "resume": Flag,
    "overwrite": Flag,
    "debug": Flag,
    "micro_batch": Count | Literal["auto"],
    "threads": Annotated[Count, Field(le=4 * (os.cpu_count() or 1))] | Literal["auto"],
    "compile": Flag | Literal["auto"],
    "activation_checkpointing": Flag | Literal["auto"],
    "remeasure": Flag,
    "runs_dir": Text,
    "data_dir": Text,
}
TRAINER = {  # arguments of the Trainer that are read before it is built
    "devices": Count | Literal["auto"],
    "num_nodes": Count,
    "precision": Literal["auto", "32-true", "bf16-mixed", "16-mixed"],
    "deterministic": Flag,
    "detect_anomaly": Flag,
    "accelerator": NotRequired[Text],
    "val_check_interval": NotRequired[Count],  # optimizer steps
    "check_val_every_n_epoch": NotRequired[Count | None],
    "log_every_n_steps": NotRequired[Count],
    "num_sanity_val_steps": NotRequired[Size | Literal[-1]],
    "use_distributed_sampler": NotRequired[Flag],
    "enable_model_summary": NotRequired[Flag],
}
INTERVALS = {"log_every_n_steps": Count, "progress_every_s": Amount, "validation": dict}
VALIDATION = {"every_n_steps": Count, "tokens": Count | None, "final_tokens": Count | None}


def explain_failure(error: Exception, config: Mapping[str, Any]) -> str:
    """Return why a job of a configuration failed; nothing where its rank zero has reported it."""
    from nanogpt.ranks import Ranks, RankZeroFailedError

    text = first_line(error)
    reported_by_rank_zero = isinstance(error, ValueError | OSError | FloatingPointError)
    lost_rank_zero = "onnection" in text  # gloo's or nccl's word for a rank that has left
    if isinstance(error, RankZeroFailedError) or (
        Ranks.from_environment().rank > 0 and (reported_by_rank_zero or lost_rank_zero)
    ):
        return ""
    if short := out_of_memory(error):
        return (
            f"{short}; free memory, or pass micro_batch=1, activation_checkpointing=true, a "
            "smaller model, model.block_size or tokens_per_step, or less data"
        )
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain_composition(error)
    if reported_by_rank_zero or isinstance(error, CallbackError):
        stage = str(config.get("stage"))  # whose keys its modules receive
        keys = "|".join(config.get(stage) or ["-"])
        return re.sub(rf"\b(data|datamodule|module)\.(?=({keys})\b)", f"{stage}.", text)
    return f"{type(error).__name__}: {text} (debug=true shows where)"


def explain_composition(error: Exception, config_name: str = "train") -> str:
    """Return why a configuration does not compose, with the nearest right name."""
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        return (
            f"{error.override} is not an override of the form key=value: Hydra's syntax gives "
            f"characters such as ( [ {{ , = and letters beyond ASCII a meaning; quote the value "
            f"for it and for the shell: '{key}=\"{value}\"'"
        )
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        near = difflib.get_close_matches(option, error.options, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"there is no {group}={option}; {hint}{group} is one of {', '.join(error.options)}"
    text = str(error)
    if unknown := re.search(r"Could not (?:override|find) '([^'@]+)'", text):
        return unknown_key(unknown[1], config_name)
    return re.sub(r" full_key: (\S+)( object_type=\S+)?", r" (\1)", " ".join(text.split()))


def unknown_key(key: str, config_name: str = "train") -> str:
    """Return the sentence for a key that the composed configuration does not have."""
    known = _known_keys(config_name)
    if key in known:
        return f"the chosen data and stage have no key {key}, which others in conf/ have"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    where = "conf/" if config_name == "train" else f"conf/{config_name}.yaml"
    return f"there is no key {key}; {hint}every key is in {where}"


def _known_keys(config_name: str) -> list[str]:
    """Return the dotted keys of a configuration, with those of all options, and its groups."""
    options = sorted(CONF.glob("*/*.yaml")) if config_name == "train" else []
    keys = [path.name for path in CONF.iterdir() if path.is_dir()]
    for path in (CONF / f"{config_name}.yaml", *options):
        text = path.read_text(encoding="utf-8")
        is_global = path.parent == CONF or "@package _global_" in text
        keys += flatten(yaml.safe_load(text) or {}, "" if is_global else f"{path.parent.name}.")
    return list(dict.fromkeys(keys))
