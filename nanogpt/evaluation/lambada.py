"""LAMBADA: whether a model predicts the last word of a passage (Paperno et al. 2016).

    python -m nanogpt.evaluate RUN --task lambada [--data FILE.jsonl]

`acc` is the share of passages whose last word, with the space before it, is the greedy
continuation; `perplexity` is that of the last words as wholes. Both as `lambada_openai` in
lm-evaluation-harness: no token stands before the passage, and no word is ruled out.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanogpt.evaluation.examples import Benchmark, read_rows, text_of
from nanogpt.evaluation.results import Results, mean_and_error, perplexity_of
from nanogpt.evaluation.scoring import BATCH_SIZE, Request, encode_pair, loglikelihoods_on_all_ranks
from nanogpt.model import GPT
from nanogpt.tokenizer import Tokenizer

BENCHMARK = Benchmark("lambada_openai_test", "EleutherAI/lambada_openai", "test", "default")


def read_passages(path: str | Path, limit: int | None = None) -> list[str]:
    """Return the texts of the first `limit` rows; raises ValueError, naming the line of a bad one.

    A row is an object with `text`, of two words at least.
    """
    passages = []
    for where, row in read_rows(path, limit):
        text = text_of(row, "text", where).strip()
        if " " not in text:
            raise ValueError(f"{where} has a text of one word; a last word needs words before it")
        passages.append(text)
    if not passages:
        raise ValueError(f"{path} has no passages; pass LAMBADA's test file")
    return passages


def evaluate(
    model: GPT, tokenizer: Tokenizer, passages: Sequence[str], batch_size: int = BATCH_SIZE
) -> Results:
    """Return accuracy and perplexity of the last words."""
    requests = [request(tokenizer, passage) for passage in passages]
    results = [a for [a] in loglikelihoods_on_all_ranks(model, requests, batch_size)]
    loss = mean_and_error("loss", -np.array([a.loglikelihood for a in results]))
    return {
        **mean_and_error("acc", np.array([a.is_greedy for a in results])),
        **perplexity_of(loss),
        "examples": len(passages),
    }


def request(tokenizer: Tokenizer, passage: str) -> Request:
    """Return the last word, with the space before it, as the continuation of the rest."""
    before, _, word = passage.rpartition(" ")
    context, continuation = encode_pair(tokenizer, before, f" {word}")
    return Request(context, [continuation])
