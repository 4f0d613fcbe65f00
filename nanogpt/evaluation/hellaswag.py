"""HellaSwag: which of four endings is the likeliest under a model (Zellers et al. 2019).

    python -m nanogpt.evaluate RUN --task hellaswag [--data FILE.jsonl] [--limit N]

`acc` and `acc_norm` are build-nanogpt's and llm.c's: the context as it is, each ending after one
space, the largest sum of log-likelihoods and the largest mean per token. No token stands before the
context. `PUBLISHED` has scores of GPT-2 over all validation items. The prompts of
lm-evaluation-harness are those of its task (`--task harness --harness-tasks hellaswag`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field

from nanogpt.checkpoint import Checkpoint
from nanogpt.evaluation.examples import Benchmark, find_benchmark, read_items
from nanogpt.evaluation.results import Results, mean_and_error
from nanogpt.evaluation.scoring import BATCH_SIZE, Request, loglikelihoods
from nanogpt.model import GPT
from nanogpt.tokenizer import Tokenizer

N_ITEMS = 10_042  # of the validation split
BENCHMARK = Benchmark("hellaswag_validation", "Rowan/hellaswag", "validation")
N_ENDINGS = 4

# karpathy/build-nanogpt: hellaswag.py (its header) for 124M and 1558M, play.ipynb for the others.
PUBLISHED: dict[str, Results] = {
    "gpt2_124M": {"acc": 0.2859, "acc_norm": 0.2955},
    "gpt2_355M": {"acc_norm": 0.3752},
    "gpt2_774M": {"acc_norm": 0.4320},
    "gpt2_1558M": {"acc": 0.3842, "acc_norm": 0.4893},
}


class Item(BaseModel, frozen=True):
    """A row of HellaSwag's validation file, the published one or the hub's."""

    ctx: str
    endings: Annotated[
        list[Annotated[str, Field(pattern=r"\S")]],
        Field(min_length=N_ENDINGS, max_length=N_ENDINGS),
    ]
    label: Annotated[int, Field(ge=0, lt=N_ENDINGS)]  # the hub's is a digit, of the test split ""


def evaluate(
    checkpoint: Checkpoint, data: Path | None, limit: int | None, batch_size: int, data_dir: Path
) -> Results:
    """Score HellaSwag, with chance and the published scores as baselines."""
    items = read_items(Item, data or find_benchmark(BENCHMARK, data_dir), limit)
    requests = [completion_request(checkpoint.tokenizer, item) for item in items]
    results = scores(checkpoint.model, items, requests, batch_size)
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


def scores(
    model: GPT, items: Sequence[Item], requests: Sequence[Request], batch_size: int = BATCH_SIZE
) -> Results:
    """Return how often the right ending has the largest sum, and the largest mean per token."""
    sizes = np.array([[len(tokens) for tokens in request.continuations] for request in requests])
    results = loglikelihoods(model, requests, batch_size)
    sums = np.array([[a.loglikelihood for a in endings] for endings in results])  # (N, 4)
    labels = np.array([item.label for item in items])
    return {
        **mean_and_error("acc", sums.argmax(1) == labels),
        **mean_and_error("acc_norm", (sums / sizes).argmax(1) == labels),
    }
