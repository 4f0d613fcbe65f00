"""The routes of the OpenAI API, and others that compute: labels, tokens, predictions."""

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from nanogpt.detokenizer import Detokenizer
from serving.api.call import Call, check_count, json_response
from serving.api.decisions import class_probabilities
from serving.api.errors import ApiError
from serving.api.generation import Choice, Piece, Prompt, tokens_of
from serving.api.models import ServedModel
from serving.api.schemas import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    Function,
    PredictRequest,
    TokenizeRequest,
)
from serving.api.stream import STREAMS, ChatFormat, CompletionFormat
from serving.api.structured import grammar_of
from serving.api.tools import CallFormat, functions_to_call
from serving.engine.messages import Embed, Embedded, ModelInfo, Score, Task, Tokens

DEFAULT_TOKENS = 16  # of a completion, as the OpenAI API's
PREDICTED_TOKENS = 100
CAPABILITIES: dict[Task | None, tuple[str, ...]] = {
    "generate": ("chat", "completion", "structured_output", "tools", "embeddings", "choice"),
    "classify": ("classification", "embeddings", "choice"),
    None: (),
}

router = APIRouter()


@router.post("/chat/completions", responses=STREAMS)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Reply to a conversation."""
    call = Call(request)
    model = await call.language_model(body)
    functions = functions_to_call(body)
    choices = await chat_choices(call, model, body, functions)
    form = ChatFormat(model, choices, body.include_usage)
    if functions:
        form = CallFormat(model, choices, body)
    return await call.answer(form, body.stream)


@router.post("/completions", responses=STREAMS)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue one text or several."""
    call = Call(request)
    model = await call.language_model(body)
    choices = await _completion_choices(call, model, body)
    return await call.answer(CompletionFormat(model, choices, body.include_usage), body.stream)


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


@router.post("/embeddings")
async def embeddings(request: Request, body: EmbeddingsRequest) -> Response:
    """Return the embedding of each text: the mean of its final hidden states, of length 1."""
    call = Call(request)
    model = await call.load(body.model, "generate")
    width = model.details.n_embd
    if body.dimensions not in (None, width):
        message = f"The embeddings of {model.id!r} have {width} dimensions; leave dimensions out."
        raise ApiError(400, message, param="dimensions")
    texts = _listed(body.input)
    if not texts or not all(texts):
        raise ApiError(400, "There is no text, or an empty one; leave it out.", param="input")
    prompts = [await _prompt(model, text, 0, "input") for text in texts]
    requests = [Embed(call.new_id(), model.id, p.ids, **call.labels) for p in prompts]
    vectors = [answer.vector for answer in await call.answers(requests, Embedded)]
    in_text, unpack = body.encoding_format == "base64", struct.Struct(f"<{width}f").unpack
    spelt = [base64.b64encode(v).decode() if in_text else unpack(v) for v in vectors]
    data = [{"object": "embedding", "index": i, "embedding": own} for i, own in enumerate(spelt)]
    n = sum(len(prompt.ids) for prompt in prompts)
    usage = {"prompt_tokens": n, "total_tokens": n}
    return json_response({"object": "list", "data": data, "model": model.id, "usage": usage})


@router.post("/predict")
async def predict(request: Request, body: PredictRequest) -> Response:
    """Return the label of a text, or a language model's answer to it."""
    call = Call(request)
    model = await call.load(body.model, "classify")
    if model.details.labels:
        data, _ = await class_probabilities(call, model, [body.input_data])
        return json_response({"prediction": data[0]["label"]})
    return json_response({"prediction": await _answer(call, model, body)})


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """Return the token ids of a text, or of a conversation with the assistant's turn opened.

    Raises ApiError for a body with neither.
    """
    chats = bool(body.messages)
    model = await Call(request).load(body.model, "generate" if chats else None)
    text = body.content if body.prompt is None else body.prompt
    if body.messages:
        ids = await model.encode_chat(body)
    elif text is not None:
        ids = await model.encode(text, add_special_tokens=body.add_special_tokens)
    else:
        raise ApiError(400, "Give a text as prompt, or messages.", param="prompt")
    length = model.details.block_size
    return json_response({"tokens": ids, "count": len(ids), "max_model_len": length})


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """Return the text of token ids."""
    model = await Call(request).load(body.model)
    model.check_ids(body.tokens, "tokens")
    text = model.tokenizer.decode(body.tokens)
    return json_response({"prompt": text, "content": text})


async def chat_choices(
    call: Call, model: ServedModel, body: ChatRequest, functions: Sequence[Function] = ()
) -> list[Choice]:
    """Return the answers to generate: texts, or calls of one of `functions`."""
    ids = await model.encode_chat(body)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    prompt = Prompt(ids, model.room_for(ids, limit, "messages"))
    stop_ids = model.template.stop_ids(model.tokenizer)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    grammar = await call.within(call.limits(), grammar_of(body, functions))
    stops = () if grammar else model.template.stop_texts  # which may occur in its texts
    return call.choices(body, model, [prompt], stop_ids, stops, logprobs, grammar)


async def _completion_choices(
    call: Call, model: ServedModel, body: CompletionRequest
) -> list[Choice]:
    """Return the answers to generate; raises ApiError for too many prompts and for empty ones."""
    texts = _listed("" if body.prompt is None else body.prompt)
    n = body.n or 1
    check_count("prompt", len(texts), call.max_prompts(n), f"prompts (of n={n} answers)")
    if body.add_special_tokens is False and not all(texts):
        raise ApiError(400, "A prompt is empty, and add_special_tokens is false.", param="prompt")
    max_tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    prompts = []
    for text in texts:
        prompt = await _prompt(model, text, max_tokens, "prompt", body.add_special_tokens)
        if body.echo:
            echoed = text if isinstance(text, str) else model.tokenizer.decode(prompt.ids)
            prompt.echo = Piece(0, echoed)
        prompts.append(prompt)
    if body.echo and body.logprobs is not None:
        await _score(call, model, prompts, body.logprobs)
    grammar = await call.within(call.limits(), grammar_of(body))
    return call.choices(body, model, prompts, model.tokenizer.end_ids, (), body.logprobs, grammar)


def _listed(given: Any) -> list[str | list[int]]:
    """Return the prompts of a field that is one prompt or several."""
    several = isinstance(given, list) and not (given and isinstance(given[0], int))
    return given if several else [given]


async def _prompt(
    model: ServedModel,
    text: str | list[int],
    max_tokens: int,
    param: str,
    add_special_tokens: bool | None = None,
) -> Prompt:
    """Return a prompt of text or token ids; raises ApiError where it does not fit the context."""
    if isinstance(text, str):
        model.check_chars(len(text), param)
        ids = await model.encode(text, add_special_tokens=add_special_tokens)
    else:
        ids = text or await model.encode("")
    prompt = Prompt(ids, model.room_for(ids, max_tokens, param))
    model.check_ids(ids, param)
    return prompt


async def _score(call: Call, model: ServedModel, prompts: Sequence[Prompt], top: int) -> None:
    """Add log-probabilities to the echoes of prompts."""
    scores = [Score(call.new_id(), model.id, p.ids, top, **call.labels) for p in prompts]
    for prompt, scored in zip(prompts, await call.answers(scores, Tokens), strict=True):
        assert prompt.echo is not None
        detokenizer = Detokenizer(model.token_bytes)
        detokenizer.feed(prompt.ids)
        prompt.echo.tokens = tokens_of(prompt.ids, detokenizer.starts, scored.logprobs or [])
        await asyncio.sleep(0)


async def _answer(call: Call, model: ServedModel, body: PredictRequest) -> str:
    """Return the reply to a message, or the continuation of a text for a base model."""
    limit = PREDICTED_TOKENS if body.max_tokens is None else body.max_tokens
    shared: Any = {"max_tokens": limit, "temperature": body.temperature, "seed": body.seed}
    try:
        if model.details.template:
            message = ChatMessage(role="user", content=body.input_data)
            choices = await chat_choices(call, model, ChatRequest(messages=[message], **shared))
        else:
            completion = CompletionRequest(prompt=body.input_data, **shared)
            choices = await _completion_choices(call, model, completion)
    except ApiError as error:
        error.param = "input_data"
        raise
    (answer,) = await call.within((), call.generation(choices).whole())
    return answer.text


def _describe(info: ModelInfo) -> dict[str, Any]:
    """Return a model as `/v1/models` lists it."""
    return {
        "id": info.id,
        "object": "model",
        "created": info.created,
        "max_model_len": info.max_model_len,
        "owned_by": "nanogpt",
        "name": info.name or info.id,
        "capabilities": CAPABILITIES[info.task],
        "aliases": info.aliases,
        "default": None in info.default_for,
        "loaded": info.loaded,
        **({"error": info.error} if info.error else {}),
    }
