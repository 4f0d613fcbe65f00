"""Loss, perplexity and bits per byte of a text under a model.

    python -m nanogpt.evaluate RUN --task perplexity --data FILE_OR_FOLDER [--stride 64]

The text is one stream of tokens, `<|endoftext|>` before every document, as in training. It is
scored in windows of `stride` tokens; each is read together with what precedes it, as much as makes
the model's context full. With a stride of the whole context the windows are those of training's
validation. Every token but the first is scored once. `<|endoftext|>` adds loss and no bytes, so
that bits per byte compare models of any tokenizer.
"""

import math
from itertools import pairwise

import numpy as np

from nanogpt.evaluation.results import Results
from nanogpt.evaluation.scoring import BATCH_SIZE, Request, Tokens, loglikelihoods_on_all_ranks
from nanogpt.model import GPT
from nanogpt.tokenizer import Tokenizer


def evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    tokens: Tokens,
    *,
    stride: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> Results:
    """Return the figures of a stream of tokens; the stride is half the model's context by default.

    Standard errors take the windows for independent.
    """
    stride = max(model.config.block_size // 2, 1) if stride is None else stride
    check_stream(tokens, stride, model.config.block_size)
    requests = windows(tokens, model.config.block_size, stride)
    nats = np.array(
        [-a.loglikelihood for [a] in loglikelihoods_on_all_ranks(model, requests, batch_size)]
    )
    n_tokens = np.array([len(q.continuations[0]) for q in requests])
    sizes = np.array([len(token) for token in tokenizer.token_bytes()])
    n_bytes = np.array([sizes[q.continuations[0]].sum() for q in requests])
    loss, loss_error = _ratio(nats, n_tokens)
    results = {
        "loss": loss,
        "loss_stderr": loss_error,
        "perplexity": math.exp(min(loss, 700.0)),  # within float64
        "perplexity_stderr": math.exp(min(loss, 700.0)) * loss_error,  # to first order
    }
    if n_bytes.sum():
        bits, bits_error = _ratio(nats / math.log(2), n_bytes)
        results |= {"bits_per_byte": bits, "bits_per_byte_stderr": bits_error}
    return {
        **results,
        "tokens": int(n_tokens.sum()),
        "bytes": int(n_bytes.sum()),
        "stride": stride,
    }


def windows(tokens: Tokens, block_size: int, stride: int) -> list[Request]:
    """Return the windows of a stream; every token after the first is in one of them.

    >>> windows([0, 1, 2, 3, 4], block_size=3, stride=2)
    [Request([0], [[1, 2]]), Request([1, 2], [[3, 4]])]
    """
    edges = [*range(1, len(tokens), stride), len(tokens)]
    return [
        Request(tokens[max(start + stride - 1 - block_size, 0) : start], [tokens[start:end]])
        for start, end in pairwise(edges)
    ]


def check_stream(tokens: Tokens, stride: int, block_size: int) -> None:
    """Raise ValueError where there is nothing to score, or no window of this stride."""
    if not 1 <= stride <= block_size:
        raise ValueError(
            f"--stride {stride} is not from 1 to the model's context of {block_size} tokens"
        )
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens; give two or more")


def _ratio(amounts: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Return sum(amounts) / sum(sizes), and its standard error (Cochran 1977, section 6.4)."""
    ratio, n = amounts.sum() / sizes.sum(), len(amounts)
    if n < 2:
        return float(ratio), 0.0
    residuals = amounts - ratio * sizes
    error = math.sqrt(n / (n - 1) * np.square(residuals).sum()) / sizes.sum()
    return float(ratio), float(error)
