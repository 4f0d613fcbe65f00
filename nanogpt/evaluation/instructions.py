"""Instruction following: the loss of the responses, and statistics of the model's own replies.

    python -m nanogpt.evaluate RUN --task instructions --data FILE.jsonl [--limit N]

`loss` is per token of the file's responses, the end of each included. The model replies greedily to
each conversation without its last message: `terminated` is the share of replies that end within
`--max-new-tokens`, `reply_tokens` their mean length, and `repetition` the mean share of a reply's
4-grams of tokens that occurred in it before.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from nanogpt.checkpoint import Checkpoint
from nanogpt.data.instructions import Conversation, Instructions
from nanogpt.evaluation.results import Results, mean_and_error, ratio_and_error
from nanogpt.evaluation.scoring import BATCH_SIZE, Request, loglikelihoods
from nanogpt.generation import Reply
from nanogpt.prompts import Message, Template, find_template

NGRAM = 4  # tokens


def evaluate(
    checkpoint: Checkpoint, data: Path, limit: int | None, batch_size: int, max_new_tokens: int
) -> Results:
    """Measure the replies to a .jsonl or .json file of instructions and responses.

    Raises ValueError for a model without a template.
    """
    conversations = read_conversations(data, limit)
    losses = response_loss(checkpoint, conversations, batch_size)
    replies = [reply(checkpoint, one[:-1], max_new_tokens) for one in conversations]
    responses = [checkpoint.tokenizer.encode(one[-1].content) for one in conversations]
    return {
        **losses,
        **mean_and_error("terminated", np.array([reply.is_complete for reply in replies])),
        **_statistics([reply.ids for reply in replies]),
        **{f"baseline_responses_{name}": v for name, v in _statistics(responses).items()},
        "examples": len(conversations),
    }


def read_conversations(data: Path, limit: int | None) -> list[Conversation]:
    """Return the conversations of an instruction set; raises ValueError where it has none."""
    found = Instructions(data, max_examples=limit).conversations
    if not found:
        raise ValueError(f"{data} has no conversations; pass instructions and responses")
    return found


def _statistics(texts: Sequence[Sequence[int]]) -> Results:
    return {
        "reply_tokens": float(np.mean([len(ids) for ids in texts])),
        "repetition": float(np.mean([repetition(ids) for ids in texts])),
    }


def reply(checkpoint: Checkpoint, messages: Sequence[Message], max_new_tokens: int) -> Reply:
    """Return the greedy reply to a conversation; raises ValueError for a model without template."""
    model = (checkpoint.model, checkpoint.tokenizer)
    template = _template_of(checkpoint)
    return Reply(*model, messages, template, max_new_tokens=max_new_tokens, temperature=0).read()


def _template_of(checkpoint: Checkpoint) -> Template:
    if checkpoint.template is None:
        raise ValueError(
            f"{checkpoint.path} is not instruction-tuned (stage {checkpoint.stage}); pass a "
            "checkpoint of stage=instruct"
        )
    return find_template(checkpoint.template)


def response_loss(
    checkpoint: Checkpoint, conversations: Sequence[Conversation], batch_size: int = BATCH_SIZE
) -> Results:
    """Return the loss per token (nats) of all responses; its error is over conversations.

    Raises ValueError for a model without a template.
    """
    template, requests = _template_of(checkpoint), []
    for i, messages in enumerate(conversations):
        ids, is_response = template.encode(checkpoint.tokenizer, messages)
        end = 0
        for scored, group in groupby(is_response):
            start, end = end, end + len(list(group))
            if scored:
                requests.append((i, Request(ids[:start], [ids[start:end]])))
    results = loglikelihoods(checkpoint.model, [r for _, r in requests], batch_size)
    nats, n_tokens = np.zeros(len(conversations)), np.zeros(len(conversations))
    for (i, request), [found] in zip(requests, results, strict=True):
        nats[i] -= found.loglikelihood
        n_tokens[i] += len(request.continuations[0])
    return ratio_and_error("loss", nats, n_tokens)


def repetition(ids: Sequence[int]) -> float:
    """Return the share of 4-grams that occurred before in the same text.

    >>> repetition([1, 2, 3, 4, 1, 2, 3, 4])  # one of five
    0.2
    """
    ngrams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
