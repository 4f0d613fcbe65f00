"""Completions of a text: how they are written."""

from collections.abc import Sequence
from typing import Any

from serving.api.generation import Piece, Token
from serving.api.stream import TEXT, TextFrames, frame


class CompletionFormat:
    """The objects of `/v1/completions`; all of one answer share `head`: id, time, model."""

    def __init__(
        self,
        head: dict[str, Any],
        n: int,
        token_bytes: Sequence[bytes],
        *,
        with_logprobs: bool,
    ) -> None:
        self._head = {**head, "object": "text_completion"}
        self._token_bytes = token_bytes
        self._with_logprobs = with_logprobs
        self._texts = [TextFrames(self._chunk(i, TEXT)) for i in range(n)]

    def opening(self) -> bytes:
        """Return nothing: a completion begins with its text."""
        return b""

    def frames(self, piece: Piece) -> bytes:
        """Return a frame with the text, and one with the reason why it ends."""
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        if logprobs is not None:
            content = frame(self._chunk(piece.index, piece.text, logprobs))
        else:
            content = self._texts[piece.index].render(piece.text) if piece.text else b""
        if piece.finish_reason is None:
            return content
        return content + frame(self._chunk(piece.index, "", None, piece.finish_reason))

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the frame with the usage."""
        return frame({**self._head, "choices": [], "usage": usage})

    def whole(self, answers: list[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the answers as one object."""
        choices = [
            self._choice(
                answer.index,
                answer.text,
                self._logprobs(answer.tokens) if self._with_logprobs else None,
                answer.finish_reason,
            )
            for answer in answers
        ]
        return {**self._head, "choices": choices, "usage": usage}

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        return {**self._head, "choices": [self._choice(index, text, logprobs, finish_reason)]}

    def _choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """Return the likeliest tokens and the chosen one; None where nothing is known."""
        if token.logprob is None:
            return None
        top = {self._name(i): logprob for i, logprob in token.top}
        return {**top, self._name(token.id): token.logprob}

    def _name(self, token_id: int) -> str:
        """Return a token's text, or its bytes where they are no text (`bytes:\\xe2\\x80`)."""
        raw = self._token_bytes[token_id]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
