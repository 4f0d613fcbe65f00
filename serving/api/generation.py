"""The answers to one request: `n` for each prompt, generated concurrently and detokenized.

Streamed and whole answers both come from here, so their texts are equal.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from nanogpt.detokenizer import Detokenizer
from serving.api import errors
from serving.api.errors import ApiError
from serving.engine.client import EngineClient
from serving.engine.messages import EngineError, Failed, Generate, Logprobs, Message, Tokens


@dataclass(frozen=True)
class Token:
    """A token, the offset of its text in the answer, and its log-probability.

    `top` is the ids of the likeliest tokens in its place and their log-probabilities. The first
    token of a prompt has no log-probability.
    """

    id: int
    offset: int
    logprob: float | None
    top: tuple[Sequence[int], Sequence[float]]


@dataclass
class Piece:
    """New text of an answer; `tokens` only where log-probabilities were requested."""

    index: int
    text: str
    tokens: list[Token] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def add(self, later: "Piece") -> None:
        """Append the piece that follows."""
        self.text += later.text
        self.tokens += later.tokens
        self.finish_reason = later.finish_reason


@dataclass
class Prompt:
    """The ids of a prompt and the most tokens of an answer to it, which begins with `echo`."""

    ids: list[int]
    max_tokens: int
    echo: Piece | None = None


class Choice:
    """One answer: the engine's request, and the text of its tokens."""

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
        self.finish_reason: Literal["stop", "length"] | None = None
        self.detokenizer = Detokenizer(token_bytes, stops)
        self._next = Piece(index, echo.text, [*echo.tokens]) if echo else Piece(index, "")
        self._offset = len(self._next.text)
        self._pending: list[Token] = []  # whose text is held back

    def take(self, tokens: Tokens) -> Piece:
        """Return what tokens of the engine add to the answer, its first piece with the echo."""
        detokenizer, n_before = self.detokenizer, self.detokenizer.n_tokens
        piece, self._next = self._next, Piece(self.index, "")
        piece.text += detokenizer.feed(tokens.ids)
        if tokens.logprobs is not None:
            offsets = [self._offset + start for start in detokenizer.starts[n_before:]]
            self._pending += tokens_of(tokens.ids, offsets, tokens.logprobs)
        if tokens.finish_reason:
            piece.text += detokenizer.finish()
        piece.finish_reason = "stop" if detokenizer.stopped else tokens.finish_reason
        self.finish_reason = piece.finish_reason
        self.cached_tokens, self.wait_s = tokens.cached_tokens, tokens.queue_s
        if self._pending:
            n_emitted = len(self._pending) - (detokenizer.n_tokens - detokenizer.n_emitted)
            piece.tokens += self._pending[:n_emitted]
            del self._pending[:n_emitted]
        return piece


class Generation:
    """The answers to one request as they grow: iterate over it, and close it in any case.

    The engine is read without waiting for the client: a slow one gets longer pieces. `limits` are
    the seconds until the first piece and until the end, each with the error of a longer wait.
    """

    def __init__(
        self,
        client: EngineClient,
        choices: Sequence[Choice],
        limits: Sequence[tuple[float, ApiError]],
    ) -> None:
        self.choices = choices
        self._began = time.monotonic()
        self._client = client
        self._pieces: dict[int, Piece] = {}  # not yet iterated over, by the index of the answer
        self._changed = asyncio.Event()
        self._error: ApiError | None = None
        self._n_open = len(choices)
        loop = asyncio.get_running_loop()
        self._timers = [loop.call_later(seconds, self._fail, error) for seconds, error in limits]
        for choice in choices:
            request = choice.request
            try:
                if request.params.max_tokens:
                    client.submit(request, partial(self._receive, choice))
                else:
                    self._receive(choice, Tokens(request.request_id, [], finish_reason="length"))
            except EngineError as error:
                self._fail(errors.from_exception(error, request.request_id))

    async def wait_for_first(self, seconds: float) -> None:
        """Wait for the first piece; raises ApiError where the generation failed before it."""
        with suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)
        if self._error and not self._pieces:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        """Yield the new pieces, at most one for each answer; raises ApiError."""
        while self._pieces or self._n_open:
            if self._pieces:
                pieces, self._pieces = self._pieces, {}
                yield list(pieces.values())
            elif self._error:
                raise self._error
            else:
                self._changed.clear()
                await self._changed.wait()

    async def whole(self) -> list[Piece]:
        """Return the complete answers."""
        answers = [Piece(choice.index, "") for choice in self.choices]
        async for pieces in self:
            for piece in pieces:
                answers[piece.index].add(piece)
        return answers

    def close(self) -> None:
        """Cancel the requests that are not finished."""
        for timer in self._timers:
            timer.cancel()
        for choice in self.choices:
            self._client.cancel(choice.request.request_id)

    def usage(self) -> dict[str, Any]:
        """Return what was computed so far, as the OpenAI API counts it, and how fast."""
        prompts = {id(c.request.prompt_ids): c for c in reversed(self.choices)}.values()
        prompt_tokens = sum(len(choice.request.prompt_ids) for choice in prompts)
        completion_tokens = sum(choice.detokenizer.n_tokens for choice in self.choices)
        seconds = time.monotonic() - self._began - min(choice.wait_s for choice in self.choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in prompts)},
            "completion_tokens_details": {"reasoning_tokens": 0},
            "tokens_per_second": round(completion_tokens / max(seconds, 1e-6), 2),
        }

    def _receive(self, choice: Choice, message: Message) -> None:
        request_id = choice.request.request_id
        try:
            if isinstance(message, Failed):
                raise EngineError(message.kind, message.message)
            assert isinstance(message, Tokens)
            piece = choice.take(message)
            self._timers[0].cancel()
            if piece.index in self._pieces:
                self._pieces[piece.index].add(piece)
            elif piece.text or piece.tokens or piece.finish_reason:
                self._pieces[piece.index] = piece
                self._changed.set()
        except Exception as error:
            self._fail(errors.from_exception(error, request_id))
            self._client.cancel(request_id)
        if choice.finish_reason:
            self._client.cancel(request_id, "stop")
            self._n_open -= 1
            self._changed.set()

    def _fail(self, error: ApiError) -> None:
        self._error = self._error or error
        self._changed.set()


def tokens_of(
    ids: Iterable[int], offsets: Iterable[int], logprobs: Iterable[Logprobs]
) -> list[Token]:
    """Return tokens with their log-probabilities, as many as there are offsets."""
    rows = zip(ids, offsets, logprobs, strict=False)
    return [Token(i, offset, own, (top, values)) for i, offset, (own, top, values) in rows]
