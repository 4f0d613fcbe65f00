"""The protocol between front ends and the engine: typed messages, sent as frames of msgpack.

A frame is its length (4 bytes, big-endian) and a list of messages; a message is a list of its name
and its fields in order, checked against their types when it is decoded. All messages of an engine
step to a front end are one frame.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Struct
from pydantic import BaseModel, ConfigDict, Field

LENGTH_BYTES = 4
MIN_LOGPROB = -9999.0  # stands for minus infinity, which the API's JSON lacks
BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

Task = Literal["generate", "classify"]
# Of a token: its log-probability, None for the first of a text; then the ids and log-probabilities
# of the likeliest tokens in its place.
Logprobs = tuple[float | None, list[int], list[float]]
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


class Settings(BaseModel):
    """What an engine process is started with; `models` is a checkpoint, or a directory of them.

    A model computes `max_slots` sequences at a time, fewer where its share of `cache_gb` does not
    hold their keys and values; at most `max_queue` more may wait. `max_models` stay in memory, with
    equal shares; the least recently used one makes room.
    """

    model_config = ConfigDict(frozen=True)

    models: str = "runs"
    runs_dir: str = "runs"  # where a run's name is looked up
    allow_modules: tuple[str, ...] = ()  # packages of blocks, which are imported
    default_model: str | None = None  # null: the newest finished run for the task
    device: str = "auto"
    dtype: Literal["auto", "fp32", "fp24", "bf16", "int8"] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None  # null: all cores
    invariant: bool = True  # an answer does not depend on its company
    max_slots: Annotated[int, Field(ge=1, le=65536)] | None = None  # null: by device
    # Of all models; null: a quarter of the memory.
    cache_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_queue: Count = 256
    max_models: Count = 4
    chunk_tokens: Count | None = None  # prompts are read in pieces of this many; null: by device
    watch_s: Seconds = 2.0  # how often to look for new checkpoints
    drain_s: SecondsOrZero = 30.0  # how long open requests may take to finish on SIGTERM
    hang_s: Heartbeat = 60.0  # without a heartbeat of the computing thread: killed and restarted


class EngineError(Exception):
    """A request that the engine refused, or did not answer."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class SamplingParams(Struct, frozen=True, array_like=True):
    """How tokens are sampled. A temperature near 0 takes the likeliest; seed and position key it.

    Filtered in this order: penalties and bias, grammar, temperature, top_k, top_p, min_p. With
    `logprobs` each token comes with its log-probability and with those of that many likeliest
    tokens (0 to 20): of the model itself, before all of these.
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
    logit_bias: dict[int, float] = {}
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False  # go on after stop_ids, as if there were none
    logprobs: int | None = None
    grammar: str = ""  # of llguidance: the answer is a text of it, or the beginning of one

    @property
    def adjusts(self) -> bool:
        """Whether penalties or bias change the logits."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalties or self.logit_bias)


class Histogram(Struct):
    """The number of durations up to each of `bounds` (seconds); the last count is the rest."""

    bounds: list[float] = msgspec.field(default_factory=lambda: list(BOUNDS_S))
    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one more duration."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds


class ModelInfo(Struct, frozen=True):
    """A model that is served, by its id or an alias; a new `revision` has new weights.

    While newer weights are loaded, `created` and `revision` are those of the weights that compute.
    """

    id: str
    aliases: list[str]
    created: int  # seconds since 1970
    revision: str
    loaded: bool
    default_for: list[Task | None]  # of requests for a task that name none; None: for any
    name: str = ""  # the run's own
    task: Task | None = None  # None for a broken file, as max_model_len
    max_model_len: int | None = None  # tokens of the context
    error: str = ""  # why this revision could not be loaded, at the last attempt


class Message(Struct, tag=True, array_like=True):
    """Anything that is sent as part of a frame."""


class Labelled(Message, kw_only=True):
    """The labels of a request: its API key, and the client's request that it belongs to."""

    key: str = ""
    origin: str = ""


class Computation(Labelled):
    """A request that takes a slot.

    Those with different keys take turns and reuse no prefixes of each other; of one key, those with
    different origins take turns, too.
    """

    request_id: str
    model: str
    prompt_ids: list[int]


class Generate(Computation):
    """Continue a prompt; answered by Tokens, or by Failed."""

    params: SamplingParams


class Score(Computation):
    """Return the log-probabilities of a prompt's own tokens from `start` on.

    Answered by Tokens without ids.
    """

    top: int = 0  # the number of likeliest tokens at each position
    start: int = 0  # the tokens before need not be computed again


class Classify(Computation):
    """Return the class of a text; answered by Classified."""


class Embed(Computation):
    """Return the mean of a text's final hidden states; answered by Embedded."""


class Describe(Message):
    """Load a model and describe it; answered by ModelDetails."""

    request_id: str
    model: str


class Cancel(Message):
    """Drop a request, which is not answered any more.

    `reason` is why: the client left, or a stop string ended the answer, which is complete.
    """

    request_id: str
    reason: Literal["left", "stop"] = "left"


class Tokens(Message):
    """The next tokens of an answer; the last message has the reason of its end.

    That is "stop" after one of stop_ids, which is not among the tokens, and "length" at max_tokens
    or a full context. `cached_tokens` of the prompt were in the cache; `queue_s` is the time in the
    queue.
    """

    request_id: str
    ids: list[int]
    logprobs: Sequence[Logprobs] | None = None  # of each token, with `params.logprobs`
    finish_reason: Literal["stop", "length"] | None = None
    cached_tokens: int = 0
    queue_s: float = 0.0


class Failed(Message):
    """A request that will not be answered, and why, in one sentence."""

    request_id: str
    kind: FailureKind
    message: str


class Classified(Message):
    """The probability of each label, and the number of tokens of the text."""

    request_id: str
    probabilities: list[float]
    n_tokens: int


class Embedded(Message):
    """An embedding of length 1: float32, little-endian."""

    request_id: str
    vector: bytes


class ModelDetails(Message):
    """The facts about a model that a front end needs; `tokenizer` is its record.

    `nanogpt.tokenizer.from_record` turns that into a tokenizer.
    """

    request_id: str
    revision: str
    stage: str
    step: int
    block_size: int
    vocab_size: int
    n_embd: int
    n_params: int
    dtype: str
    tokenizer: dict[str, Any]
    template: str | None
    labels: list[str] | None


class Models(Message):
    """The models that are served: sent to every front end when it connects and when they change."""

    models: list[ModelInfo]


class Stats(Message, kw_only=True):
    """The engine's totals since it started, and its present load.

    Sent to every front end about twice a second, as the heartbeat of the computing thread.
    """

    requests: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    queue_s: Histogram = msgspec.field(default_factory=Histogram)
    first_token_s: Histogram = msgspec.field(default_factory=Histogram)
    inter_token_s: Histogram = msgspec.field(default_factory=Histogram)
    slots: int = 0
    slots_used: int = 0
    queued: int = 0
    device: str = ""
    dtype: str = ""
    threads: int = 0


Request = Generate | Score | Classify | Embed | Describe
Answer = Tokens | Failed | Classified | Embedded | ModelDetails
_decoder = msgspec.msgpack.Decoder(list[Request | Cancel | Answer | Models | Stats])


def to_frame(messages: Iterable[Message]) -> bytes:
    """Return messages as one frame, its length included."""
    content = msgspec.msgpack.encode(list(messages))
    return len(content).to_bytes(LENGTH_BYTES, "big") + content


async def read_frame(reader: asyncio.StreamReader) -> list[Any]:
    """Return the messages of the next frame.

    Raises ValueError for a frame of other content, IncompleteReadError at the end.
    """
    n_bytes = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
    return _decoder.decode(await reader.readexactly(n_bytes))
