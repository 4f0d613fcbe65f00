"""The identity of a run: which keys of its configuration make it, its name, and differences.

Issuing a command again finds the same directory and continues it: nothing here is dated or random,
so all ranks agree without talking.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# What may change between two starts of one run; every other key is part of its identity.
OPERATIONAL = (
    "name",
    "runs_dir",
    "data_dir",
    "resume",
    "overwrite",
    "debug",
    "compile",
    "micro_batch",
    "threads",
    "remeasure",
    "data.workers",
    "data.prompts",
    "data.path",  # the corpus fingerprint stands for it
    "logger",
    "callbacks",
    "trainer",
    "command",
    "typed",
    "resolved",
)
IDENTITY_WITHIN_OPERATIONAL = ("trainer.precision",)
NAMED_BY_CHOICE = ("stage", "model", "data")  # groups that the name begins with
BUDGET = ("max_steps", "max_tokens")  # identity that may grow, where the schedule permits
MAX_SLUG_CHARS = 48


def run_name(choices: Mapping[str, str | None], typed: Mapping[str, Any]) -> str:
    """Return `<stage>-<model>-<data>`, and a slug and 8 hex digits where identity keys were typed.

    `choices` are the selected options of the config groups; `typed` the keys given on the command
    line with their values. `data.path` is typed identity too: another file is another run.
    """
    name = "-".join(str(choices[group]) for group in NAMED_BY_CHOICE)
    changed = {
        key: value
        for key, value in sorted(typed.items())
        if key not in NAMED_BY_CHOICE and (is_identity(key) or key == "data.path")
    }
    if not changed:
        return name
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
    return f"{name}-{_slug(changed)}-{digest}"


def is_identity(key: str) -> bool:
    """Return whether a change of this dotted key makes another run."""
    if any(_under(key, root) for root in IDENTITY_WITHIN_OPERATIONAL):
        return True
    return not any(_under(key, root) for root in OPERATIONAL)


def _under(key: str, root: str) -> bool:
    return key == root or key.startswith(root + ".")


def _slug(changed: Mapping[str, Any]) -> str:
    """Return the typed pairs in at most MAX_SLUG_CHARS, with short keys where that is too long.

    A pair that does not fit is left out as a whole: the hash tells such names apart.
    """
    whole = "-".join(_pair(key, value) for key, value in changed.items()).strip("-._")
    if 0 < len(whole) <= MAX_SLUG_CHARS:
        return whole
    slug = ""
    for key, value in changed.items():
        longer = f"{slug}-{_pair(key, value, short=True)}".strip("-._")
        slug = longer if len(longer) <= MAX_SLUG_CHARS else slug
    return slug or "run"


def _pair(key: str, value: Any, *, short: bool = False) -> str:
    text = value if isinstance(value, str) else json.dumps(value)  # null, true
    text = Path(text).name if key.endswith("path") else text
    last = key.rpartition(".")[2]
    if short and "_" in last:
        last = "".join(word[:1] for word in last.split("_"))  # tokens_per_step: tps
    pair = text if last in ("experiment", "path") else f"{last}-{text}"
    return re.sub(r"[^\w.-]+", "_", pair)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested mapping under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def binding(recorded: Mapping[str, Any]) -> dict[str, str]:
    """Return what binds checkpoints to the run of a recorded configuration.

    `identity` is a hash over the identity keys, but for the budget, which may grow. Numbers that
    compare equal, such as 1 and 1.0, are the same value, as in `identity_differences`.
    """
    values = {
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in flatten(recorded).items()
        if is_identity(key) and key not in BUDGET and value is not None
    }
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return {"identity": digest, "corpus": recorded["resolved"]["corpus"]}


def identity_differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return one line per identity key in which two configurations differ.

    `auto` agrees with whatever it became when the run began.
    """
    return _differences(recorded, wanted, is_identity)


def operational_differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return one line per key that may change between two starts of a run, and did."""
    return _differences(
        recorded, wanted, lambda key: not is_identity(key) and not _under(key, "resolved")
    )


def _differences(
    recorded: Mapping[str, Any], wanted: Mapping[str, Any], counts: Callable[[str], bool]
) -> list[str]:
    old, new = flatten(recorded), flatten(wanted)
    return [
        f"{key}: {old.get(key)!r} is recorded, {new.get(key)!r} was asked for"
        for key in sorted(old.keys() | new.keys())
        if counts(key) and old.get(key) != new.get(key) and new.get(key) != "auto"
    ]
