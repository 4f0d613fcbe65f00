"""What the front ends are told: where they listen, keys, limits, and whom they answer."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Binding:
    """Where the server listens, and in how many processes."""

    host: str = "127.0.0.1"
    port: int = 5001
    workers: int = 1


@dataclass(frozen=True)
class ApiSettings:
    """The choices of a front end; `conf/serve.yaml` and `NANOGPT_*` variables set them.

    `max_open` requests are worked on at a time in this front end, `max_open_per_key` for one key.
    """

    api_keys: tuple[str, ...] = ()
    insecure: bool = False  # answer beyond loopback without a key
    cors_origins: tuple[str, ...] = ("*",)
    cors_private_network: bool = False  # let public pages reach this server in a private network
    unknown_model: Literal["error", "default"] = "error"
    max_open: int = 288
    max_open_per_key: int | None = None
    max_body_bytes: int = 2**20
    max_n: int = 8
    max_prompts: int = 64
    max_queue: int = 256  # the engine's: all answers to one request fit into it
    max_stops: int = 16
    body_s: float = 30.0  # for a request's body to arrive
    queue_s: float = 60.0  # from arrival to the first token, score or class
    request_s: float = 600.0  # from arrival to the end of the answer
    write_s: float = 60.0  # for a reader to take what was sent
    drain_s: float = 30.0  # for open answers to finish after SIGTERM
    log_prompts: bool = False
    runs_dir: str = "runs"  # whose runs /runs shows
