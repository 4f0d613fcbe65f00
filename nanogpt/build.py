"""Objects from nodes of the configuration: any `_target_` node, and those of a run."""

import difflib
import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nanogpt.command import out_of_memory
from nanogpt.text import first_line
from nanogpt.values import explain

RESERVED = ("_target_", "_partial_", "_convert_")  # as Hydra names them
PLAIN_KEYS = ("log_every_n_steps", "progress_every_s", "validation")  # of callbacks: no nodes
NOT_OF_DATA = {"prompts"}  # keys of data that callbacks.samples reads
# Plain values that constructors of nodes receive where they name them.
HANDED_OVER = ("seed", "stage", "data_dir", "tokens_per_step", "grad_clip")


class ConfigurationError(ValueError):
    """A node of the configuration that cannot be built."""


class CallbackError(RuntimeError):
    """A callback, logger or data module of the user's own raised."""


def build(node: Any, where: str, /, **live: Any) -> Any:
    """Instantiate a `_target_` node, as `hydra.utils.instantiate` does with keyword arguments.

    Of the `live` objects the callable receives those that its signature names and the node does
    not set; nested nodes are built first, in the same way. With `_partial_: true` the result is a
    `functools.partial`. Raises ConfigurationError, one sentence that names the key under `where`.

    >>> build({"_target_": "pathlib.Path"}, "data")
    PosixPath('.')
    """
    target = _target(node, where)
    keys = {key: value for key, value in node.items() if key not in RESERVED}
    keys = {key: _nested(value, f"{where}.{key}", live) for key, value in keys.items()}
    parameters = _parameters(target)
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [key for key in keys if key not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise unknown_argument(where, unknown[0], known, _name(target))
    keys = {name: live[name] for name in known if name in live} | keys
    return partial(target, **keys) if node.get("_partial_", False) else _call(target, keys, where)


def build_each(group: Mapping[str, Any], where: str, /, **live: Any) -> dict[str, Any]:
    """Build the nodes of a group by their names; one that is null is left out."""
    nodes = named_nodes(group)
    return {name: build(node, f"{where}.{name}", **live) for name, node in nodes.items()}


def named_nodes(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nodes of a group that are to be built."""
    return {k: v for k, v in group.items() if v is not None and k not in PLAIN_KEYS}


def build_optimizer(node: Mapping[str, Any], model: Any) -> Any:
    """Build an optimizer whose callable takes `model`, or its trainable parameters as `params`.

    `_partial_` makes no difference, so that nodes written for other programs work. Raises
    ConfigurationError where the callable returns no optimizer.
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


def check_nodes(config: Mapping[str, Any], max_steps: int) -> None:
    """Build what needs neither data nor device, and bind the keys of the rest.

    A wrong value then fails before anything is prepared. Raises ConfigurationError.
    """
    from nanogpt.model import GPT, GPTConfig
    from nanogpt.optim import check_schedule

    smallest = GPTConfig(block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=2)
    build(config["model"], "model", vocab_size=1)
    build_optimizer(config["optim"], GPT(smallest))
    check_schedule(build_schedule(config["schedule"]), max_steps)
    for where in ("module", "trainer", "tokenizer"):
        build({**config[where], "_partial_": True}, where)
    for name, node in named_nodes(config["logger"]).items():
        made = build({**node, "_partial_": True}, f"logger.{name}").func
        if _name(made) == "MLFlowLogger" and find_spec("mlflow") is None:  # it checks when built
            what = "a package that is not installed (mlflow); pip install mlflow"
            raise ConfigurationError(f"logger.{name} needs {what}")


def build_data(config: Mapping[str, Any]) -> Any:
    """Build the data module: the stage's over the configured source, or the one that `data` names.

    Keys of `data` that the source does not take are the data module's. A LightningDataModule of the
    user's own has the batch contract; the other attributes that a run reads have defaults.
    Raises ConfigurationError for a key that neither takes.
    """
    live = {key: config[key] for key in HANDED_OVER}
    live["block_size"] = config["model"]["block_size"]
    node = {key: value for key, value in config["data"].items() if key not in NOT_OF_DATA}
    target, taken = parameters(node, "data")
    if hasattr(target, "train_dataloader"):
        return _with_defaults(build(node, "data", **live), config["data"])
    own = {key: value for key, value in node.items() if key in taken or key.startswith("_")}
    rest = {key: value for key, value in node.items() if key not in own}
    _, of_module = parameters(config["datamodule"], "datamodule")
    known = {key: value for key, value in rest.items() if key in of_module}
    source = build(own, "data")
    data = build({**config["datamodule"], **known}, "data", source=source, **live)
    for key in rest.keys() - known.keys():  # to a data module that takes this source
        raise unknown_argument("data", key, [*taken, *NOT_OF_DATA], _name(target))
    return data


def source_fingerprint(data: Any) -> str:
    """Return the fingerprint of what a data module reads, before it is prepared.

    Raises ConfigurationError where the source refuses its keys.
    """
    source: Any = getattr(data, "source", None)  # of a user's module, this may be anything
    try:
        return str(source.fingerprint() if hasattr(source, "fingerprint") else data.fingerprint)
    except ValueError as error:  # such as no data.path
        raise ConfigurationError(first_line(error)) from error


def choose_tokenizer(node: Mapping[str, Any], start: Any, checkpoint: Path | None) -> Any:
    """Return a choice: the tokenizer of the start or the checkpoint, else the configured one.

    A run continues with the tokenizer that it began with, which this version may train differently.
    """
    from nanogpt.checkpoint import load_tokenizer
    from nanogpt.data.module import TokenizerChoice

    if start is not None:
        return TokenizerChoice.from_tokenizer(start.tokenizer)
    if checkpoint is not None:
        return TokenizerChoice.from_tokenizer(load_tokenizer(checkpoint))
    return TokenizerChoice(
        lambda documents: build(node, "tokenizer", documents=documents), tokenizer_key(node)
    )


def tokenizer_key(node: Mapping[str, Any]) -> str:
    """Return what names a configured tokenizer's table among prepared data, such as bpe-2048."""
    maker = node["_target_"].rpartition(".")[2].removesuffix("_tokenizer")
    return "-".join([maker, *(str(value) for key, value in node.items() if key != "_target_")])


def _with_defaults(data: Any, node: Mapping[str, Any]) -> Any:
    """Return a user's data module with the attributes that it lacks."""

    def use_tokenizer(choice: Any) -> Any:
        if (tokenizer := choice.make_without_text()) is None:
            raise ConfigurationError(
                f"data: {type(data).__name__} has no use_tokenizer(choice), which a tokenizer that "
                "is learned from text needs; pass tokenizer=gpt2 or tokenizer=byte"
            )
        return tokenizer

    fingerprint = hashlib.sha256(json.dumps(node).encode()).hexdigest()[:16]
    defaults = {"special_tokens": (), "max_steps": None, "facts": dict, "fingerprint": fingerprint}
    for name, default in {**defaults, "use_tokenizer": use_tokenizer}.items():
        if not hasattr(data, name):
            setattr(data, name, default)
    return data


def _nested(value: Any, where: str, live: Mapping[str, Any]) -> Any:
    """Return a value with every node in it built."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            return build(value, where, **live)
        return {key: _nested(inner, f"{where}.{key}", live) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_nested(inner, f"{where}[{i}]", live) for i, inner in enumerate(value)]
    return value


def locate(path: Any, key: str) -> Callable[..., Any]:
    """Return the callable with an import path, such as `torch.optim.AdamW`.

    Raises ConfigurationError, one sentence that begins with `key`, where there is none.
    """
    found, name = None, ""
    for part in str(path).split("."):
        name = f"{name}.{part}" if name else part
        try:
            found = getattr(found, part) if hasattr(found, part) else importlib.import_module(name)
        except Exception as error:
            what = f"{name}: {type(error).__name__}: {first_line(error)}"
            if isinstance(error, ModuleNotFoundError):
                if not f"{name}.".startswith(f"{error.name}."):
                    raise _missing_package(error, key) from error
                near = difflib.get_close_matches(part, dir(found), n=1)
                hint = f"did you mean {near[0]}?" if near else "is it installed, or on PYTHONPATH?"
                what += f"; {hint}"
            raise ConfigurationError(f"{key} cannot be imported: {what}") from error
    if not callable(found):
        raise ConfigurationError(f"{key} is not a class or function, but {type(found).__name__}")
    target: Callable[..., Any] = found
    return target


def parameters(node: Mapping[str, Any], where: str) -> tuple[Callable[..., Any], list[str]]:
    """Return the callable of a node and the names of its arguments. Raises ConfigurationError."""
    target = _target(node, where)
    return target, [p.name for p in _parameters(target) if p.kind is not p.VAR_KEYWORD]


def _target(node: Any, where: str) -> Callable[..., Any]:
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigurationError(f"{where} has no _target_; give it the class's import path")
    return locate(node["_target_"], f"{where}._target_={node['_target_']}")


def unknown_argument(where: str, key: str, known: Iterable[str], name: str) -> "ConfigurationError":
    """Return the error of a key that a callable does not take."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {where}.{near[0]}? " if near else ""
    takes = ", ".join(known) or "no keys"
    return ConfigurationError(f"there is no key {where}.{key}; {hint}{name} takes {takes}")


def _parameters(target: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of a callable; **kwargs are those of the classes that it extends."""
    found: dict[str, inspect.Parameter] = {}
    for one in target.__mro__[:-1] if isinstance(target, type) else [target]:
        makes = vars(one).get("__init__") if "__signature__" not in vars(one) else None
        try:  # pydantic's signature of a class would be inherited by one with another __init__
            own = inspect.signature(partial(makes, one) if makes else one).parameters
        except ValueError:  # of some callables written in C
            own = inspect.signature(lambda **kwargs: None).parameters
        found = {**found, **{name: p for name, p in own.items() if name not in found}}
        is_open = any(p.kind is p.VAR_KEYWORD for p in own.values())
        if not is_open and (one is target or one.__module__.startswith("nanogpt.")):
            return [p for p in found.values() if p.kind is not p.VAR_KEYWORD]
    return list(found.values())  # **kwargs of a library may be for anything


def _call(target: Callable[..., Any], keys: Mapping[str, Any], where: str) -> Any:
    try:
        return target(**keys)
    except ModuleNotFoundError as error:
        raise _missing_package(error, where) from error
    except ConfigurationError:
        raise
    except ValueError as error:
        text = " ".join(str(error).split())
        if isinstance(error, ValidationError):
            text = explain(error, where)
        if text.partition("=")[0] in keys:
            text = f"{where}.{text}"
        raise ConfigurationError(text if where in text else f"{where}: {text}") from error
    except Exception as error:
        from nanogpt.ranks import RankZeroFailedError

        if isinstance(error, OSError | RankZeroFailedError) or out_of_memory(error):
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
