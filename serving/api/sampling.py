"""The engine's sampling parameters from the fields of a request."""

import secrets
from collections.abc import Mapping, Sequence

from serving.api.errors import ApiError
from serving.api.models import ServedModel
from serving.api.schemas import SamplingRequest
from serving.engine.messages import SamplingParams

SEED_STEP = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: seeds of n answers are far apart
MASK = 2**64 - 1
SHARED = {  # fields with the same names, ranges and defaults
    *("temperature", "top_p", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
}


def params_of(
    body: SamplingRequest, model: ServedModel, *, stop_ids: Sequence[int], logprobs: int | None
) -> SamplingParams:
    """Return what all answers to a request share, all but the number of tokens and the seed.

    Raises ApiError for ids that the model lacks.
    """
    own_stops = body.stop_token_ids or []
    model.check_ids(own_stops, "stop_token_ids")
    return SamplingParams(
        max_tokens=0,
        top_k=min(body.top_k, model.details.vocab_size) if body.top_k and body.top_k > 0 else None,
        logit_bias=_bias(body.logit_bias or {}, model),
        stop_ids=tuple(dict.fromkeys([*stop_ids, *own_stops])),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        **body.model_dump(include=SHARED, exclude_none=True),
    )


def room_for(ids: Sequence[int], limit: int | None, model: ServedModel, param: str) -> int:
    """Return how many tokens may follow a prompt, up to a limit and the end of the context.

    None and -1 are no limit. Raises ApiError for a prompt that leaves no room.
    """
    room = model.details.block_size - len(ids)
    if limit == 0 and room >= 0:
        return 0
    if room < 1:
        raise model.too_long(f"{len(ids)}", param)
    return room if limit is None or limit < 0 else min(limit, room)


def seeds(seed: int | None, n: int) -> list[int]:
    """Return a seed for each of n answers; the first is the one given."""
    first = secrets.randbits(63) if seed is None else seed & MASK
    return [(first + i * SEED_STEP) & MASK for i in range(n)]


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
