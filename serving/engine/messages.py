"""What front ends and the engine tell each other: plain values, sent as frames of JSON.

A frame is its length (4 bytes, big-endian) and a JSON list of messages; a message is a list of its
name and its fields in order. Everything an engine step has to say to a front end is one frame.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, get_args

import pydantic.dataclasses
from pydantic import BeforeValidator, Field

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 256 * 2**20  # a whole tokenizer table is a few MB
MIN_LOGPROB = -9999.0  # stands for minus infinity, which JSON lacks

Task = Literal["generate", "classify"]
FailureKind = Literal[
    "invalid",  # the request cannot be computed: 400
    "context_length",  # the prompt leaves no room for a token: 400
    "not_found",  # no such model: 404
    "overloaded",  # the queue is full: 429 or 503
    "unavailable",  # the engine drains, died, or is starting: 503
    "internal",  # this request failed while it was computed, others did not: 500
]


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Heartbeat = Annotated[float, Field(ge=2, le=86_400, allow_inf_nan=False)]  # comes every second
Seconds = Annotated[float, Field(gt=0, le=86_400 * 366, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, Field(ge=0, le=86_400 * 366, allow_inf_nan=False)]
Words = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda v: v.replace(",", " ").split() if isinstance(v, str) else v),
]


@pydantic.dataclasses.dataclass(frozen=True)
class Settings:
    """What an engine process is started with; `models` is a `.ckpt`, a run, or a directory of runs.

    A model computes `max_slots` sequences at a time, fewer where its share of `cache_gb` does not
    hold their keys and values; at most `max_queue` more may wait. `max_models` are kept in memory,
    with equal shares; the one that was asked longest ago makes room.
    """

    models: str = "runs"
    runs_dir: str = "runs"  # where a run's name is looked up
    default_model: str | None = None  # null: the newest finished run that can do what is asked
    device: str = "auto"
    dtype: Literal["auto", "fp32", "fp24", "bf16", "int8"] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None  # null: all cores
    invariant: bool = True  # an answer does not depend on its company
    max_slots: Annotated[int, Field(ge=1, le=65536)] = 32
    cache_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = (
        None  # of all models; null: a quarter of the memory
    )
    max_queue: Count = 256
    max_models: Count = 4
    chunk_tokens: Count = 64  # prompts are read in pieces of this many tokens
    watch_s: Seconds = 2.0  # how often to look for new checkpoints
    drain_s: SecondsOrZero = 30.0  # how long open requests may take to finish on SIGTERM
    hang_s: Heartbeat = 60.0  # without a heartbeat of the computing thread: killed and restarted


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. A temperature near 0 takes the likeliest; seed and place key the draw.

    Narrowed in this order: penalties and bias, temperature, top_k, top_p, min_p. With `logprobs`
    each token comes with its log-probability and with those of that many likeliest tokens (0 to
    20): of the model itself, before penalties, bias and temperature.
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0  # counted over the answer's tokens, as frequency_penalty is
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and answer
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False  # go on after stop_ids, as if there were none
    logprobs: int | None = None


@dataclass(frozen=True)
class Generate:
    """Continue a prompt; answered by Tokens, then Finished, or by Failed.

    Requests with different `key` labels take turns, and reuse no prefixes of each other; `origin`
    is the client's request that this one belongs to, and those of one key take turns, too.
    """

    request_id: str
    model: str
    prompt_ids: list[int]
    params: SamplingParams
    key: str = ""
    origin: str = ""


@dataclass(frozen=True)
class Cancel:
    """Forget a request: nothing more is said of it.

    `reason` is why: the client left, or a stop string ended the answer, which is complete.
    """

    request_id: str
    reason: Literal["left", "stop"] = "left"


@dataclass(frozen=True)
class Score:
    """Ask for the log-probabilities of a prompt's own tokens (echo); answered by Scored."""

    request_id: str
    model: str
    prompt_ids: list[int]
    top: int = 0
    key: str = ""
    origin: str = ""


@dataclass(frozen=True)
class Classify:
    """Ask for the class of a text, given as ids; answered by Classified."""

    request_id: str
    model: str
    ids: list[int]
    key: str = ""
    origin: str = ""


@dataclass(frozen=True)
class Describe:
    """Ask for all about a model, which is loaded for it; answered by ModelDetails."""

    request_id: str
    model: str


@dataclass(frozen=True)
class AskStats:
    """Ask for the engine's counters; answered by Stats."""

    request_id: str


@dataclass(frozen=True)
class Hello:
    """What a front end says first; the secret matters on loopback TCP only."""

    secret: str = ""


@dataclass(frozen=True)
class Tokens:
    """The next tokens of an answer. A token that ends it (stop_ids) is not among them.

    Where asked for: each token's log-probability, and the likeliest tokens in its place. The first
    ones say how much of the prompt was not computed again and how long it waited for a slot, as a
    stop string may end the answer before there is a Finished.
    """

    request_id: str
    ids: list[int]
    logprobs: list[float] | None = None
    top_ids: list[list[int]] | None = None
    top_logprobs: list[list[float]] | None = None
    cached_tokens: int | None = None
    queue_s: float | None = None


@dataclass(frozen=True)
class Finished:
    """The end of an answer: "stop" after one of stop_ids, "length" at max_tokens or a full context.

    There may have been no Tokens, so it says again what the first of them say.
    """

    request_id: str
    reason: Literal["stop", "length"]
    cached_tokens: int
    queue_s: float


@dataclass(frozen=True)
class Failed:
    """A request that will not be answered, and why, in one sentence."""

    request_id: str
    kind: FailureKind
    message: str


@dataclass(frozen=True)
class Scored:
    """The log-probability of each prompt token after those before it; the first has none."""

    request_id: str
    logprobs: list[float | None]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]


@dataclass(frozen=True)
class Classified:
    """The probability of each label, and how many tokens were read."""

    request_id: str
    probabilities: list[float]
    n_tokens: int


@dataclass(frozen=True)
class ModelInfo:
    """A model that can be asked for, by its id or an alias; a new `revision` has new weights.

    While newer weights are loaded, `created` and `revision` are those of the weights that compute.
    """

    id: str
    aliases: list[str]
    created: int  # seconds since 1970
    revision: str
    loaded: bool
    default: bool  # of requests that name none
    default_to_generate: bool  # of those for text
    default_to_classify: bool = False  # of those for labels
    name: str = ""  # the run's own
    max_model_len: int | None = None  # tokens of the context, None for a broken file
    error: str = ""  # why this revision could not be loaded, when last tried


@dataclass(frozen=True)
class ModelDetails:
    """All that a front end needs to know of a model; `tokenizer` is its record.

    `nanogpt.tokenizer.from_record` turns that into a tokenizer.
    """

    request_id: str
    id: str
    revision: str
    stage: str
    step: int
    block_size: int
    vocab_size: int
    n_params: int
    dtype: str
    tokenizer: dict[str, Any]
    template: str | None
    labels: list[str] | None


@dataclass(frozen=True)
class Models:
    """The models there are: sent to every front end when it connects and when they change."""

    models: list[ModelInfo]


@dataclass(frozen=True)
class Beat:
    """A heartbeat of the computing thread, sent to every front end about once a second."""


@dataclass(frozen=True)
class Histogram:
    """How often a duration was at most each of `bounds` (seconds); the last count is the rest."""

    bounds: list[float]
    counts: list[int]
    total: float


@dataclass(frozen=True)
class Stats:
    """The engine's counters since it started, and what it is doing now."""

    request_id: str
    slots: int
    slots_used: int
    queued: int
    requests: int
    finished: int
    failed: int
    cancelled: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    steps: int
    queue_s: Histogram
    first_token_s: Histogram
    inter_token_s: Histogram
    device: str
    dtype: str
    threads: int


Request = Generate | Score | Classify | Describe | AskStats
Message = (
    Request
    | Hello
    | Cancel
    | Tokens
    | Finished
    | Failed
    | Scored
    | Classified
    | ModelDetails
    | Models
    | Beat
    | Stats
)

_KINDS: dict[str, type] = {kind.__name__: kind for kind in get_args(Message)}
_NAMES = {kind: tuple(f.name for f in fields(kind)) for kind in _KINDS.values()}


def to_frame(messages: Iterable[Message]) -> bytes:
    """Return messages as one frame, its length included."""
    content = json.dumps(
        [
            [type(m).__name__, *(_plain(getattr(m, name)) for name in _NAMES[type(m)])]
            for m in messages
        ],
        separators=(",", ":"),
    ).encode()
    return len(content).to_bytes(LENGTH_BYTES, "big") + content


def from_frame(content: bytes) -> list[Message]:
    """Return the messages of a frame's content, without its length."""
    return [_message(name, values) for name, *values in json.loads(content)]


def settings_json(settings: Settings) -> str:
    """Return settings as the text that an engine process is started with."""
    return json.dumps({f.name: getattr(settings, f.name) for f in fields(settings)})


def _plain(value: Any) -> Any:
    if isinstance(value, SamplingParams | Histogram | ModelInfo):
        return vars(value)
    if isinstance(value, list) and value and isinstance(value[0], ModelInfo):
        return [_plain(item) for item in value]
    return value


def _message(name: str, values: list[Any]) -> Message:
    kind = _KINDS[name]
    if kind is Generate:
        values[3] = _params(values[3])
    elif kind is Models:
        values[0] = [ModelInfo(**item) for item in values[0]]
    elif kind is Stats:
        values = [Histogram(**v) if isinstance(v, dict) else v for v in values]
    message: Message = kind(*values)
    return message


def _params(values: dict[str, Any]) -> SamplingParams:
    bias = {int(token): value for token, value in values.pop("logit_bias").items()}
    return SamplingParams(
        **{**values, "logit_bias": bias, "stop_ids": tuple(values.pop("stop_ids"))}
    )
