"""One request's answers: `n` for each prompt, computed side by side, their text as it becomes sure.

Streamed or not, an answer comes from here, so both have the same text.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nanogpt.detokenizer import Detokenizer
from serving.api import errors
from serving.api.deadlines import Deadlines
from serving.api.errors import ApiError
from serving.engine.client import EngineClient
from serving.engine.messages import Finished, Generate, Scored, Tokens


@dataclass(frozen=True)
class Token:
    """A token, where its text begins in the answer, and how likely it and others were in its place.

    `top` is the ids of the likeliest tokens and their log-probabilities. The first token of a
    prompt has no log-probability.
    """

    id: int
    offset: int
    logprob: float | None
    top: tuple[Sequence[int], Sequence[float]]


@dataclass
class Piece:
    """What an answer grows by; `tokens` only where log-probabilities were asked for."""

    index: int
    text: str
    tokens: list[Token] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def add(self, later: "Piece") -> None:
        """Take in the piece that follows."""
        self.text += later.text
        self.tokens += later.tokens
        self.finish_reason = later.finish_reason


class Choice:
    """One answer: what is asked of the engine, and the text of what came.

    `echo` is what the answer begins with, of the prompt; several answers may share it.
    """

    def __init__(
        self,
        index: int,
        request: Generate,
        token_bytes: Sequence[bytes],
        stops: Sequence[str] = (),
        echo: Piece | None = None,
    ) -> None:
        self.index = index
        self.request = request
        self.cached_tokens = 0
        self.wait_s = 0.0  # for a slot
        self.finish_reason: str | None = None
        self._echo = replace(echo, index=index, tokens=[*echo.tokens]) if echo else None
        self._detokenizer = Detokenizer(token_bytes, stops)
        self._offset = len(echo.text) if echo else 0
        self._untold: list[Token] = []  # whose text is held back
        self._n_emitted = 0

    @property
    def completion_tokens(self) -> int:
        """The number of tokens generated, up to a stop string."""
        return self._detokenizer.n_tokens

    def take(self, event: Tokens | Finished) -> Piece:
        """Return what an event of the engine adds to the answer."""
        piece = Piece(self.index, "")
        if isinstance(event, Tokens):
            n_before = self._detokenizer.n_tokens
            piece.text = self._detokenizer.feed(event.ids)
            if event.logprobs is not None:
                self._untold += self._with_logprobs(event, n_before)
        else:
            piece.text = self._detokenizer.finish()
            piece.finish_reason = event.reason
        if event.cached_tokens is not None and event.queue_s is not None:
            self.cached_tokens, self.wait_s = event.cached_tokens, event.queue_s
        if self._detokenizer.stopped:
            piece.finish_reason = "stop"
        self.finish_reason = piece.finish_reason
        if self._untold:
            piece.tokens = self._told()
        return self.after_echo(piece)

    def after_echo(self, piece: Piece) -> Piece:
        """Return a piece, what the answer begins with before it where it is the first."""
        if self._echo is None:
            return piece
        first, self._echo = self._echo, None
        first.add(piece)
        return first

    def _with_logprobs(self, event: Tokens, n_before: int) -> list[Token]:
        offsets = [self._offset + start for start in self._detokenizer.starts[n_before:]]
        scores = (event.logprobs or (), event.top_ids, event.top_logprobs)
        return tokens_of(event.ids, offsets, *scores)

    def _told(self) -> list[Token]:
        n_new = self._detokenizer.n_emitted - self._n_emitted
        self._n_emitted += n_new
        told, self._untold = self._untold[:n_new], self._untold[n_new:]
        return told


class Generation:
    """The answers to one request as they grow: iterate it, and close it whatever happens.

    Reading the engine never waits for the client: a slow one finds more text in the next piece.
    """

    def __init__(self, client: EngineClient, choices: Sequence[Choice]) -> None:
        self.choices = choices
        self.began = time.monotonic()
        self._client = client
        self._waiting: list[Piece] = []
        self._changed = asyncio.Event()
        self._error: ApiError | None = None
        self._open = len(choices)
        self._tasks: list[asyncio.Task[None]] = []
        self._timers: list[asyncio.TimerHandle] = []

    def start(self, deadlines: Deadlines) -> None:
        """Ask the engine; fail where its first token or the last does not come in time."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._read(choice)) for choice in self.choices]
        self._timers = [
            loop.call_later(deadlines.first_s, self._fail, deadlines.late()),
            loop.call_later(deadlines.whole_s, self._fail, deadlines.slow()),
        ]

    async def wait_for_first(self, seconds: float) -> None:
        """Wait until there is a piece, for so long; raises what failed before there was one."""
        waiting = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait([waiting], timeout=seconds)
        finally:
            waiting.cancel()
        if self._error and not self._waiting:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        """Yield what has come meanwhile, at most one piece for each answer; raises ApiError."""
        while self._waiting or self._open:
            if self._waiting:
                pieces, self._waiting = self._waiting, []
                yield _joined(pieces)
            elif self._error:
                raise self._error
            else:
                self._changed.clear()
                await self._changed.wait()

    async def close(self) -> None:
        """Let the engine forget what is not finished."""
        for timer in self._timers:
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def usage(self) -> dict[str, Any]:
        """Return what was computed so far, as the OpenAI API counts it, and how fast."""
        prompts = {id(c.request.prompt_ids): c for c in reversed(self.choices)}.values()
        prompt_tokens = sum(len(choice.request.prompt_ids) for choice in prompts)
        completion_tokens = sum(choice.completion_tokens for choice in self.choices)
        seconds = time.monotonic() - self.began - min(choice.wait_s for choice in self.choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in prompts)},
            "completion_tokens_details": {"reasoning_tokens": 0},
            "tokens_per_second": round(completion_tokens / max(seconds, 1e-6), 2),
        }

    async def _read(self, choice: Choice) -> None:
        try:
            if choice.request.params.max_tokens:
                async with aclosing(self._client.generate(choice.request)) as events:
                    async for event in events:
                        self._put(choice.take(event))
                        if choice.finish_reason:
                            self._client.stop(choice.request.request_id)
                            break
            else:
                self._put(choice.after_echo(Piece(choice.index, "", finish_reason="length")))
            self._open -= 1
            self._changed.set()
        except Exception as error:
            self._fail(errors.from_exception(error, choice.request.request_id))

    def _put(self, piece: Piece) -> None:
        self._timers[0].cancel()
        if piece.text or piece.tokens or piece.finish_reason:
            self._waiting.append(piece)
            self._changed.set()

    def _fail(self, error: ApiError) -> None:
        self._error = self._error or error
        self._changed.set()


def echo_of(
    text: str, ids: Sequence[int], token_bytes: Sequence[bytes], scored: Scored | None
) -> Piece:
    """Return what an answer to a prompt begins with, and how likely it was where that is known."""
    if scored is None:
        return Piece(0, text)
    measure = Detokenizer(token_bytes)
    measure.feed(ids)
    scores = (scored.logprobs, scored.top_ids, scored.top_logprobs)
    return Piece(0, text, tokens_of(ids, measure.starts, *scores))


def tokens_of(
    ids: Sequence[int],
    offsets: Sequence[int],
    logprobs: Sequence[float | None],
    top_ids: Sequence[Sequence[int]] | None,
    top_logprobs: Sequence[Sequence[float]] | None,
) -> list[Token]:
    """Return tokens with what is known of each; of what goes beyond `offsets`, nothing."""
    nothing: Sequence[Sequence[Any]] = [()] * len(ids)
    tops = zip(top_ids or nothing, top_logprobs or nothing, strict=True)
    return [
        Token(i, offset, logprob, top)
        for i, offset, logprob, top in zip(ids, offsets, logprobs, tops, strict=False)  # cut short
    ]


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Return pieces with those of one answer joined, in the order of the first of each."""
    if len(pieces) == 1:
        return pieces
    joined: dict[int, Piece] = {}
    for piece in pieces:
        if piece.index in joined:
            joined[piece.index].add(piece)
        else:
            joined[piece.index] = piece
    return list(joined.values())
