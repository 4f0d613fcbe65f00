"""The routes of the OpenAI API: models, chat completions and completions."""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from nanogpt.detokenizer import Detokenizer
from serving.api.call import Call, json_response
from serving.api.errors import ApiError
from serving.api.generation import Piece, Prompt, Token, tokens_of
from serving.api.models import ServedModel
from serving.api.schemas import ChatRequest, CompletionRequest
from serving.api.stream import STREAMS, Format
from serving.engine.messages import ModelInfo, Score, Scored

DEFAULT_TOKENS = 16  # of a completion, as the OpenAI API's

router = APIRouter()


@router.post("/chat/completions", responses=STREAMS)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Reply to a conversation."""
    call = Call(request)
    model = await call.language_model(body)
    ids = await model.encode_chat(
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        to_answer=True,
    )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    prompt = Prompt(ids, model.room_for(ids, limit, "messages"))
    template = model.template
    stop_ids, stops = template.stop_ids(model.tokenizer), template.stop_texts
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return await call.answer(body, model, [prompt], stop_ids, stops, logprobs, ChatFormat)


@router.post("/completions", responses=STREAMS)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue one text or several."""
    call = Call(request)
    model = await call.language_model(body)
    prompts = await _prompts(body, model, call.max_prompts(body.n or 1))
    if body.echo and body.logprobs is not None:
        await _score(call, model, prompts, body.logprobs)
    stop_ids = [model.tokenizer.eot_id]
    return await call.answer(body, model, prompts, stop_ids, (), body.logprobs, CompletionFormat)


@router.get("/models")
async def models(request: Request) -> Response:
    """List the models."""
    listed = [_describe(model) for model in request.app.state.client.models()]
    return json_response({"object": "list", "data": listed})


@router.get("/models/{model_id:path}")
async def model(request: Request, model_id: str) -> Response:
    """Load a model and describe it."""
    if not model_id:
        return await models(request)
    call = Call(request)
    served = await call.load(model_id)
    details = served.details
    about = {
        "stage": details.stage,
        "step": details.step,
        "max_model_len": details.block_size,
        "vocab_size": details.vocab_size,
        "parameters": details.n_params,
        "dtype": details.dtype,
        "template": served.template.name,
        "labels": details.labels,
    }
    return json_response({**_describe(call.catalogue.find(model_id)), **about})


class ChatFormat(Format):
    """The objects of `/v1/chat/completions`."""

    prefix, kinds = "chatcmpl", ("chat.completion", "chat.completion.chunk")

    def opening(self) -> bytes:
        role = {"delta": {"role": "assistant", "content": None}}
        return b"".join(self._frame(index, role) for index in range(self._n))

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
    prompt = Prompt(ids, model.room_for(ids, max_tokens, "prompt"))
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
        prompt.echo.tokens = tokens_of(prompt.ids, detokenizer.starts, scored)
        await asyncio.sleep(0)


def _describe(info: ModelInfo) -> dict[str, Any]:
    """Return a model as `/v1/models` lists it."""
    return {
        "id": info.id,
        "object": "model",
        "created": info.created,
        "max_model_len": info.max_model_len,
        "owned_by": "nanogpt",
        "name": info.name or info.id,
        "aliases": info.aliases,
        "default": info.default,
        "loaded": info.loaded,
        **({"error": info.error} if info.error else {}),
    }
