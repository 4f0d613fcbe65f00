"""The route of completions, and their JSON."""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from nanogpt.detokenizer import Detokenizer
from serving.api.call import Call
from serving.api.errors import ApiError
from serving.api.generation import Piece, Prompt, Token, tokens_of
from serving.api.models import ServedModel
from serving.api.sampling import params_of, room_for
from serving.api.schemas import CompletionRequest
from serving.api.stream import STREAMS, Format
from serving.engine.messages import Score, Scored

DEFAULT_TOKENS = 16  # the OpenAI API's

router = APIRouter()


@router.post("/completions", responses=STREAMS)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue one text or several; raises ApiError for a suffix."""
    if body.suffix:
        raise ApiError(400, "suffix is not supported: these models only continue.", param="suffix")
    call = Call(request)
    model = await call.language_model(body)
    prompts = await _prompts(body, model, call.max_prompts(body.n or 1))
    params = params_of(body, model, stop_ids=[model.tokenizer.eot_id], logprobs=body.logprobs)
    if body.echo and body.logprobs is not None:
        await _score(call, model, prompts, body.logprobs)
    return await call.answer(body, model, prompts, params, body.stops, CompletionFormat)


class CompletionFormat(Format):
    """The objects of `/v1/completions`."""

    prefix, kinds = "cmpl", ("text_completion", "text_completion")

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    message = delta

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

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


async def _prompts(body: CompletionRequest, model: ServedModel, limit: int) -> list[Prompt]:
    """Return the prompts, one or several, given as texts or as ids."""
    given: Any = "" if body.prompt is None else body.prompt
    several = isinstance(given, list) and not (given and isinstance(given[0], int))
    prompts = given if several else [given]
    if not 1 <= len(prompts) <= limit:
        with_n = f", with n={body.n}" if body.n else ""
        message = f"There are {len(prompts)} prompts{with_n}; give 1 to {limit} of them."
        raise ApiError(400, message, param="prompt")
    if body.add_special_tokens is False and not all(prompts):
        raise ApiError(400, "A prompt is empty, and add_special_tokens is false.", param="prompt")
    max_tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    return [await _prompt(prompt, max_tokens, model, body) for prompt in prompts]


async def _prompt(
    given: str | list[int], max_tokens: int, model: ServedModel, body: CompletionRequest
) -> Prompt:
    if isinstance(given, str):
        model.check_chars(len(given), "prompt")
        ids = await model.encode(given, add_special_tokens=body.add_special_tokens)
    else:
        ids = given or await model.encode("")
    prompt = Prompt(ids, room_for(ids, max_tokens, model, "prompt"))
    model.check_ids(ids, "prompt")
    if body.echo:
        text = given if isinstance(given, str) else model.tokenizer.decode(ids)
        prompt.echo = Piece(0, text)
    return prompt


async def _score(call: Call, model: ServedModel, prompts: Sequence[Prompt], top: int) -> None:
    """Add log-probabilities to the echoes of prompts."""
    scores = [Score(call.new_id(), model.id, p.ids, top, **call.labels) for p in prompts]
    answers = await call.gather([call.client.answer(score, Scored) for score in scores])
    for prompt, scored in zip(prompts, answers, strict=True):
        assert prompt.echo is not None
        detokenizer = Detokenizer(model.token_bytes)
        detokenizer.feed(prompt.ids)
        logprobs = (scored.logprobs, scored.top_ids, scored.top_logprobs)
        prompt.echo.tokens = tokens_of(prompt.ids, detokenizer.starts, *logprobs)
        await asyncio.sleep(0)
