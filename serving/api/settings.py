"""Settings of a server: the keys of conf/serve.yaml, each also an environment variable.

`max_open` is NANOGPT_MAX_OPEN. conf/serve.yaml documents all keys.

    >>> ApiSettings(api_keys="one, two").api_keys
    ('one', 'two')
"""

import difflib
import os
import re
from os.path import expanduser
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from nanogpt.command import is_path
from nanogpt.values import explain
from serving.engine.messages import Count, Heartbeat, Seconds, Settings

PREFIX = "NANOGPT_"
# Variables that are no settings: of training, of tests, and of the server's own processes.
OTHERS = {
    *("NANOGPT_DATA_DIR", "NANOGPT_SWEEP", "NANOGPT_BEGAN", "NANOGPT_LAUNCHER_PID"),
    *("NANOGPT_ENGINE", "NANOGPT_NO_KERNELS", "NANOGPT_TEST_DATA", "NANOGPT_TEST_NPM"),
}


def _split(value: Any) -> Any:
    return value.replace(",", " ").split() if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


class ApiSettings(BaseSettings, Settings):
    """The settings of a server: of its front ends, and the engine's.

    Values that are not given are read from the environment.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX)

    checkpoint: str | None = None
    allow_modules: Words = ()
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 5001
    workers: Count = 1
    api_keys: Words = ()
    insecure: bool = False
    allowed_hosts: Words = ()
    cors_origins: Words = ("auto",)
    cors_private_network: bool = False
    unknown_model: Literal["error", "default"] = "error"
    max_open: Count = 288
    max_open_per_key: Count | None = None
    max_body_bytes: Count = 2**20
    max_n: Count = 8
    max_prompts: Count = 64
    max_stops: Count = 16
    body_s: Seconds = 30.0
    queue_s: Seconds = 60.0
    request_s: Seconds = 600.0
    write_s: Seconds = 60.0
    stall_s: Heartbeat = 10.0
    log_prompts: bool = False

    @field_validator("*", mode="before")
    @classmethod
    def _read_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Return null for an empty text where null is the default, and expand `~` in paths."""
        name = str(info.field_name)
        if value == "" and cls.model_fields[name].default is None:
            return None
        return expanduser(value) if isinstance(value, str) and is_path(name) else value

    def engine_settings(self) -> Settings:
        """Return the settings of the engine; its models are the checkpoint, or else all runs."""
        values = self.model_dump(include=set(Settings.model_fields))
        return Settings(**{**values, "models": self.checkpoint or self.runs_dir})

    def variables(self) -> dict[str, str]:
        """Return the settings as environment variables; null is an empty text."""
        values = self.model_dump(exclude={"models"})
        texts = {k: ",".join(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {variable(k): "" if v is None else str(v) for k, v in texts.items()}


def read_settings(**values: Any) -> ApiSettings:
    """Return settings of which some values are given, and the others in the environment.

    Raises ValueError for an environment variable that is no setting, and for a value out of range.
    """
    known = {variable(field) for field in ApiSettings.model_fields.keys() - {"models"}} | OTHERS
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "conf/serve.yaml lists the settings"
            raise ValueError(f"the environment variable {name} is no setting; {hint}")
    try:
        return ApiSettings(**values)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        named = name if name in values else variable(name)
        raise ValueError(re.sub(rf"^{name}", named, explain(error))) from error


def variable(field: str) -> str:
    """Return the name of a field's environment variable."""
    return PREFIX + field.upper()
