"""The route that answers with the probabilities of a classifier's labels."""

import secrets
import time
from typing import Any

from fastapi import APIRouter, Request, Response

from serving.api.call import Call, check_count, json_response
from serving.api.models import ServedModel
from serving.api.schemas import ClassifyRequest
from serving.engine.messages import Classified, Classify

router = APIRouter()


@router.post("/classify")
async def classify(request: Request, body: ClassifyRequest) -> Response:
    """Return the label of each text, and how probable each label is."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    call = Call(request)
    model = await call.load(body.model, "classify")
    data, n = await class_probabilities(call, model, texts)
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


async def class_probabilities(
    call: Call, model: ServedModel, texts: list[str]
) -> tuple[list[dict[str, Any]], int]:
    """Return the label and the probabilities of each text, and the number of tokens."""
    model.check_task("classify")
    check_count("input", len(texts), call.max_prompts(), "texts")
    limit, labels = model.details.block_size, model.details.labels or []
    ids = [(await model.encode(text, add_special_tokens=False))[:limit] for text in texts]
    requests = [Classify(call.new_id(), model.id, text, **call.labels) for text in ids]
    answers = await call.answers(requests, Classified)
    data = [
        {
            "index": index,
            "label": labels[answer.probabilities.index(max(answer.probabilities))],
            "probs": answer.probabilities,
            "num_classes": len(labels),
            "probabilities": dict(zip(labels, answer.probabilities, strict=True)),
        }
        for index, answer in enumerate(answers)
    ]
    return data, sum(answer.n_tokens for answer in answers)
