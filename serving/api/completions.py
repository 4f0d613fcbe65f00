"""Completions of texts: how they are continued, and how that is written."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from serving.api.errors import ApiError
from serving.api.front_end import front_end
from serving.api.generation import Choice, Piece, Token, echo_of
from serving.api.models import ServedModel
from serving.api.sampling import each, params_of, room_for
from serving.api.schemas import CompletionRequest
from serving.api.stream import STREAMS, TEXT, Format, TextFrames, answer_head, frame
from serving.engine.messages import Score, Scored

DEFAULT_TOKENS = 16  # the OpenAI API's

router = APIRouter()


@dataclass
class Prompt:
    """A text to continue by `max_tokens`; `echo` is what its answers begin with."""

    ids: list[int]
    text: str
    max_tokens: int
    echo: Piece | None = None


@router.post("/completions", responses=STREAMS)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue one text or several."""
    if body.suffix:
        raise ApiError(400, "suffix is not supported: these models only continue.", param="suffix")
    front = front_end(request)
    model = await front.language_model(request, body)
    prompts = await _prompts(body, model, front.most_prompts(body.n or 1))
    params = params_of(body, model, stop_ids=[model.tokenizer.eot_id], logprobs=body.logprobs)
    if body.echo:
        await _echo(request, body, model, prompts)
    choices: list[Choice] = []
    for prompt in prompts:
        for p in each(params, body, prompt.max_tokens):
            said = (request, model, prompt.ids, p, body.stops)
            choices.append(front.choice(*said, index=len(choices), echo=prompt.echo))
    head = answer_head("cmpl", model)
    form = CompletionFormat(
        head,
        len(choices),
        model.token_bytes,
        with_logprobs=body.logprobs is not None,
        include_usage=body.include_usage,
    )
    return await front.answer(request, body, choices, form)


class CompletionFormat(Format):
    """The objects of `/v1/completions`."""

    def __init__(
        self, head: dict[str, Any], n: int, token_bytes: Sequence[bytes], **options: bool
    ) -> None:
        kinds = ("text_completion", "text_completion")
        super().__init__(head, n, token_bytes, kinds=kinds, **options)
        self._texts = [TextFrames(self._chunk(i, TEXT)) for i in range(n)]

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

    def choice(self, answer: Piece) -> dict[str, Any]:
        """Return a whole answer."""
        logprobs = self._logprobs(answer.tokens) if self._with_logprobs else None
        return self._choice(answer.index, answer.text, logprobs, answer.finish_reason)

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        return {**self._chunk_head, "choices": [self._choice(index, text, logprobs, finish_reason)]}

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
        top = {self._name(i): logprob for i, logprob in zip(*token.top, strict=True)}
        return {**top, self._name(token.id): token.logprob}

    def _name(self, token_id: int) -> str:
        """Return a token's text, or its bytes where they are no text (`bytes:\\xe2\\x80`)."""
        raw = self._token_bytes[token_id]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


async def _prompts(body: CompletionRequest, model: ServedModel, most: int) -> list[Prompt]:
    """Return the prompts, one or several, as texts or as ids."""
    given: Any = "" if body.prompt is None else body.prompt
    several = isinstance(given, list) and not (given and isinstance(given[0], int))
    prompts = given if several else [given]
    if not 1 <= len(prompts) <= most:
        with_n = f", with n={body.n}" if body.n else ""
        message = f"There are {len(prompts)} prompts{with_n}; give 1 to {most} of them."
        raise ApiError(400, message, param="prompt")
    wanted = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    if body.add_special_tokens is False and not all(prompts):
        raise ApiError(400, "A prompt is empty, and add_special_tokens is false.", param="prompt")
    return [await _prompt(prompt, wanted, model, body.add_special_tokens) for prompt in prompts]


async def _prompt(
    given: str | list[int], wanted: int, model: ServedModel, add_special_tokens: bool | None
) -> Prompt:
    if isinstance(given, str):
        model.check_chars(len(given), "prompt")
        ids = await model.encode(given, add_special_tokens=add_special_tokens)
        return Prompt(ids, given, room_for(ids, wanted, model, "prompt"))
    ids = given or await model.encode("")
    max_tokens = room_for(ids, wanted, model, "prompt")
    model.check_ids(ids, "prompt")
    return Prompt(ids, model.tokenizer.decode(ids), max_tokens)


async def _echo(
    request: Request, body: CompletionRequest, model: ServedModel, prompts: Sequence[Prompt]
) -> None:
    """Let answers begin with their prompts, with log-probabilities where they were requested."""
    front, top = front_end(request), body.logprobs
    scores: Sequence[Scored | None] = [None] * len(prompts)
    if top is not None:
        labels = front.labels(request)
        asked = [Score(front.new_id(request), model.id, p.ids, top, **labels) for p in prompts]
        scores = await front.ask(request, [front.client.score(score) for score in asked])
    for prompt, scored in zip(prompts, scores, strict=True):
        prompt.echo = echo_of(prompt.text, prompt.ids, model.token_bytes, scored)
        await asyncio.sleep(0)
