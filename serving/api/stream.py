"""Server-sent events in the grammar that every client reads.

`data: {...}` and a blank line; the first chunk of a chat has the role, then text, then a chunk with
the finish reason and no text, the usage where it was asked for, and `[DONE]`. No `id:` lines: after
one, a ping reads as an empty event (openai/openai-python, `_streaming.py`).
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
from serving.api.generation import Generation, Piece
from serving.api.models import ServedModel

DONE = b"data: [DONE]\n\n"
PING_S = 15
LONG_BYTES = 10_000  # frames that take about a millisecond to render
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
# str.splitlines, and so the line readers of httpx and requests, split at these too.
LINE_SEPARATORS = {"\u2028": "\\u2028", "\u2029": "\\u2029", "\u0085": "\\u0085"}
TEXT = "\x00text\x00"  # where the text goes in a chunk that TextFrames renders

AppStatus.disable_automatic_graceful_drain()  # open answers finish: see serving/app.py


class Format(ABC):
    """How one of the two APIs writes an answer.

    All objects of one answer share `head`: id, time, model.
    """

    def __init__(
        self,
        head: dict[str, Any],
        n: int,
        token_bytes: Sequence[bytes],
        *,
        kinds: tuple[str, str],
        with_logprobs: bool,
        include_usage: bool,
    ) -> None:
        whole, chunk = kinds
        self.head = {**head, "object": whole}
        self._chunk_head = {**head, "object": chunk}
        if include_usage:  # where the last chunk has the usage, the others name it
            self._chunk_head["usage"] = None
        self._n = n
        self._token_bytes = token_bytes
        self._with_logprobs = with_logprobs

    def opening(self) -> bytes:
        """Return the frames before any text."""
        return b""

    @abstractmethod
    def frames(self, piece: Piece) -> bytes:
        """Return the frames of what an answer grew by, and of the reason why it ends."""

    @abstractmethod
    def choice(self, answer: Piece) -> dict[str, Any]:
        """Return a whole answer, not streamed."""

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the frame with the usage."""
        return frame({**self._chunk_head, "choices": [], "usage": usage})


class EventStream(EventSourceResponse):
    """A generation as it grows; whatever ends the stream closes the generation."""

    def __init__(
        self,
        generation: Generation,
        form: Format,
        *,
        include_usage: bool,
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(
            events(generation, form, include_usage),
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


async def events(generation: Generation, form: Format, include_usage: bool) -> AsyncIterator[bytes]:
    """Yield the frames of a stream; a failure on the way is a frame too, before the end."""
    yield form.opening()
    try:
        async with aclosing(generation.__aiter__()) as growth:  # type: ignore[type-var]
            async for pieces in growth:
                frames = []
                for piece in pieces:
                    frames.append(form.frames(piece))
                    if len(frames[-1]) > LONG_BYTES:
                        await asyncio.sleep(0)
                yield b"".join(frames)
        if include_usage:
            yield form.usage(generation.usage())
    except ApiError as error:
        yield frame(error.content())
    yield DONE


async def whole(form: Format, answers: Sequence[Piece], usage: dict[str, Any]) -> bytes:
    """Return answers as one JSON object; the event loop runs between two of them."""
    before, after = to_json({**form.head, "choices": [TEXT], "usage": usage}).split(to_json(TEXT))
    parts = [before]
    for answer in answers:
        parts += [to_json(form.choice(answer)), b","]
        await asyncio.sleep(0)
    return b"".join([*parts[:-1], after])


def answer_head(prefix: str, model: ServedModel) -> dict[str, Any]:
    """Return what every object of an answer begins with."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": "",  # the format's
        "created": int(time.time()),
        "model": model.id,
        "system_fingerprint": model.fingerprint,
    }


def frame(content: dict[str, Any]) -> bytes:
    """Return one event."""
    return b"data: " + to_json(content) + b"\n\n"


def to_json(content: Any) -> bytes:
    """Return compact JSON on what every reader takes for one line.

    Lone surrogates, which a client may have sent, and line separators are escaped.
    """
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    if not text.isascii():
        for separator, escape in LINE_SEPARATORS.items():
            text = text.replace(separator, escape)
    return text.encode("utf-8", "backslashreplace")


class TextFrames:
    """Frames that differ in a text only: all else is rendered once."""

    def __init__(self, chunk: dict[str, Any]) -> None:
        self._before, self._after = frame(chunk).split(to_json(TEXT))

    def render(self, text: str) -> bytes:
        """Return the frame with this text."""
        return self._before + to_json(text) + self._after
