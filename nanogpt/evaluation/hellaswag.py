"""HellaSwag: which of four endings is the likeliest under a model (Zellers et al. 2019).

    python -m nanogpt.evaluate RUN --task hellaswag [--data FILE.jsonl] [--limit N]

Two forms of the prompt are in use, and both are scored. `acc` and `acc_norm` are build-nanogpt's
and llm.c's: the context as it is, each ending after one space, the largest sum of log-likelihoods
and the largest mean per token. `harness_*` are lm-evaluation-harness's: the activity before the
context, WikiHow's marks removed, the sum and the sum per character. No token stands before the
context in either. `PUBLISHED` has scores of GPT-2 over all 10,042 validation items.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.evaluation.examples import Benchmark, read_rows, text_of
from nanogpt.evaluation.results import Results, mean_and_error
from nanogpt.evaluation.scoring import BATCH_SIZE, Request, encode_pair, loglikelihoods_on_all_ranks
from nanogpt.model import GPT
from nanogpt.tokenizer import Tokenizer

BENCHMARK = Benchmark("hellaswag_validation", "Rowan/hellaswag", "validation")
N_ENDINGS = 4

# karpathy/build-nanogpt: hellaswag.py (its header) for 124M and 1558M, play.ipynb for the others.
PUBLISHED: dict[str, Results] = {
    "gpt2_124M": {
        "acc": 0.2859,
        "acc_norm": 0.2955,
        "harness_acc": 0.2892,
        "harness_acc_norm": 0.3114,
        "examples": 10042,
    },
    "gpt2_355M": {"acc_norm": 0.3752, "examples": 10042},
    "gpt2_774M": {"acc_norm": 0.4320, "examples": 10042},
    "gpt2_1558M": {
        "acc": 0.3842,
        "acc_norm": 0.4893,
        "harness_acc": 0.4004,
        "harness_acc_norm": 0.5089,
        "examples": 10042,
    },
}
# the last words of a context, where they are no sentence and the ending continues them
_BEGUN_SENTENCE = re.compile(r"(.*[.!?]) ([^A-Z.!?][^.!?]*)", re.DOTALL)


@dataclass(frozen=True)
class Item:
    """A context, given whole and as its sentences and a begun one, with its endings."""

    activity: str
    ctx: str
    ctx_a: str
    ctx_b: str
    endings: tuple[str, ...]
    label: int


def read_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """Return the first `limit` items of a file, the published one or the hub's.

    Without `ctx_a` and `ctx_b` a row's `ctx` is split after its last sentence, if the rest begins
    in lower case. Raises ValueError, naming file and line, for a row that is no item.
    """
    items = [_item(row, where) for where, row in read_rows(path, limit)]
    if not items:
        raise ValueError(f"{path} has no items; pass HellaSwag's validation file")
    return items


def _item(row: dict[str, Any], where: str) -> Item:
    endings = row.get("endings")
    if not (
        isinstance(endings, list)
        and len(endings) == N_ENDINGS
        and all(isinstance(ending, str) and ending.strip() for ending in endings)
    ):
        raise ValueError(f"{where} has no list of {N_ENDINGS} texts under 'endings'; correct it")
    label, known = row.get("label"), [str(i) for i in range(N_ENDINGS)]
    if label == "":
        raise ValueError(f"{where} has no label, as the test split; pass the validation split")
    if isinstance(label, bool) or str(label) not in known:
        raise ValueError(f"{where} has the label {label!r} and 0 to {N_ENDINGS - 1} are known")
    ctx = text_of(row, "ctx", where)
    begun = _BEGUN_SENTENCE.fullmatch(ctx)
    ctx_a, ctx_b = (begun[1], begun[2]) if begun else (ctx, "")
    if "ctx_a" in row:
        ctx_a, ctx_b = text_of(row, "ctx_a", where), text_of(row, "ctx_b", where)
    activity = text_of(row, "activity_label", where)
    return Item(activity, ctx, ctx_a, ctx_b, tuple(endings), int(str(label)))


def evaluate(
    model: GPT, tokenizer: Tokenizer, items: Sequence[Item], batch_size: int = BATCH_SIZE
) -> Results:
    """Return `acc`, `acc_norm` and their like of the harness, with standard errors."""
    results = completion_scores(model, tokenizer, items, batch_size)
    harness = [harness_request(tokenizer, item) for item in items]
    characters = [[max(1, len(_plain(ending))) for ending in item.endings] for item in items]
    found = _scores(model, items, harness, characters, batch_size)
    results |= {f"harness_{name}": value for name, value in found.items()}
    chance = {f"baseline_chance_{name}": 1 / N_ENDINGS for name in results if "stderr" not in name}
    return {**results, **chance, "examples": len(items)}


def completion_scores(
    model: GPT, tokenizer: Tokenizer, items: Sequence[Item], batch_size: int = BATCH_SIZE
) -> Results:
    """Return `acc` and `acc_norm` as build-nanogpt scores them, with standard errors."""
    requests = [completion_request(tokenizer, item) for item in items]
    tokens = [[len(ending) for ending in request.continuations] for request in requests]
    return _scores(model, items, requests, tokens, batch_size)


def completion_request(tokenizer: Tokenizer, item: Item) -> Request:
    """Return an item as build-nanogpt prompts it."""
    context = tokenizer.encode_prompt(item.ctx)
    return Request(context, [tokenizer.encode(f" {ending}") for ending in item.endings])


def harness_request(tokenizer: Tokenizer, item: Item) -> Request:
    """Return an item as lm-evaluation-harness prompts it (tasks/hellaswag/utils.py)."""
    text = _plain(f"{item.activity}: {item.ctx_a} {item.ctx_b.capitalize()}")
    pairs = [encode_pair(tokenizer, text, f" {_plain(ending)}") for ending in item.endings]
    return Request(pairs[0][0], [continuation for _, continuation in pairs])


def _plain(text: str) -> str:
    """Return a text without the marks of WikiHow's headings."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _scores(
    model: GPT,
    items: Sequence[Item],
    requests: Sequence[Request],
    sizes: Sequence[Sequence[int]],
    batch_size: int,
) -> Results:
    """Return how often the right ending has the largest sum, and the largest mean over its size."""
    results = loglikelihoods_on_all_ranks(model, requests, batch_size)
    sums = np.array([[a.loglikelihood for a in endings] for endings in results])  # (N, 4)
    labels = np.array([item.label for item in items])
    return {
        **mean_and_error("acc", sums.argmax(1) == labels),
        **mean_and_error("acc_norm", (sums / np.array(sizes)).argmax(1) == labels),
    }
