"""Command lines and environment variables before Hydra reads them, and Hydra's errors after."""

import difflib
import os
import re
from collections.abc import Sequence
from typing import Any

from hydra.errors import OverrideParseException

from nanogpt.command import expand_home, is_path

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
    "gradient_accumulation_steps": "tokens_per_step (the accumulation follows from it)",
    "learning_rate": "optim.learning_rate",
    "lr": "optim.learning_rate",
    "max_epochs": "max_steps (with stage=instruct, instruct.max_passes)",
    "max_iters": "max_steps",
    "num_epochs": "max_steps (with stage=instruct, instruct.max_passes)",
    "out_dir": "runs_dir",
    "output_dir": "runs_dir",
    "warmup_iters": "optim.schedule.warmup_steps",
    "weight_decay": "optim.weight_decay",
}
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
