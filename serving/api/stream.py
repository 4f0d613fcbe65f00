"""The JSON objects of answers, and streams of server-sent events as OpenAI's clients parse them.

An event is `data: {...}` and a blank line. The first chunk of a chat has the role; chunks of text
follow, one with the finish reason and no text, the usage if requested, and `[DONE]`. There are no
`id:` lines: after one, a ping reads as an empty event (openai/openai-python, `_streaming.py`).
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.responses import Response

from serving.api.errors import ApiError
from serving.api.generation import Choice, Generation, Piece, Token
from serving.api.models import ServedModel

DONE = b"data: [DONE]\n\n"
PING_S = 15
LONG_BYTES = 10_000  # frames that take about a millisecond to render
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
# str.splitlines, and so the line readers of httpx and requests, split at these too.
LINE_SEPARATORS = {"\u2028": "\\u2028", "\u2029": "\\u2029", "\u0085": "\\u0085"}
TEXT = "\x00text\x00"  # a placeholder in rendered JSON

AppStatus.disable_automatic_graceful_drain()  # open answers finish: see serving/app.py


class CompletionFormat:
    """The JSON objects of `/v1/completions`; those of an answer share id, time and model."""

    prefix = "cmpl"  # of the id
    kinds = ("text_completion", "text_completion")  # of a whole answer and of a chunk

    def __init__(self, model: ServedModel, choices: Sequence[Choice], include_usage: bool) -> None:
        (whole, chunk), details = self.kinds, model.details
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": whole,
            "created": int(time.time()),
            "model": model.id,
            # It changes with weights and precision.
            "system_fingerprint": f"fp_{details.revision[:10]}_{details.dtype}",
        }
        self._chunk_head = {**self.head, "object": chunk}
        if include_usage:  # null in all chunks but the last
            self._chunk_head["usage"] = None
        self.choices, self.include_usage = choices, include_usage
        self._token_bytes = model.token_bytes
        self._with_logprobs = choices[0].request.params.logprobs is not None
        # Frames of text alone are rendered once, but for the text.
        text = to_json(TEXT)
        self._texts = [self._frame(c.index, self.delta(TEXT)).split(text) for c in choices]

    def opening(self) -> bytes:
        """Return the frames before any text."""
        return b""

    def delta(self, text: str) -> dict[str, Any]:
        """Return the text of a chunk."""
        return {"text": text}

    message = delta  # of a whole answer

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return tokens with their log-probabilities."""
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

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

    def closing(self, usage: dict[str, Any]) -> bytes:
        """Return the frames after the answers: the usage if requested, and the end."""
        if not self.include_usage:
            return DONE
        return frame({**self._chunk_head, "choices": [], "usage": usage}) + DONE

    def failure(self, error: ApiError) -> bytes:
        """Return the frames that end a stream instead."""
        return frame(error.content()) + DONE

    def envelope(self, content: list[Any], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the object of whole answers, with no text of the request after `content`."""
        return {**self.head, "choices": content, "usage": usage}

    def _frame(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        rest = {"logprobs": logprobs, "finish_reason": finish_reason}
        return frame({**self._chunk_head, "choices": [{"index": index, **delta, **rest}]})

    def _top(self, token: Token) -> dict[str, float] | None:
        """Return the likeliest tokens and the chosen one, with their log-probabilities."""
        if token.logprob is None:
            return None
        top = {self._name(i): logprob for i, logprob in zip(*token.top, strict=True)}
        return {**top, self._name(token.id): token.logprob}

    def _name(self, token_id: int) -> str:
        """Return a token's text, or its bytes where they are no text (`bytes:\\xe2\\x80`)."""
        raw = self._token_bytes[token_id]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class ChatFormat(CompletionFormat):
    """The objects of `/v1/chat/completions`."""

    prefix, kinds = "chatcmpl", ("chat.completion", "chat.completion.chunk")

    def opening(self) -> bytes:
        role = {"delta": {"role": "assistant", "content": None}}
        return b"".join(self._frame(choice.index, role) for choice in self.choices)

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = [
            {
                **self._token(token.id, token.logprob),
                "top_logprobs": [self._token(*top) for top in zip(*token.top, strict=True)],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = self._token_bytes[token_id]
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": logprob, "bytes": list(raw)}


def event_stream(frames: AsyncIterator[bytes]) -> Response:
    """Return a stream of frames, with pings."""
    return EventSourceResponse(
        frames,
        headers={"Cache-Control": "no-cache, no-transform"},
        ping=PING_S,
        ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
    )


async def events(form: CompletionFormat, generation: Generation) -> AsyncIterator[bytes]:
    """Yield the frames of a stream; an error during generation is a frame at its end."""
    yield form.opening()
    try:
        async for pieces in generation:
            frames = []
            for piece in pieces:
                frames.append(form.frames(piece))
                if len(frames[-1]) > LONG_BYTES:
                    await asyncio.sleep(0)
            yield b"".join(frames)
        yield form.closing(generation.usage())
    except ApiError as error:
        yield form.failure(error)


async def whole(form: CompletionFormat, answers: Sequence[Piece], usage: dict[str, Any]) -> bytes:
    """Return answers as one JSON object, yielding to the event loop after each."""
    before, _, after = to_json(form.envelope([TEXT], usage)).rpartition(to_json(TEXT))
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
