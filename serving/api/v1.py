"""The OpenAI API: models, chat completions and completions."""

import asyncio
import secrets
import time
from collections.abc import Sequence
from typing import Any, cast

from fastapi import APIRouter, Request, Response

from serving.api.chat import ChatFormat
from serving.api.completions import CompletionFormat
from serving.api.errors import ApiError
from serving.api.front_end import FrontEnd, front_end, json_response, unless_left
from serving.api.generation import Choice, echo_of
from serving.api.models import ServedModel, describe
from serving.api.sampling import params_of, room_for
from serving.api.schemas import ChatRequest, CompletionRequest, SamplingRequest
from serving.api.stream import Format
from serving.engine.messages import Generate, Score, Scored

DEFAULT_COMPLETION_TOKENS = 16  # the OpenAI API's

STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

router = APIRouter()


@router.get("/models")
async def models(request: Request) -> Response:
    """List the models."""
    listed = [describe(model) for model in front_end(request).client.models()]
    return json_response({"object": "list", "data": listed})


@router.get("/models/{model_id:path}")
async def model(request: Request, model_id: str) -> Response:
    """Describe a model, which is loaded for it."""
    front = front_end(request)
    served = await front.catalogue.load(model_id)
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
    return json_response({**describe(front.catalogue.find(model_id)), **about})


@router.post("/chat/completions", responses=STREAMS)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    front = front_end(request)
    model = await _language_model(request, body)
    if body.response_format and body.response_format.type != "text":
        message = f"response_format {body.response_format.type[:40]!r} is not supported; use text."
        raise ApiError(400, message, param="response_format")
    ids = await model.encode_chat(body.messages)
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = params_of(
        body,
        model,
        max_tokens=room_for(ids, wanted, model, "messages"),
        stop_ids=model.template.stop_ids(model.tokenizer),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    stops = [*_stops(front, body), *model.template.stop_texts]
    scope = request.state.key
    choices = [
        Choice(
            index,
            Generate(front.client.new_id(), model.id, ids, p, scope),
            model.token_bytes,
            stops,
        )
        for index, p in enumerate(params)
    ]
    form = ChatFormat(
        _head("chatcmpl", model), len(choices), model.token_bytes, with_logprobs=bool(body.logprobs)
    )
    return await _answer(request, body, model, choices, form)


@router.post("/completions", responses=STREAMS)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue one text or several."""
    front = front_end(request)
    model = await _language_model(request, body)
    if body.suffix:
        raise ApiError(400, "suffix is not supported: these models only continue.", param="suffix")
    prompts = await _prompts(front, body, model)
    scores = await _scores(request, body, model, [ids for ids, _ in prompts])
    choices: list[Choice] = []
    for (ids, text), scored in zip(prompts, scores, strict=True):
        choices += _continuations(request, body, model, ids, text, scored, len(choices))
    form = CompletionFormat(
        _head("cmpl", model),
        len(choices),
        model.token_bytes,
        with_logprobs=body.logprobs is not None,
    )
    return await _answer(request, body, model, choices, form)


async def _answer(
    request: Request,
    body: SamplingRequest,
    model: ServedModel,
    choices: Sequence[Choice],
    form: Format,
) -> Response:
    front = front_end(request)
    if front.settings.log_prompts:
        prompts = [model.tokenizer.decode(choice.request.prompt_ids) for choice in choices]
        request.state.log["prompts"] = list(dict.fromkeys(prompts))
    return await front.answer(request, body, choices, form)


def _continuations(
    request: Request,
    body: CompletionRequest,
    model: ServedModel,
    ids: list[int],
    text: str,
    scored: Scored | None,
    first_index: int,
) -> list[Choice]:
    """Return the `n` answers wanted to one prompt."""
    front = front_end(request)
    wanted = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    params = params_of(
        body,
        model,
        max_tokens=room_for(ids, wanted, model, "prompt"),
        stop_ids=[model.tokenizer.eot_id],
        logprobs=body.logprobs,
    )
    stops = _stops(front, body)
    return [
        Choice(
            index,
            Generate(front.client.new_id(), model.id, ids, p, request.state.key),
            model.token_bytes,
            stops,
            echo_of(index, text, ids, model.token_bytes, scored) if body.echo else None,
        )
        for index, p in enumerate(params, first_index)
    ]


async def _scores(
    request: Request, body: CompletionRequest, model: ServedModel, prompts: list[list[int]]
) -> Sequence[Scored | None]:
    """Return the log-probabilities of each prompt's own tokens, where they are echoed."""
    if not body.echo or body.logprobs is None:
        return [None] * len(prompts)
    client, top = front_end(request).client, body.logprobs
    asked = [Score(client.new_id(), model.id, ids, top) for ids in prompts]

    async def answered() -> list[Scored]:
        return await asyncio.gather(*map(client.score, asked))

    return await unless_left(request, answered())


async def _prompts(
    front: FrontEnd, body: CompletionRequest, model: ServedModel
) -> list[tuple[list[int], str]]:
    """Return the ids and the text of each prompt; a text begins a document, ids are as given."""
    prompt: Any = "" if body.prompt is None else body.prompt
    several = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
    prompts = prompt if several else [prompt]
    if not 1 <= len(prompts) <= front.settings.max_prompts:
        most = front.settings.max_prompts
        message = f"There are {len(prompts)} prompts; give 1 to {most} of them."
        raise ApiError(400, message, param="prompt")
    found = []
    for one in prompts:
        if isinstance(one, str):
            found.append((await model.encode_document(one), one))
            continue
        model.check_ids(one, "prompt")
        found.append(
            (cast(list[int], one) or [model.tokenizer.eot_id], model.tokenizer.decode(one))
        )
    return found


async def _language_model(request: Request, body: SamplingRequest) -> ServedModel:
    front = front_end(request)
    if body.n is not None and body.n > front.settings.max_n:
        raise ApiError(400, f"n={body.n} is more than {front.settings.max_n}.", param="n")
    model = await front.catalogue.load(body.model)
    request.state.log["model"] = model.id
    model.check_generates()
    return model


def _stops(front: FrontEnd, body: SamplingRequest) -> list[str]:
    if len(body.stops) > front.settings.max_stops:
        message = f"There are {len(body.stops)} stop strings; at most {front.settings.max_stops}."
        raise ApiError(400, message, param="stop")
    return [stop for stop in body.stops if stop]


def _head(prefix: str, model: ServedModel) -> dict[str, Any]:
    """Return what every object of an answer begins with."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": "",  # the format's
        "created": int(time.time()),
        "model": model.id,
        "system_fingerprint": model.fingerprint,
    }
