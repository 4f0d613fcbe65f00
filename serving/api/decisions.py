"""The routes that answer with probabilities: of a classifier's labels, or of given options."""

import json
import math
import secrets
import time
from typing import Any

from fastapi import APIRouter, Request, Response

from nanogpt.tokenizer import well_formed
from serving.api.call import Call, check_count, json_response
from serving.api.errors import ApiError
from serving.api.models import ServedModel
from serving.api.schemas import (
    ChatMessage,
    ChoiceQuestion,
    ClassifyRequest,
    Content,
    SystemOneRequest,
    TokenizeRequest,
)
from serving.engine.messages import Classified, Classify, Score, Tokens

MAX_OPTIONS = 1024  # of a request to a language model, each of which is scored with its prompt

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


@router.post("/systemone")
async def systemone(request: Request, body: SystemOneRequest) -> Response:
    """Return the probability of each option of questions about a state.

    The options of a classifier are its labels; those of a language model are weighed by their
    log-likelihood after the prompt. The format is that of https://api.typesafe.ai/openapi.json.
    """
    call = Call(request)
    model = await call.load(body.model, "classify")
    if (labels := model.details.labels) is None:
        answers, n = await _log_likelihoods(call, model, body)
    else:
        for name, question in body.questions.items():
            if question.criteria.keys() != set(labels):
                use = f"are not the labels of the classifier {model.id!r}; use {', '.join(labels)}"
                raise ApiError(400, f"The options of {name!r} {use}.", param="questions")
        (found,), n = await class_probabilities(call, model, [_text(body.state)])
        answers = {name: _answer(found["probabilities"]) for name in body.questions}
    usage = {"input_tokens": n, "output_tokens": 0}
    return json_response({"model": model.id, "answers": answers, "usage": usage})


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


async def _log_likelihoods(
    call: Call, model: ServedModel, body: SystemOneRequest
) -> tuple[dict[str, Any], int]:
    """Return a language model's answers, with the log-likelihood of each option in nats.

    Raises ApiError for too many options, those without tokens or with the same, or too long ones.
    """
    n_options = sum(len(question.criteria) for question in body.questions.values())
    check_count("questions", n_options, MAX_OPTIONS, "options")
    scores: list[Score] = []
    for name, question in body.questions.items():
        prompt = await _prompt(model, body.state, question)
        distinct = {tuple(prompt)}
        for option in question.criteria:
            model.check_chars(len(option), "questions")
            ids = prompt + await model.encode(option, add_special_tokens=False)
            model.room_for(ids, 0, "questions")
            distinct.add(tuple(ids))
            scores.append(Score(call.new_id(), model.id, ids, start=len(prompt), **call.labels))
        if len(distinct) <= len(question.criteria):
            what = f"Two options of {name!r} have the same tokens, or one has none; leave it out."
            raise ApiError(400, what, param="questions")
    scored, answers = iter(await call.answers(scores, Tokens)), {}
    for name, question in body.questions.items():
        rows = {option: next(scored).logprobs or [] for option in question.criteria}
        sums = {option: math.fsum(row[0] or 0.0 for row in rows[option]) for option in rows}
        weights = {option: math.exp(sums[option] - max(sums.values())) for option in sums}
        answers[name] = {
            **_answer({option: weights[option] / sum(weights.values()) for option in weights}),
            "logprobs": sums,
            "logprobs_per_byte": {o: sums[o] / len(well_formed(o).encode()) for o in sums},
        }
    return answers, sum(len(score.prompt_ids) for score in scores)


async def _prompt(model: ServedModel, state: Content, question: ChoiceQuestion) -> list[int]:
    """Return the ids before an option: a user's message with the answer opened, or a text."""
    lines = [_text(state), *([_text(question.instructions)] if question.instructions else [])]
    lines += [f"{option}: {_text(about)}" for option, about in question.criteria.items() if about]
    text = "\n".join(lines)
    model.check_chars(len(text), "state")
    if not model.details.template:
        return await model.encode(text if len(lines) == 1 else f"{text}\n")
    messages = [ChatMessage(role="user", content=text)]
    return await model.encode_chat(TokenizeRequest(messages=messages))


def _text(content: Content) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _answer(probabilities: dict[str, float]) -> dict[str, Any]:
    """Return an answer; its confidence is 0 where all options are equally probable, at most 1."""
    choice, even = max(probabilities, key=probabilities.__getitem__), 1 / len(probabilities)
    return {
        "type": "choice",
        "choice": choice,
        "confidence": max(0.0, (probabilities[choice] - even) / (1 - even)),
        "probabilities": probabilities,
    }
