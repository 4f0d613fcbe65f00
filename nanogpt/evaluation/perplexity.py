"""Loss, perplexity and bits per byte of a text under a model.

    python -m nanogpt.evaluate RUN --task perplexity --data FILE_OR_FOLDER [--stride 64]

The text is one stream of tokens, `<|endoftext|>` before every document, as in training. It is
scored in windows of `stride` tokens, each after as many preceding tokens as the model's context
holds. With a stride of the whole context the windows are those of training's validation. Every
token but the first is scored once. `<|endoftext|>` adds loss and no bytes, so that bits per byte
compare models of any tokenizer.
"""

import gzip
import math
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from nanogpt.checkpoint import Checkpoint
from nanogpt.data.corpus import MANIFEST, open_corpus
from nanogpt.data.pretokenized import TokenShards
from nanogpt.data.text import TextFiles
from nanogpt.evaluation.results import Results, perplexity_of, ratio_and_error
from nanogpt.evaluation.scoring import BATCH_SIZE, Request, Tokens, loglikelihoods
from nanogpt.model import GPT
from nanogpt.tokenizer import Tokenizer

MAX_GZIP_BYTES = 64 * 2**20  # of a text that is compressed for comparison
SHARDS = (".bin", ".npy")


def evaluate(
    checkpoint: Checkpoint,
    data: Path,
    limit: int | None,
    batch_size: int,
    stride: int | None,
    text_column: str,
    separator: str | None,
) -> Results:
    """Score text (.txt .md .py .jsonl .parquet) or token shards, and compress it with gzip.

    Windows are half a context by default. Raises ValueError for a stride that is no window.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    block_size = model.config.block_size
    stride = max(block_size // 2, 1) if stride is None else stride
    if not 1 <= stride <= block_size:
        raise ValueError(
            f"--stride {stride} is not from 1 to the model's context of {block_size} tokens"
        )
    tokens = prepared_tokens(data, checkpoint, limit)
    if tokens is None:
        texts = islice(
            TextFiles(data, text_column=text_column, separator=separator).documents(), limit
        )
        documents = [[tokenizer.eot_id, *tokenizer.encode(text or "")] for text in texts]
        tokens = np.array([token for ids in documents for token in ids], dtype=np.int64)
        if limit is not None and len(documents) == 1:  # counts windows instead
            tokens = tokens[: 1 + limit * stride]
    results = scores(model, tokenizer, tokens, stride, batch_size)
    if 0 < results["bytes"] <= MAX_GZIP_BYTES:
        content = tokenizer.decode_bytes(tokens.tolist())
        bits = 8 * len(gzip.compress(content, 9, mtime=0)) / len(content)
        results["baseline_gzip_bits_per_byte"] = bits
    return results


def prepared_tokens(path: Path, checkpoint: Checkpoint, limit: int | None) -> np.ndarray | None:
    """Return the tokens (N,) of shards, of a corpus those held out; None where `path` holds text.

    Raises ValueError for a limit, and for tokens of another tokenizer.
    """
    tokenizer = checkpoint.tokenizer
    is_corpus = (path / MANIFEST).is_file()
    files = path.iterdir() if path.is_dir() else [path]
    if not is_corpus and not any(file.suffix in SHARDS for file in files):
        return None
    if limit is not None:
        raise ValueError(f"--limit counts documents and {path} holds tokens; leave it out")
    corpus = open_corpus(path) if is_corpus else TokenShards(path).open(tokenizer, tokenizer.name)
    if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{path} has tokens of {corpus.tokenizer.name} and {checkpoint.path} another "
            f"tokenizer ({tokenizer.name}); pass the text itself"
        )
    parts = [corpus.val] if path.is_dir() else [corpus.train, corpus.val]
    return np.concatenate([part.read(0, len(part)) for part in parts])


def scores(
    model: GPT, tokenizer: Tokenizer, tokens: Tokens, stride: int, batch_size: int = BATCH_SIZE
) -> Results:
    """Return the metrics of a stream of tokens (N,); standard errors treat windows as independent.

    Raises ValueError for less than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens; give two or more")
    requests = windows(tokens, model.config.block_size, stride)
    results = loglikelihoods(model, requests, batch_size)
    nats = np.array([-found.loglikelihood for [found] in results])
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
