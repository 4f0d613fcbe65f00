"""HellaSwag: which of four endings is the likeliest under a model (Zellers et al. 2019).

    python -m nanogpt.evaluate RUN --task hellaswag [--data FILE.jsonl] [--limit N]

Two forms of the prompt are in use, and both are scored. `acc` and `acc_norm` are build-nanogpt's
and llm.c's: the context as it is, each ending after one space, the largest sum of log-likelihoods
and the largest mean per token. `harness_*` are lm-evaluation-harness's: the activity before the
context, WikiHow's marks removed, the sum and the sum per character. No token stands before the
context in either. `PUBLISHED` has scores of GPT-2 over all validation items.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field

from nanogpt.checkpoint import Checkpoint
from nanogpt.evaluation.examples import Benchmark, find_benchmark, read_items
from nanogpt.evaluation.results import Results, mean_and_error
from nanogpt.evaluation.scoring import BATCH_SIZE, Request, encode_pair, loglikelihoods
from nanogpt.model import GPT
from nanogpt.tokenizer import Tokenizer

N_ITEMS = 10_042  # of the validation split
BENCHMARK = Benchmark("hellaswag_validation", "Rowan/hellaswag", "validation")
N_ENDINGS = 4

# karpathy/build-nanogpt: hellaswag.py (its header) for 124M and 1558M, play.ipynb for the others.
PUBLISHED: dict[str, Results] = {
    "gpt2_124M": {
        "acc": 0.2859,
        "acc_norm": 0.2955,
        "harness_acc": 0.2892,
        "harness_acc_norm": 0.3114,
    },
    "gpt2_355M": {"acc_norm": 0.3752},
    "gpt2_774M": {"acc_norm": 0.4320},
    "gpt2_1558M": {
        "acc": 0.3842,
        "acc_norm": 0.4893,
        "harness_acc": 0.4004,
        "harness_acc_norm": 0.5089,
    },
}
# the last words of a context, where they are no sentence and the ending continues them
_BEGUN_SENTENCE = re.compile(r"(.*[.!?]) ([^A-Z.!?][^.!?]*)", re.DOTALL)


class Item(BaseModel, frozen=True):
    """A row of HellaSwag's validation file, the published one or the hub's.

    `ctx_a` are the sentences of `ctx`, and `ctx_b` is a begun one that the endings complete.
    """

    activity_label: str
    ctx: str
    ctx_a: str | None = None
    ctx_b: str = ""
    endings: Annotated[
        list[Annotated[str, Field(pattern=r"\S")]],
        Field(min_length=N_ENDINGS, max_length=N_ENDINGS),
    ]
    label: Annotated[int, Field(ge=0, lt=N_ENDINGS)]  # the hub's is a digit, of the test split ""


def evaluate(
    checkpoint: Checkpoint, data: Path | None, limit: int | None, batch_size: int, data_dir: Path
) -> Results:
    """Score HellaSwag in both forms, with chance and the published scores as baselines."""
    items = read_items(Item, data or find_benchmark(BENCHMARK, data_dir), limit)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    requests = [completion_request(tokenizer, item) for item in items]
    results = scores(model, items, requests, batch_size=batch_size)
    harness = [harness_request(tokenizer, item) for item in items]
    characters = [[max(1, len(_plain(ending))) for ending in item.endings] for item in items]
    found = scores(model, items, harness, characters, batch_size)
    results |= {f"harness_{name}": value for name, value in found.items()}
    chance = {f"baseline_chance_{name}": 1 / N_ENDINGS for name in results if "stderr" not in name}
    published = {
        f"baseline_published_{who}_{name}": value
        for who, metrics in PUBLISHED.items()
        for name, value in {**metrics, "examples": N_ITEMS}.items()
    }
    return {**results, **chance, "examples": len(items), **published}


def completion_request(tokenizer: Tokenizer, item: Item) -> Request:
    """Return an item as build-nanogpt prompts it."""
    context = tokenizer.encode_prompt(item.ctx)
    return Request(context, [tokenizer.encode(f" {ending}") for ending in item.endings])


def harness_request(tokenizer: Tokenizer, item: Item) -> Request:
    """Return an item as lm-evaluation-harness prompts it (tasks/hellaswag/utils.py).

    Without `ctx_a` its context is split after its last sentence, if the rest begins in lower case.
    """
    sentences, begun = item.ctx_a, item.ctx_b
    if sentences is None:
        split = _BEGUN_SENTENCE.fullmatch(item.ctx)
        sentences, begun = split.groups() if split else (item.ctx, "")
    text = _plain(f"{item.activity_label}: {sentences} {begun.capitalize()}")
    pairs = [encode_pair(tokenizer, text, f" {_plain(ending)}") for ending in item.endings]
    return Request(pairs[0][0], [continuation for _, continuation in pairs])


def _plain(text: str) -> str:
    """Return a text without the marks of WikiHow's headings."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def scores(
    model: GPT,
    items: Sequence[Item],
    requests: Sequence[Request],
    sizes: Sequence[Sequence[int]] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Results:
    """Return how often the right ending has the largest sum, and the largest mean over its size.

    Sizes are tokens by default.
    """
    sizes = sizes or [[len(tokens) for tokens in request.continuations] for request in requests]
    results = loglikelihoods(model, requests, batch_size)
    sums = np.array([[a.loglikelihood for a in endings] for endings in results])  # (N, 4)
    labels = np.array([item.label for item in items])
    return {
        **mean_and_error("acc", sums.argmax(1) == labels),
        **mean_and_error("acc_norm", (sums / np.array(sizes)).argmax(1) == labels),
    }
