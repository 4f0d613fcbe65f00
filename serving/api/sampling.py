"""From a request's fields to what the engine is asked: one set of parameters for each answer."""

import secrets
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from serving.api.errors import ApiError
from serving.api.models import ServedModel
from serving.api.schemas import SamplingRequest
from serving.engine.messages import SamplingParams

SEED_STEP = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: seeds of n answers are far apart
MASK = 2**64 - 1


def params_of(
    body: SamplingRequest, model: ServedModel, *, stop_ids: Sequence[int], logprobs: int | None
) -> SamplingParams:
    """Return what all answers to a request share; `each` adds their number of tokens and seeds.

    Raises ApiError for ids that the model lacks.
    """
    own_stops = body.stop_token_ids or []
    model.check_ids(own_stops, "stop_token_ids")
    return SamplingParams(
        max_tokens=0,
        temperature=_given(body.temperature, 1.0),
        top_k=min(body.top_k, model.details.vocab_size) if body.top_k and body.top_k > 0 else None,
        top_p=body.top_p,
        min_p=body.min_p,
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        logit_bias=_bias(body.logit_bias or {}, model),
        stop_ids=tuple(dict.fromkeys([*stop_ids, *own_stops])),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
    )


def each(params: SamplingParams, body: SamplingRequest, max_tokens: int) -> list[SamplingParams]:
    """Return the parameters of each of `n` answers to a prompt, which differ in the seed."""
    n = 1 if body.n is None else body.n
    return [replace(params, max_tokens=max_tokens, seed=seed) for seed in seeds(body.seed, n)]


def room_for(ids: Sequence[int], wanted: int | None, model: ServedModel, param: str) -> int:
    """Return how many tokens may follow a prompt: those wanted, at most to the end of the context.

    -1 is as many as fit. Raises ApiError where there is room for none.
    """
    room = model.details.block_size - len(ids)
    if wanted == 0 and room >= 0:
        return 0
    if room < 1:
        raise model.too_long(f"{len(ids)}", param)
    return room if wanted is None or wanted < 0 else min(wanted, room)


def seeds(seed: int | None, n: int) -> list[int]:
    """Return a seed for each of n answers; the first is the one given."""
    first = secrets.randbits(63) if seed is None else seed & MASK
    return [(first + i * SEED_STEP) & MASK for i in range(n)]


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _bias(bias: Mapping[str, float], model: ServedModel) -> dict[int, float]:
    try:
        by_id = {int(token): float(value) for token, value in bias.items()}
    except ValueError as error:
        message = "The keys of logit_bias are token ids; POST /tokenize gives those of a text."
        raise ApiError(400, message, param="logit_bias") from error
    if min(by_id, default=0) < 0:
        raise ApiError(400, "A token id of logit_bias is below 0.", param="logit_bias")
    model.check_ids(list(by_id), "logit_bias")
    return by_id
