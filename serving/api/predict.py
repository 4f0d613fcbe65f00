"""Routes that the OpenAI API lacks: classification, tokenization and a plain prediction."""

import secrets
import time

from fastapi import APIRouter, Request, Response

from serving.api.call import Call, json_response
from serving.api.errors import ApiError
from serving.api.generation import Prompt
from serving.api.models import ServedModel
from serving.api.schemas import (
    ChatMessage,
    ClassifyRequest,
    DetokenizeRequest,
    PredictRequest,
    SamplingRequest,
    TokenizeRequest,
)
from serving.engine.messages import Classified, Classify

PREDICTED_TOKENS = 100

router = APIRouter()


@router.post("/classify")
async def classify(request: Request, body: ClassifyRequest) -> Response:
    """Return the label of each text, and how probable each label is."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    call = Call(request)
    model = await call.load(body.model, "classify")
    answers = await _classified(call, model, texts)
    labels = model.details.labels or []
    data = [
        {
            "index": index,
            "label": _likeliest(model, answer),
            "probs": answer.probabilities,
            "num_classes": len(labels),
            "probabilities": dict(zip(labels, answer.probabilities, strict=True)),
        }
        for index, answer in enumerate(answers)
    ]
    n = sum(answer.n_tokens for answer in answers)
    return json_response(
        {
            "id": f"classify-{secrets.token_hex(12)}",
            "object": "list",
            "created": int(time.time()),
            "model": model.id,
            "data": data,
            "usage": {"prompt_tokens": n, "completion_tokens": 0, "total_tokens": n},
        }
    )


@router.post("/predict")
async def predict(request: Request, body: PredictRequest) -> Response:
    """Return the label of a text, or a language model's answer to it."""
    call = Call(request)
    model = await call.load(body.model, "classify")
    if model.details.labels:
        (answer,) = await _classified(call, model, [body.input_data])
        return json_response({"prediction": _likeliest(model, answer)})
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
        ids = await model.encode_chat(
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
        )
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


def _likeliest(model: ServedModel, answer: Classified) -> str:
    assert model.details.labels is not None
    return model.details.labels[answer.probabilities.index(max(answer.probabilities))]


async def _classified(call: Call, model: ServedModel, texts: list[str]) -> list[Classified]:
    model.check_task("classify")
    if not 1 <= len(texts) <= call.max_prompts():
        message = f"There are {len(texts)} texts; give 1 to {call.max_prompts()} of them."
        raise ApiError(400, message, param="input")
    limit = model.details.block_size
    ids = [(await model.encode(text, add_special_tokens=False))[:limit] for text in texts]
    requests = [Classify(call.new_id(), model.id, text, **call.labels) for text in ids]
    return await call.gather([call.client.answer(text, Classified) for text in requests])


async def _answer(call: Call, model: ServedModel, body: PredictRequest) -> str:
    """Return the reply to a message, or the continuation of a text for a base model."""
    template = model.template if model.details.template else None
    model.check_chars(len(body.input_data), "input_data")
    if template:
        ids = await model.encode_chat([ChatMessage(role="user", content=body.input_data)])
    else:
        ids = await model.encode(body.input_data)
    limit = PREDICTED_TOKENS if body.max_tokens is None else body.max_tokens
    prompt = Prompt(ids, model.room_for(ids, limit, "input_data"))
    sampling = SamplingRequest(temperature=body.temperature, seed=body.seed)
    stop_ids = template.stop_ids(model.tokenizer) if template else [model.tokenizer.eot_id]
    stops = template.stop_texts if template else ()
    generation = call.generation(call.choices(sampling, model, [prompt], stop_ids, stops))
    try:
        return (await call.until_disconnect(generation.whole()))[0].text
    finally:
        await generation.close()
