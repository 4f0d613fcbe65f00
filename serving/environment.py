"""Settings as environment variables, so that any process manager can start a server.

A field `max_open` is `NANOGPT_MAX_OPEN`; a field whose variable is not set has its default.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import ValidationError

from nanogpt.command import expand_home, is_path

PREFIX = "NANOGPT_"
# Variables that are no settings: of training, of tests, and of the server's own processes.
OTHERS = {
    *("NANOGPT_CHECKPOINT", "NANOGPT_DATA_DIR", "NANOGPT_SWEEP", "NANOGPT_LAUNCHER_PID"),
    *("NANOGPT_ENGINE", "NANOGPT_NO_KERNELS"),
    *("NANOGPT_TEST_DATA", "NANOGPT_TEST_NPM"),
}

Settings = TypeVar("Settings")


def read(kind: type[Settings], environment: Mapping[str, str]) -> Settings:
    """Return settings of a kind, a dataclass of pydantic, from the environment.

    An empty text is null where null is the default. Raises ValueError naming the first variable
    whose text is not a value of its field.

    >>> read(ApiSettings, {"NANOGPT_API_KEYS": "one, two"}).api_keys
    ('one', 'two')
    """
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        text = environment.get(variable(field.name))
        if text is not None and not (text == "" and field.default is None):
            values[field.name] = expand_home(text) if is_path(field.name) else text
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = variable(str(first["loc"][0]))
        reason = first["msg"].removeprefix("Input ")
        raise ValueError(f"{name}={first['input']!r} {reason}") from error


def check_names(environment: Iterable[str], *kinds: type) -> None:
    """Raise ValueError for a variable `NANOGPT_*` that is none of the settings of these kinds."""
    known = {variable(field.name) for kind in kinds for field in fields(kind)} | OTHERS
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "conf/serve.yaml lists the settings"
            raise ValueError(f"the environment variable {name} is no setting; {hint}")


def variable(field: str) -> str:
    """Return the name of a field's environment variable."""
    return PREFIX + field.upper()
