"""The identity of a run: which keys of its configuration make it, its name, and differences.

Issuing a command again finds the same directory and continues it: nothing here is dated or random,
so all ranks agree without communication.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

# What may change between two starts of one run; every other key, and trainer.precision, is part of
# its identity.
OPERATIONAL = (
    *("name", "runs_dir", "data_dir", "resume", "overwrite", "debug"),
    *("activation_checkpointing", "compile", "micro_batch", "threads"),  # of the machine
    "remeasure",
    *("data.workers", "data.prompts", "logger", "callbacks", "trainer"),
    "data.path",  # the corpus fingerprint stands for it
    *("datamodule.workers", "datamodule.val_tokens", "datamodule.final_val_tokens"),
    "datamodule.max_passes",  # instruct.max_passes is identity
    *("command", "typed", "resolved"),  # of the record itself
)
NAMED_BY_CHOICE = ("stage", "model", "data")  # groups that the name begins with
NEW_KEYS = {  # that older records lack, with the value that these imply
    "model.norm_eps": 1e-5,
    "model.norm_weight": True,
    "model.embd_norm": False,
    "model.rope_base": 10_000.0,
    "model.qk_norm_weight": False,
    "model.qk_gain": 1.0,
    "model.token_shift": False,
    "model.embd_shortcut": False,
    "optim.row_beta": 0.0,
    "optim.momentum_warmup_steps": 0,
    "model.tie_embeddings": True,
    "resolved.activation_checkpointing": False,
}
BUDGET = ("max_steps", "max_tokens")  # identity that may grow, where the schedule permits
NEW_OR_ANEW = "name=<new name> for a new run, or resume=false overwrite=true to replace this one"
MAX_SLUG_CHARS = 48


def run_name(
    choices: Mapping[str, str | None], typed: Mapping[str, Any], swept: Collection[str] = ()
) -> str:
    """Return `<stage>-<model>-<data>`, and a slug and 8 hex digits where identity keys were typed.

    `choices` are the selected options of the config groups; `typed` the keys given on the command
    line with their values. `data.path` is typed identity too: another file is another run; and
    so is every `swept` key. A node in place of a group's option is named by its class.
    """
    nodes = {key: value for key, value in typed.items() if isinstance(value, Mapping)}
    classes = {
        key: str(node.get("_target_", key)).rpartition(".")[2] for key, node in nodes.items()
    }
    name = "-".join(classes.get(group, str(choices.get(group))) for group in NAMED_BY_CHOICE)
    changed = {
        key: value
        for key, value in sorted(typed.items())
        if (key in nodes or key not in NAMED_BY_CHOICE)
        and (is_identity(key) or key == "data.path" or key in swept)
    }
    if not changed:
        return name
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
    return f"{name}-{_slug(changed)}-{digest}"


def is_identity(key: str) -> bool:
    """Return whether a change of this dotted key makes another run."""
    nodes = {key[: dot.start()] for dot in re.finditer(r"\.|$", key)}  # and the key itself
    return "trainer.precision" in nodes or nodes.isdisjoint(OPERATIONAL)


def _slug(changed: Mapping[str, Any]) -> str:
    """Return the typed pairs in at most MAX_SLUG_CHARS, with short keys where that is too long.

    A pair that does not fit is left out as a whole: the hash distinguishes such names.
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

    `identity` is that of the run's beginning where it is recorded, else a hash over the identity
    keys, but for the budget, which may grow. Numbers that compare equal, such as 1 and 1.0, are the
    same value, as in `identity_differences`.
    """
    values = {
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in flatten(recorded).items()
        if is_identity(key) and key not in BUDGET and value is not None
    }
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    resolved = recorded["resolved"]
    return {"identity": resolved.get("identity", digest), "corpus": resolved["corpus"]}


def identity_differences(
    recorded: Mapping[str, Any], config: Mapping[str, Any], *, may_extend: bool = False
) -> list[str]:
    """Return one line per identity key in which two configurations differ.

    `auto` agrees with whatever it became when the run began; with `may_extend` the schedule lets
    the budget grow. Keys of the model that are not typed mean nothing to a run that takes its model
    from `init_from`.
    """
    new = flatten(config)
    old = {key: NEW_KEYS[key] for key in NEW_KEYS & new.keys()} | flatten(recorded)
    typed = {*recorded.get("typed", ()), *config.get("typed", ())}
    inherits = new.get("init_from") is not None and "model" not in typed
    return [
        f"{key}: {old.get(key)!r} is recorded, {new.get(key)!r} is configured"
        for key in sorted(old.keys() | new.keys())
        if is_identity(key) and old.get(key) != new.get(key) and new.get(key) != "auto"
        if not (inherits and key.startswith("model.") and key not in typed)
        if not (may_extend and key in BUDGET)
    ]


def budget_steps(config: Mapping[str, Any], most: int | None = None) -> int:
    """Return the optimizer steps of the run: of its budgets and `most` the first reached.

    With `minutes` alone it is 1 until they are chosen. Raises ValueError where all are None.
    """
    tokens = config["max_tokens"]
    of_tokens = None if tokens is None else math.ceil(tokens / config["tokens_per_step"])
    budgets = [steps for steps in (config["max_steps"], of_tokens, most) if steps is not None]
    if not budgets and config.get("minutes") is None:
        raise ValueError("the run has no budget; pass max_steps=N, max_tokens=N or minutes=N")
    return int(min(budgets, default=1))
