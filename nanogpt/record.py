"""The grammar of a checkpoint's record: exact types, bounded lengths, known names.

What passes can be compared, formatted, sent as JSON and shown without another check.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from nanogpt.prompts import TEMPLATES
from nanogpt.tokenizer import SURROGATE

FORMAT = 1
STAGES = ("pretrain", "instruct", "classify")
MAX_LABELS, MAX_LABEL_CHARS = 2**16, 2**20

Check = Callable[[Any], bool]


def check_record(content: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Raise ValueError for a value of a checkpoint or its record that no run writes."""
    found, version = record.get("format"), record.get("version")
    if is_count(found) and found != FORMAT:
        by = version if is_text(version) else "another version"
        raise ValueError(
            f"has checkpoint format {found} and this version reads format {FORMAT}; use the "
            f"version of nanogpt that wrote it ({by})"
        )
    for values, rules in ((content, CONTENT), (record, RECORD)):
        if missing := (rules.keys() - OPTIONAL) - values.keys():
            raise ValueError(f"lacks {', '.join(sorted(missing))}")
        for key, (holds, expected) in rules.items():
            if key in values and not holds(values[key]):
                raise ValueError(f"has a {type(values[key]).__name__} for {key}, not {expected}")


def is_text(value: object, max_chars: int = 200) -> bool:
    """Return whether a value is a short text that can be shown."""
    return type(value) is str and len(value) <= max_chars and value.isprintable()


def is_count(value: object) -> bool:
    """Return whether a value is a whole number that JSON can hold."""
    return type(value) is int and 0 <= value < 2**53


def is_number(value: object) -> bool:
    """Return whether a value is a finite number of at least 0."""
    return type(value) in (int, float) and 0 <= value < 2**53  # type: ignore[operator]


def are_labels(value: object) -> bool:
    """Return whether a value is a list of distinct texts within the limits."""
    if type(value) is not list or not 1 <= len(value) <= MAX_LABELS:
        return False
    if not all(type(label) is str for label in value) or len(set(value)) < len(value):
        return False
    text = "".join(value)
    return len(text) <= MAX_LABEL_CHARS and not SURROGATE.search(text)


def are_tensors(value: object) -> bool:
    """Return whether a value maps names to tensors."""
    return isinstance(value, dict) and all(
        type(name) is str and type(tensor) is torch.Tensor for name, tensor in value.items()
    )


def maps(**checks: Check) -> Check:
    """Return a check for a dictionary of exactly these keys, whose values pass."""

    def holds(value: object) -> bool:
        is_one = type(value) is dict and value.keys() == checks.keys()
        return is_one and all(check(value[key]) for key, check in checks.items())  # type: ignore[index]

    return holds


def maps_scalars(value: object) -> bool:
    """Return whether a value maps names to numbers, truth values, names or None."""
    return type(value) is dict and all(
        is_text(key) and (v is None or type(v) is bool or is_number(v) or is_text(v))
        for key, v in value.items()
    )


def is_none_or(check: Check) -> Check:
    """Return a check that None passes, too."""
    return lambda value: value is None or check(value)


def one_of(*names: str) -> tuple[Check, str]:
    """Return a check for one of the names, and its words."""
    return (lambda value: type(value) is str and value in names), f"one of {', '.join(names)}"


CONTENT: Mapping[str, tuple[Check, str]] = {
    "state_dict": (are_tensors, "a mapping of names to tensors"),
    "global_step": (is_count, "a number of optimizer steps"),
}
RECORD: Mapping[str, tuple[Check, str]] = {
    "format": (is_count, "a whole number"),
    "version": (is_text, "the version that wrote it"),
    "stage": one_of(*STAGES),
    "model": (maps_scalars, "a mapping of model keys to numbers and names"),
    "tokenizer": (lambda value: type(value) is dict, "a tokenizer's table"),
    "template": (is_none_or(one_of(*TEMPLATES)[0]), f"null or one of {', '.join(TEMPLATES)}"),
    "labels": (
        is_none_or(are_labels),
        f"null or a list of distinct texts, at most {MAX_LABELS:,} of {MAX_LABEL_CHARS:,} letters",
    ),
    "init_from": (
        is_none_or(maps(path=lambda value: type(value) is str, sha256=is_text)),
        "null or a path and the sha256 of its weights",
    ),
    "clock": (
        maps(train_s=is_number, timed_steps=is_count, wall_s=is_number),
        "the seconds and steps that were timed",
    ),
    "run": (maps(identity=is_text, corpus=is_text), "the identity and the corpus of a run"),
}
OPTIONAL = {"init_from", "clock", "run"}
