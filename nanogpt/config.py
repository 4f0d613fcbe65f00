"""The configuration: command lines, Hydra's errors as sentences, and objects built from nodes."""

import difflib
import importlib
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from hydra.errors import OverrideParseException
from omegaconf import OmegaConf
from pydantic import ValidationError

from nanogpt.command import expand_home, first_line, is_path, out_of_memory
from nanogpt.values import explain

SWEEP = ("-m", "--multirun")
# Keys besides paths whose value is text that Hydra would otherwise read as an expression.
NAMES = (
    "name",
    "separator",
    "repository",
    "subset",
    "split",
    "revision",
    "project",
    "entity",
    "default_model",
)
# Keys of other training programs, by which key of ours stands for them.
OTHER_NAMES = {
    "batch_size": "tokens_per_step (an optimizer step's, over all devices) or micro_batch",
    "device": "trainer.accelerator",
    "dtype": "trainer.precision",
    "epochs": "max_steps (with stage=instruct, instruct.max_passes)",
    "eval_interval": "callbacks.validation.every_n_steps",
    "grad_clip": "grad_clip",
    "gradient_accumulation_steps": "tokens_per_step (the accumulation follows from it)",
    "kind": "schedule=wsd (or cosine, constant)",
    "learning_rate": "optim.learning_rate",
    "lr": "optim.learning_rate",
    "max_epochs": "max_steps (with stage=instruct, instruct.max_passes)",
    "max_iters": "max_steps",
    "num_epochs": "max_steps (with stage=instruct, instruct.max_passes)",
    "out_dir": "runs_dir",
    "output_dir": "runs_dir",
    "warmup_iters": "schedule.warmup_steps",
    "weight_decay": "optim.weight_decay",
}
RESERVED = ("_target_", "_args_", "_partial_", "_convert_", "_recursive_")  # as Hydra names them
OVERRIDE = re.compile(r"(\+{0,2}[\w./@-]*[\w.])=(.*)", re.DOTALL)
QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
CHOICE = re.compile(rf"(?:{QUOTED}|[^,])+")  # of a sweep, which a comma ends
FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)")
PLAIN = re.compile(
    r"null|(?!(?:true|false|nan|inf)$|\.\d)[A-Za-z/._][A-Za-z0-9/._+*?-]*", re.IGNORECASE
)


def as_overrides(arguments: Sequence[str]) -> list[str]:
    """Return a command line with the value of every path and name as one quoted text for Hydra.

    `~` becomes the home directory in paths. Quoted values and `null` stay as they are; in a sweep
    (`-m`) a comma outside quotes separates the choices.

    >>> as_overrides(["data.path=数据 (1), b.txt"])
    ["data.path='数据 (1), b.txt'"]
    """
    sweep = any(word in SWEEP for word in arguments)
    return [_as_override(word, sweep) for word in arguments]


def _as_override(word: str, sweep: bool) -> str:
    match = OVERRIDE.fullmatch(word)
    if match is None or not is_text(match[1]):
        return word
    key, value = match[1], match[2]
    if sweep and FUNCTION.fullmatch(value):
        return word
    choices = CHOICE.findall(value) if sweep else [value]
    return f"{key}={','.join(_quote(key, choice) for choice in choices)}"


def _quote(key: str, text: str) -> str:
    if is_path(key):
        text = expand_home(text)
    if not text or PLAIN.fullmatch(text) or re.fullmatch(QUOTED, text):
        return text
    # A backslash is an escape only in front of a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"


def is_text(key: str) -> bool:
    """Return whether the value of a key is a path or a name, of characters of any kind."""
    last = key.rpartition(".")[2]
    return is_path(key) or last.endswith("column") or last in NAMES


def expand_environment() -> None:
    """Expand `~` in the directories that NANOGPT_* variables name."""
    for name, text in os.environ.items():
        if name.startswith("NANOGPT_") and is_path(name.removeprefix("NANOGPT_").lower()):
            os.environ[name] = expand_home(text)


def expand_paths(tree: Any, key: str = "") -> Any:
    """Return a configuration with `~` expanded in every path."""
    if isinstance(tree, dict):
        return {name: expand_paths(value, str(name)) for name, value in tree.items()}
    return expand_home(tree) if isinstance(tree, str) and is_path(key) else tree


def explain_syntax(error: OverrideParseException) -> str:
    """Return why an override cannot be parsed, and how it is written."""
    key, _, value = error.override.partition("=")
    return (
        f"{error.override} is not an override of the form key=value: Hydra's syntax gives "
        f"characters such as ( [ {{ , = and letters beyond ASCII a meaning; quote the value for "
        f"it and for the shell: '{key}=\"{value}\"'"
    )


def explain_unknown_key(key: str, known: Sequence[str], where: str) -> str:
    """Return the sentence for a key that the composed configuration does not have."""
    if key in known:
        return (
            f"the chosen data and stage have no key {key}, which others have; choose one of these "
            "(conf/data, conf/stage), or leave it out"
        )
    near = OTHER_NAMES.get(key.rpartition(".")[2], "")
    if near.partition("=")[0].partition(" ")[0] not in known:
        near = "".join(difflib.get_close_matches(key, known, n=1, cutoff=0.5))
    hint = f"did you mean {near}? " if near else ""
    return f"there is no key {key}; {hint}every key is in {where}"


class ConfigurationError(ValueError):
    """A node of the configuration that cannot be built."""


def build(node: Any, where: str, /, **live: Any) -> Any:
    """Instantiate a `_target_` node, as `hydra.utils.instantiate` does.

    Of the `live` objects the callable receives those that its signature names and the node does
    not set; nested nodes are built first, in the same way. With `_partial_: true` the result is a
    `functools.partial`. Raises ConfigurationError, one sentence that names the key under `where`.

    >>> build({"_target_": "pathlib.Path"}, "data")
    PosixPath('.')
    """
    node = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigurationError(f"{where} has no _target_; give it the class's import path")
    target = _locate(node["_target_"], where)
    if node.get("_recursive_", True):
        node = {key: _nested(value, f"{where}.{key}", live) for key, value in node.items()}
    arguments = node.get("_args_", [])
    keys = {key: value for key, value in node.items() if key not in RESERVED}
    keys, missing = _bind(target, arguments, keys, live, where)
    if node.get("_partial_", False):
        return partial(target, *arguments, **keys)
    if missing:
        raise ConfigurationError(f"{where}.{missing[0]} must be given: {_name(target)} needs it")
    return _call(target, arguments, keys, where)


def build_optimizer(node: Mapping[str, Any], model: Any) -> Any:
    """Build an optimizer whose callable takes `model`, or its trainable parameters as `params`.

    `_partial_` makes no difference, so that nodes written for other programs work.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    whole = {key: value for key, value in node.items() if key != "_partial_"}
    optimizer = build(whole, "optim", model=model, params=params)
    if not hasattr(optimizer, "param_groups"):
        made = f"optim._target_={node['_target_']} returns {type(optimizer).__name__}"
        raise ConfigurationError(f"{made}; an optimizer is a torch.optim.Optimizer")
    return optimizer


def build_schedule(node: Mapping[str, Any]) -> Any:
    """Build a schedule; a function that takes `step` and `max_steps` is one without `_partial_`."""
    function = build({**node, "_partial_": True}, "schedule")
    is_schedule = {"step", "max_steps"} <= inspect.signature(function).parameters.keys()
    return function if is_schedule else build(node, "schedule")


def _nested(value: Any, where: str, live: Mapping[str, Any]) -> Any:
    """Return a value with every node in it built."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            return build(value, where, **live)
        return {key: _nested(inner, f"{where}.{key}", live) for key, inner in value.items()}
    if isinstance(value, list):
        return [_nested(inner, f"{where}[{i}]", live) for i, inner in enumerate(value)]
    return value


def _locate(path: Any, where: str) -> Callable[..., Any]:
    """Return the callable with an import path, such as `torch.optim.AdamW`."""
    key = f"{where}._target_={path}"
    parts = path.split(".") if isinstance(path, str) else [""]
    if not all(parts):
        raise ConfigurationError(f"{key} is not the import path of a class or function")
    found: Any = None
    for n, part in enumerate(parts, start=1):
        name = ".".join(parts[:n])
        if n > 1 and hasattr(found, part):
            found = getattr(found, part)
            continue
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise _missing_package(error, where) from error
            parent = ".".join(parts[: n - 1])
            near = difflib.get_close_matches(part, dir(found) if n > 1 else [], n=1)
            hint = f"did you mean {near[0]}?" if near else "is it installed, or on PYTHONPATH?"
            what = f"{parent} has no {part}" if parent else f"there is no module {part}"
            raise ConfigurationError(f"{key} cannot be imported: {what}; {hint}") from error
        except Exception as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise ConfigurationError(f"{key} cannot be imported: {name}: {what}") from error
    if not callable(found):
        raise ConfigurationError(f"{key} is not a class or function, but {type(found).__name__}")
    target: Callable[..., Any] = found
    return target


def _bind(
    target: Callable[..., Any],
    arguments: Sequence[Any],
    keys: dict[str, Any],
    live: Mapping[str, Any],
    where: str,
) -> tuple[dict[str, Any], list[str]]:
    """Return the keyword arguments with the live objects, and which required ones are missing."""
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except ValueError:  # of some callables written in C
        return keys, []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    taken = {p.name for p in positional[: len(arguments)]}
    by_name = {
        p.name: p
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in taken
    }
    keys = {name: live[name] for name in by_name if name in live} | keys
    unknown = [key for key in keys if key not in by_name]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        near = difflib.get_close_matches(unknown[0], by_name, n=1, cutoff=0.5)
        hint = f"did you mean {where}.{near[0]}? " if near else ""
        takes = ", ".join(by_name) or "no keys"
        raise ConfigurationError(
            f"there is no key {where}.{unknown[0]}; {hint}{_name(target)} takes {takes}"
        )
    required = [p.name for p in by_name.values() if p.default is p.empty]
    return keys, [name for name in required if name not in keys]


def _call(
    target: Callable[..., Any], arguments: Sequence[Any], keys: Mapping[str, Any], where: str
) -> Any:
    try:
        return target(*arguments, **keys)
    except ValidationError as error:
        raise ConfigurationError(explain(error, where)) from error
    except ModuleNotFoundError as error:
        raise _missing_package(error, where) from error
    except ConfigurationError:
        raise
    except ValueError as error:
        text = " ".join(str(error).split())
        raise ConfigurationError(text if where in text else f"{where}: {text}") from error
    except Exception as error:
        if isinstance(error, OSError) or out_of_memory(error):
            raise
        what = f"{_name(target)}(...) failed: {type(error).__name__}: {first_line(error)}"
        raise ConfigurationError(f"{where}: {what}") from error


def _missing_package(error: ModuleNotFoundError, where: str) -> ConfigurationError:
    text = first_line(error)
    quoted = re.search(r"['`\"]([\w-]+)", text)
    package = error.name or (quoted[1] if quoted else "it")
    return ConfigurationError(
        f"{where} needs a package that is not installed ({text}); "
        f"pip install {package.partition('.')[0]}"
    )


def _name(target: Callable[..., Any]) -> str:
    return getattr(target, "__name__", repr(target))
