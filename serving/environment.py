"""Settings as environment variables, so that any process manager can start a server.

A field `max_open` is `NANOGPT_MAX_OPEN`; what is not set has its default.
"""

import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

PREFIX = "NANOGPT_"
FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

Settings = TypeVar("Settings")


def read(kind: type[Settings], environment: Mapping[str, str]) -> Settings:
    """Return settings of a kind from the environment.

    Raises ValueError for a variable whose text is not of its field's type.

    >>> read(ApiSettings, {"NANOGPT_API_KEYS": "one, two"}).api_keys
    ('one', 'two')
    """
    types_by_name = get_type_hints(kind)
    values = {}
    for field in fields(kind):  # type: ignore[arg-type]
        name = PREFIX + field.name.upper()
        if name in environment:
            values[field.name] = _parsed(name, environment[name], types_by_name[field.name])
    return kind(**values)


def _parsed(name: str, text: str, kind: Any) -> Any:
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if type(None) in kinds and not text:
        return None
    kind = next(k for k in kinds if k is not type(None))
    try:
        return _VALUES.get(get_origin(kind) or kind, _one_of)(text, kind)
    except (ValueError, KeyError) as error:
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        expected = " or ".join(choices) if choices else _WORDS.get(kind, "text")
        raise ValueError(f"{name}={text!r} is not {expected}") from error


def _one_of(text: str, kind: Any) -> str:
    if text not in get_args(kind):
        raise ValueError
    return text


_VALUES = {
    bool: lambda text, _: FLAGS[text.lower()],
    int: lambda text, _: int(text),
    float: lambda text, _: float(text),
    str: lambda text, _: text,
    tuple: lambda text, _: tuple(text.replace(",", " ").split()),
}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number"}
