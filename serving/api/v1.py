"""The OpenAI API: models, chat completions and completions."""

from fastapi import APIRouter, Request, Response

from serving.api import chat, completions
from serving.api.call import Call, json_response
from serving.api.models import describe

router = APIRouter()
router.include_router(chat.router)
router.include_router(completions.router)


@router.get("/models")
async def models(request: Request) -> Response:
    """List the models."""
    listed = [describe(model) for model in request.app.state.client.models()]
    return json_response({"object": "list", "data": listed})


@router.get("/models/{model_id:path}")
async def model(request: Request, model_id: str) -> Response:
    """Describe a model, which is loaded for it."""
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
    return json_response({**describe(call.catalogue.find(model_id)), **about})
