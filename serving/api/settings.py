"""Settings of the front ends: the address, API keys, limits, and which clients are answered."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from serving.engine.messages import Count, Heartbeat, Seconds, SecondsOrZero, Words


@dataclass(frozen=True)
class Binding:
    """The address at which the server listens, and the number of its front ends."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 5001
    workers: Count = 1


@dataclass(frozen=True)
class ApiSettings:
    """The choices of a front end; `conf/serve.yaml` and `NANOGPT_*` variables set them.

    `max_open` requests are worked on at a time in this front end, `max_open_per_key` for one key.
    """

    api_keys: Words = ()
    insecure: bool = False  # answer beyond loopback without a key
    allowed_hosts: Words = ()  # host names besides loopback's that are answered without a key
    cors_origins: Words = ("auto",)  # auto: without keys loopback's, with keys any
    cors_private_network: bool = False  # let public pages reach this server in a private network
    unknown_model: Literal["error", "default"] = "error"
    max_open: Count = 288
    max_open_per_key: Count | None = None
    max_body_bytes: Count = 2**20
    max_n: Count = 8
    max_prompts: Count = 64
    max_queue: Count = 256  # the engine's: all answers to one request fit into it
    max_stops: Count = 16
    body_s: Seconds = 30.0  # for a request's body to arrive
    queue_s: Seconds = 60.0  # from arrival to the first token, score or class
    request_s: Seconds = 600.0  # from arrival to the end of the answer
    write_s: Seconds = 60.0  # for a reader to take what was sent
    stall_s: Heartbeat = 10.0  # without a heartbeat of the engine: /ready answers 503
    drain_s: SecondsOrZero = 30.0  # for open answers to finish after SIGTERM
    log_prompts: bool = False
    runs_dir: str = "runs"  # whose runs /runs shows
