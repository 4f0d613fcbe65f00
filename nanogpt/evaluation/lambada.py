"""LAMBADA: whether a model predicts the last word of a passage (Paperno et al. 2016).

    python -m nanogpt.evaluate RUN --task lambada [--data FILE.jsonl]

`acc` is the share of passages whose last word, with the space before it, is the greedy
continuation; `perplexity` is that of the last words as wholes. Both as `lambada_openai` in
lm-evaluation-harness: no token stands before the passage, and no word is ruled out.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, StringConstraints

from nanogpt.checkpoint import Checkpoint
from nanogpt.evaluation.examples import Benchmark, find_benchmark, read_items
from nanogpt.evaluation.results import Results, mean_and_error, perplexity_of
from nanogpt.evaluation.scoring import Request, encode_pair, loglikelihoods
from nanogpt.tokenizer import Tokenizer

BENCHMARK = Benchmark("lambada_openai_test", "EleutherAI/lambada_openai", "test", "default")


class Passage(BaseModel):
    """A row of LAMBADA's test file: a text of two words or more."""

    text: Annotated[str, StringConstraints(strip_whitespace=True, pattern=" ")]


def evaluate(
    checkpoint: Checkpoint, data: Path | None, limit: int | None, batch_size: int, data_dir: Path
) -> Results:
    """Score the last words of LAMBADA."""
    passages = read_items(Passage, data or find_benchmark(BENCHMARK, data_dir), limit)
    requests = [request(checkpoint.tokenizer, passage.text) for passage in passages]
    results = loglikelihoods(checkpoint.model, requests, batch_size)
    loss = mean_and_error("loss", -np.array([found.loglikelihood for [found] in results]))
    return {
        **mean_and_error("acc", np.array([found.is_greedy for [found] in results])),
        **perplexity_of(loss),
        "examples": len(passages),
    }


def request(tokenizer: Tokenizer, passage: str) -> Request:
    """Return the last word, with the space before it, as the continuation of the rest."""
    before, _, word = passage.rpartition(" ")
    context, continuation = encode_pair(tokenizer, before, f" {word}")
    return Request(context, [continuation])
