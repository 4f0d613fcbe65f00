"""The JSON objects of answers, and streams of server-sent events as OpenAI's clients parse them.

An event is `data: {...}` and a blank line. The first chunk of a chat has the role; chunks of text
follow, one with the finish reason and no text, the usage if requested, and `[DONE]`. There are no
`id:` lines: after one, a ping reads as an empty event (openai/openai-python, `_streaming.py`).
"""

import asyncio
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.types import Receive, Scope, Send

from serving.api.errors import ApiError
from serving.api.generation import Generation, Piece, Token
from serving.api.models import ServedModel

DONE = b"data: [DONE]\n\n"
PING_S = 15
LONG_BYTES = 10_000  # frames that take about a millisecond to render
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
# str.splitlines, and so the line readers of httpx and requests, split at these too.
LINE_SEPARATORS = {"\u2028": "\\u2028", "\u2029": "\\u2029", "\u0085": "\\u0085"}
TEXT = "\x00text\x00"  # a placeholder in rendered JSON

AppStatus.disable_automatic_graceful_drain()  # open answers finish: see serving/app.py


class Format(ABC):
    """The JSON objects of an answer of one of the two APIs; all share id, time and model."""

    prefix: str  # of the id
    kinds: tuple[str, str]  # of a whole answer and of a chunk

    def __init__(
        self, model: ServedModel, n: int, with_logprobs: bool, include_usage: bool
    ) -> None:
        whole, chunk = self.kinds
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": whole,
            "created": int(time.time()),
            "model": model.id,
            "system_fingerprint": model.fingerprint,
        }
        self._chunk_head = {**self.head, "object": chunk}
        if include_usage:  # null in all chunks but the last
            self._chunk_head["usage"] = None
        self._n = n
        self._token_bytes = model.token_bytes
        self._with_logprobs, self.include_usage = with_logprobs, include_usage
        # Frames of text alone are rendered once, but for the text.
        self._texts = [self._frame(i, self.delta(TEXT)).split(to_json(TEXT)) for i in range(n)]

    @abstractmethod
    def delta(self, text: str) -> dict[str, Any]:
        """Return the text of a chunk."""

    @abstractmethod
    def message(self, text: str) -> dict[str, Any]:
        """Return the text of a whole answer."""

    @abstractmethod
    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return tokens with their log-probabilities."""

    def opening(self) -> bytes:
        """Return the frames before any text."""
        return b""

    def frames(self, piece: Piece) -> bytes:
        """Return a frame with the new text and tokens, and one with the finish reason."""
        content = b""
        if piece.tokens:
            logprobs = self.logprobs(piece.tokens)
            content = self._frame(piece.index, self.delta(piece.text), logprobs)
        elif piece.text:
            content = to_json(piece.text).join(self._texts[piece.index])
        if piece.finish_reason is None:
            return content
        return content + self._frame(piece.index, self.delta(""), None, piece.finish_reason)

    def choice(self, answer: Piece) -> dict[str, Any]:
        """Return a whole answer, not streamed."""
        return {
            "index": answer.index,
            **self.message(answer.text),
            "logprobs": self.logprobs(answer.tokens) if self._with_logprobs else None,
            "finish_reason": answer.finish_reason,
        }

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the frame with the usage."""
        return frame({**self._chunk_head, "choices": [], "usage": usage})

    def _frame(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        rest = {"logprobs": logprobs, "finish_reason": finish_reason}
        return frame({**self._chunk_head, "choices": [{"index": index, **delta, **rest}]})


class EventStream(EventSourceResponse):
    """The stream of a generation, which is closed when the stream ends for any reason."""

    def __init__(
        self,
        generation: Generation,
        form: Format,
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(
            events(generation, form),
            headers={"Cache-Control": "no-cache, no-transform"},
            ping=PING_S,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            sep="\n",
        )
        self.generation = generation
        self.on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self.generation.close()
            self.on_end()


async def events(generation: Generation, form: Format) -> AsyncIterator[bytes]:
    """Yield the frames of a stream; an error during generation is a frame before `[DONE]`."""
    yield form.opening()
    try:
        async with aclosing(generation.__aiter__()) as iterator:  # type: ignore[type-var]
            async for pieces in iterator:
                frames = []
                for piece in pieces:
                    frames.append(form.frames(piece))
                    if len(frames[-1]) > LONG_BYTES:
                        await asyncio.sleep(0)
                yield b"".join(frames)
        if form.include_usage:
            yield form.usage(generation.usage())
    except ApiError as error:
        yield frame(error.content())
    yield DONE


async def whole(form: Format, answers: Sequence[Piece], usage: dict[str, Any]) -> bytes:
    """Return answers as one JSON object, yielding to the event loop after each."""
    before, after = to_json({**form.head, "choices": [TEXT], "usage": usage}).split(to_json(TEXT))
    parts = [before]
    for answer in answers:
        parts += [to_json(form.choice(answer)), b","]
        await asyncio.sleep(0)
    return b"".join([*parts[:-1], after])


def frame(content: dict[str, Any]) -> bytes:
    """Return one event."""
    return b"data: " + to_json(content) + b"\n\n"


def to_json(content: Any) -> bytes:
    """Return compact JSON on one line, with lone surrogates and Unicode line separators escaped."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    if not text.isascii():
        for separator, escape in LINE_SEPARATORS.items():
            text = text.replace(separator, escape)
    return text.encode("utf-8", "backslashreplace")
