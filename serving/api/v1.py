"""The OpenAI API: models, chat completions and completions."""

from typing import Any

from fastapi import APIRouter, Request, Response

from serving.api import chat, completions
from serving.api.call import Call, json_response
from serving.engine.messages import ModelInfo

router = APIRouter()
router.include_router(chat.router)
router.include_router(completions.router)


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
