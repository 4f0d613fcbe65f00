"""How a model replies to instructions: the loss of the responses, and what its own are like.

    python -m nanogpt.evaluate RUN --task instructions --data FILE.jsonl [--limit N]

`loss` is per token of the responses that the file has, the end of each included. Its own reply to
each conversation's last message is what it finds likeliest: `terminated` is the share that end by
themselves within `--max-new-tokens`, `reply_tokens` their mean length, and `repetition` the mean
share of a reply's runs of four tokens that occurred in it before.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from nanogpt.checkpoint import Checkpoint
from nanogpt.evaluation.results import Results, mean_and_error
from nanogpt.evaluation.scoring import BATCH_SIZE, Question, answer_on_all_ranks
from nanogpt.generation import generate
from nanogpt.prompts import Message, Template, find_template
from nanogpt.tokenizer import Tokenizer

RUN_TOKENS = 4  # of what counts as repeated

Conversation = Sequence[Message]


def evaluate(
    checkpoint: Checkpoint,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
) -> Results:
    """Return the figures of the responses and of the replies, the responses' own beside."""
    tokenizer = checkpoint.tokenizer
    template = template_of(checkpoint)
    losses = response_loss(checkpoint, template, conversations, batch_size)
    replies = [reply(checkpoint, template, one[:-1], max_new_tokens) for one in conversations]
    responses = [tokenizer.encode(one[-1].content) for one in conversations]
    return {
        **losses,
        **mean_and_error("terminated", np.array([ended for _, ended in replies])),
        **_described([ids for ids, _ in replies]),
        **{f"baseline_responses_{name}": v for name, v in _described(responses).items()},
        "examples": len(conversations),
    }


def _described(texts: Sequence[Sequence[int]]) -> Results:
    """Return length and repetition of texts, without standard errors."""
    return {
        "reply_tokens": float(np.mean([len(ids) for ids in texts])),
        "repetition": float(np.mean([repetition(ids) for ids in texts])),
    }


def template_of(checkpoint: Checkpoint) -> Template:
    """Return the template that a model was taught; raises ValueError where it was taught none."""
    if checkpoint.template is None:
        raise ValueError(
            f"{checkpoint.path} was not taught to reply (stage {checkpoint.stage}); pass a "
            "checkpoint of stage=instruct"
        )
    return find_template(checkpoint.template)


def response_loss(
    checkpoint: Checkpoint,
    template: Template,
    conversations: Sequence[Conversation],
    batch_size: int = BATCH_SIZE,
) -> Results:
    """Return the nats per token of all responses; its error is over conversations."""
    questions, owners = [], []
    for number, messages in enumerate(conversations):
        of_one = response_questions(checkpoint.tokenizer, template, messages)
        questions += of_one
        owners += [number] * len(of_one)
    nats, n_tokens = np.zeros(len(conversations)), np.zeros(len(conversations))
    for question, owner, [found] in zip(
        questions, owners, answer_on_all_ranks(checkpoint.model, questions, batch_size), strict=True
    ):
        nats[owner] -= found.log_likelihood
        n_tokens[owner] += len(question.continuations[0])
    loss = nats.sum() / n_tokens.sum()
    residuals = mean_and_error("loss", (nats - loss * n_tokens) / n_tokens.mean())
    return {"loss": float(loss), "loss_stderr": residuals["loss_stderr"]}


def response_questions(
    tokenizer: Tokenizer, template: Template, messages: Conversation
) -> list[Question]:
    """Return each response of a conversation as what is to follow all before it."""
    ids, is_response = template.encode(tokenizer, messages)
    questions, start = [], 0
    for scored, run in groupby(is_response):
        end = start + len(list(run))
        if scored:
            questions.append(Question(ids[:start], [ids[start:end]]))
        start = end
    return questions


def reply(
    checkpoint: Checkpoint, template: Template, messages: Conversation, max_new_tokens: int
) -> tuple[list[int], bool]:
    """Return the ids of the likeliest reply to some messages, and whether it ends by itself."""
    tokenizer = checkpoint.tokenizer
    prompt, _ = template.encode(tokenizer, messages, add_generation_prompt=True)
    ids: list[int] = []
    for token in generate(
        checkpoint.model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=0,
        stop_ids=template.stop_ids(tokenizer),
    ):
        ids.append(token)
        text = tokenizer.decode(ids) if template.stop_texts else ""
        if any(stop in text for stop in template.stop_texts):
            return tokenizer.encode(template.until_stop(text)), True
    return ids, len(ids) < max_new_tokens


def repetition(ids: Sequence[int]) -> float:
    """Return the share of runs of four tokens that occurred before in the same text.

    >>> repetition([1, 2, 3, 4, 1, 2, 3, 4])  # one of five
    0.2
    """
    runs = [tuple(ids[i : i + RUN_TOKENS]) for i in range(len(ids) - RUN_TOKENS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
