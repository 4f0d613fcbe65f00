"""Turn requests into sequences, or refuse them before anything is computed."""

from typing import Any

from nanogpt.classifier import enclose
from serving.engine.messages import (
    Classify,
    FailureKind,
    Generate,
    ModelDetails,
    Request,
    Score,
)
from serving.engine.runner import Runner
from serving.engine.scheduler import Aim, Sequence


class Refused(Exception):
    """A request that is not taken; `kind` says why."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def sequence(runner: Runner, client: object, request: Request) -> Sequence:
    """Return what a request asks the runner to compute; raises Refused where it cannot be."""
    if isinstance(request, Classify):
        return _classify(runner, client, request)
    assert isinstance(request, Generate | Score)
    ids = list(request.prompt_ids)
    if isinstance(request, Score):
        _check_prompt(ids, runner, room=0)
        return _sequence(client, request, "score", ids, top=request.top)
    _check_prompt(ids, runner, room=1)
    return _sequence(client, request, "write", ids, scope=request.key, request=request)


def details(runner: Runner, request_id: str) -> ModelDetails:
    """Return all that a front end needs to know of a model."""
    about = runner.checkpoint
    return ModelDetails(
        request_id,
        id=runner.id,
        revision=runner.revision,
        stage=about.stage,
        step=about.step,
        block_size=about.config.block_size,
        vocab_size=about.config.vocab_size,
        n_params=about.model.num_parameters(),
        dtype=runner.dtype,
        tokenizer=about.tokenizer.record(),
        template=about.template,
        labels=about.labels,
    )


def _check_prompt(ids: list[int], runner: Runner, room: int) -> None:
    config = runner.checkpoint.config
    if not ids:
        raise Refused("invalid", "The prompt is empty; it needs at least one token.")
    if len(ids) + room > config.block_size:
        what = f"The model's context is {config.block_size} tokens and the prompt has {len(ids)}"
        raise Refused("context_length", f"{what}; shorten it.")
    if min(ids) < 0 or max(ids) >= config.vocab_size:
        what = f"The prompt has token ids from {min(ids)} to {max(ids)}"
        raise Refused("invalid", f"{what}; the model knows 0 to {config.vocab_size - 1}.")


def _classify(runner: Runner, client: object, request: Classify) -> Sequence:
    about = runner.checkpoint
    if about.labels is None:
        raise Refused("invalid", f"The model {runner.id} was not trained to classify.")
    ids = enclose(request.ids, about.tokenizer.eot_id, about.config.block_size)
    _check_prompt(ids, runner, room=0)
    return _sequence(client, request, "classify", ids)


def _sequence(
    client: object, asked: Generate | Score | Classify, aim: Aim, ids: list[int], **others: Any
) -> Sequence:
    """Return a sequence with its request's labels; its slot is its own unless a scope is given."""
    id_ = asked.request_id
    labels = {"scope": id_, "key": asked.key, "origin": asked.origin or id_}
    return Sequence(id_, client, aim, ids, len(ids), **{**labels, **others})
