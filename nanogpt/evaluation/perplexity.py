"""Loss, perplexity and bits per byte of a text under a model.

    python -m nanogpt.evaluate RUN --task perplexity --data FILE_OR_FOLDER [--stride 64]

The text is one stream of tokens, `<|endoftext|>` before every document, as in training. It is
scored in windows of `stride` tokens, each after as many preceding tokens as the model's context
holds. With a stride of the whole context the windows are those of training's validation. Every
token but the first is scored once. `<|endoftext|>` adds loss and no bytes, so that bits per byte
compare models of any tokenizer.
"""

import math
from itertools import pairwise

import numpy as np

from nanogpt.evaluation.results import Results, perplexity_of, ratio_and_error
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
    """Return the metrics of a stream of tokens (N,), in windows of half a context by default.

    Standard errors treat the windows as independent. Raises ValueError for a stride that is no
    window, and for less than two tokens.
    """
    block_size = model.config.block_size
    stride = max(block_size // 2, 1) if stride is None else stride
    if not 1 <= stride <= block_size:
        raise ValueError(
            f"--stride {stride} is not from 1 to the model's context of {block_size} tokens"
        )
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens; give two or more")
    requests = windows(tokens, block_size, stride)
    results = loglikelihoods_on_all_ranks(model, requests, batch_size)
    nats = np.array([-a.loglikelihood for [a] in results])
    n_tokens = np.array([len(r.continuations[0]) for r in requests])
    sizes = np.array([len(token) for token in tokenizer.token_bytes()])
    n_bytes = np.array([sizes[r.continuations[0]].sum() for r in requests])
    loss = ratio_and_error("loss", nats, n_tokens)
    return {
        **loss,
        **perplexity_of(loss),
        **(ratio_and_error("bits_per_byte", nats / math.log(2), n_bytes) if n_bytes.any() else {}),
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
