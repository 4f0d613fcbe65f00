"""The types of configuration values, which pydantic validates, and its errors as one sentence."""

from collections.abc import Mapping
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any

from pydantic import ConfigDict, Field, StrictBool, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

Count = Annotated[int, Field(strict=True, ge=1)]  # a whole number of at least 1
Size = Annotated[int, Field(strict=True, ge=0)]  # a whole number of at least 0
Seed = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Amount = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]  # finite
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]  # from 0 to 1
BelowOne = Annotated[float, Field(strict=True, ge=0, lt=1)]  # from 0, and below 1
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, gt=0, lt=1)]  # between 0 and 1
Flag = StrictBool
Text = Annotated[str, Field(strict=True, min_length=1)]
FilePath = Text | Annotated[Path, Field(strict=True)]

CHECKED = ConfigDict(extra="forbid")  # of a dataclass: @dataclass(config=CHECKED)
WORDS = {
    "Input should be ": "",
    "List should have ": "",
    "String should have ": "",
    "Dictionary should have ": "",
    " after validation": "",
    "Value error, ": "",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid tuple": "a list",
    "a valid list": "a list",
    "a valid dictionary": "a mapping",
}


def check(
    values: Mapping[str, Any], kinds: Mapping[str, Any], where: str = "", *, closed: bool = False
) -> None:
    """Check values against types by their keys; `where` is their node of the configuration.

    Raises ValueError, one sentence, where a key is missing, a value is of another type, or, with
    `closed`, a key is in excess.

    >>> check({"devices": 0}, {"devices": Count}, "trainer")
    ValueError: trainer.devices=0 should be at least 1
    """
    config = ConfigDict(extra="forbid" if closed else "ignore")
    node = with_config(config)(TypedDict("Node", dict(kinds)))  # type: ignore[operator]
    try:
        TypeAdapter(node).validate_python(values)
    except ValidationError as error:
        raise ValueError(explain(error, where)) from error


def explain(error: ValidationError, where: str = "") -> str:
    """Return what a value is and what it should be; `where` is the node of the configuration.

    >>> explain(error, "optim")
    'optim.momentum=2 should be at most 1'
    """
    errors = error.errors(include_url=False)
    first = errors[0]["loc"][:1]
    if not first and errors[0]["type"] == "value_error":  # raised by __post_init__, in a sentence
        return errors[0]["msg"].removeprefix("Value error, ")
    key = ".".join(filter(None, (where, *map(str, first))))
    value = errors[0]["input"]
    if value == "":
        return f"{key} is empty (an unset variable of the shell?); give it a value or omit it"
    if errors[0]["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"there is no key {key}"
    if errors[0]["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{'.'.join(filter(None, (where, *map(str, errors[0]['loc']))))} must be given"
    reasons = " or ".join(dict.fromkeys(e["msg"] for e in errors if e["loc"][:1] == first))
    for theirs, ours in WORDS.items():
        reasons = reasons.replace(theirs, ours)
    short = Repr()  # a value may be nested, or its parts shared, without end
    short.maxstring = short.maxother = 200
    found = " ".join(short.repr(value).split())  # a tensor has lines
    return f"{key}={found} should be {reasons}".lstrip("=")[:500]
