"""Turn logits into tokens, one at a time, from a cache of keys and values.

Shapes: B batch, T time, H heads, D head size, V vocabulary.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nanogpt.model import GPT, GPTConfig


def generate(
    model: GPT,
    input_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
) -> Iterator[int]:
    """Return an iterator over the tokens that continue `input_ids`, each computed when asked for.

    It ends after `max_new_tokens`, or before the first of `stop_ids`, which is not yielded.
    A temperature of 0 always takes the likeliest token. The same seed gives the same tokens; the
    random state of torch is neither read nor changed. Of a prompt longer than the context the end
    is read; when the context is full, the model reads its last half again and goes on from there.
    A model whose blocks use no cache (see `Block`) reads the whole context for each token.

        >>> list(generate(model, tokenizer.encode("def "), max_new_tokens=3, temperature=0))
        [305, 1117, 40]
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, min_p)
    _check_prompt(input_ids, model.config.vocab_size)
    generator = torch.Generator(model.wte.weight.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % 2**64)

    def tokens() -> Iterator[int]:
        block_size = model.config.block_size
        context = list(input_ids)[-block_size:]
        unread = context
        n_tokens = min(block_size, len(context) + max_new_tokens)
        cache = KVCache.like(model, n_tokens=n_tokens) if model.uses_cache else None
        for _ in range(max_new_tokens):
            if len(context) > block_size:
                unread = context = context[-max(1, block_size // 2) :]
                if cache is not None:
                    cache.length = 0
            logits = next_logits(model, unread, cache)
            weights = probabilities(logits, temperature, top_k, top_p, min_p)
            token = int(torch.multinomial(weights, 1, generator=generator))
            if token in stop_ids:
                return
            yield token
            context.append(token)
            unread = context if cache is None else [token]

    return tokens()


class KVCache:
    """The keys and values that a model computed for the tokens it has read.

    Memory for `n_tokens`, by default `block_size`, is taken at once; setting `length` to less
    forgets the rest.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int = 1,
        *,
        n_tokens: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        head_size = config.n_embd // config.n_head
        n_tokens = config.block_size if n_tokens is None else n_tokens
        shape = (config.n_layer, 2, batch_size, config.n_head, n_tokens, head_size)
        self.entries = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @classmethod
    def like(cls, model: GPT, batch_size: int = 1, *, n_tokens: int | None = None) -> "KVCache":
        """Return an empty cache of the model's shape, precision and device."""
        weight = model.wte.weight
        return cls(
            *(model.config, batch_size),
            n_tokens=n_tokens,
            dtype=weight.dtype,
            device=weight.device,
        )

    @torch.no_grad()
    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's keys and values (B, H, T, D); return all it holds, old and new.

        `length` grows when the last layer is in, so that all layers of a call start alike. No
        gradient passes through the cache.
        """
        end = self.length + k.size(2)
        keys, values = self.entries[layer]  # (B, H, block_size, D) each
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        if layer == len(self.entries) - 1:
            self.length = end
        return keys[:, :, :end], values[:, :, :end]


@torch.inference_mode()
def next_logits(model: GPT, input_ids: Sequence[int], cache: KVCache | None) -> Tensor:
    """Read more tokens into the cache and return the logits (V,) of the one that follows.

    Raises ValueError where a block of another class leaves the cache as it was.
    """
    ids = torch.tensor([input_ids], device=model.wte.weight.device)  # (1, T)
    end = len(input_ids) + (0 if cache is None else cache.length)
    with _evaluating(model):
        states = model.hidden_states(ids, cache)
    if cache is not None and cache.length != end:
        raise ValueError(
            f"model.block={model.config.block} sets uses_cache = True but does not call "
            f"cache.update in every layer; remove uses_cache"
        )
    return model.head(states[0, -1])


def probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Return the distribution (..., V) to draw from, narrowed by each rule given, in this order.

    Temperature 0 is the limit: all on the likeliest token.
    """
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # no overflow near 0
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    return logits.softmax(-1)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Rule out all but the `top_k` likeliest tokens."""
    best = logits.topk(min(top_k, logits.size(-1)))
    return torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Rule out all but the likeliest tokens that together reach the probability `top_p`.

    "The Curious Case of Neural Text Degeneration", section 3.1. The likeliest always stays.
    """
    ordered, indices = logits.sort(descending=True)
    weights = ordered.softmax(-1)
    likelier = weights.cumsum(-1) - weights
    ordered = ordered.masked_fill((likelier >= top_p) & (likelier > 0), -math.inf)
    return torch.empty_like(logits).scatter(-1, indices, ordered)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Rule out tokens under `min_p` times the likeliest ("Min-p Sampling", arXiv 2407.01082)."""
    weights = logits.softmax(-1)
    return logits.masked_fill(weights < min_p * weights.amax(-1, keepdim=True), -math.inf)


@contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    """Turn dropout off, for the model work alone: between two tokens the caller may train."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def _check_prompt(input_ids: Sequence[int], vocab_size: int) -> None:
    if not len(input_ids):
        raise ValueError('the prompt is empty; tokenizer.encode_prompt("") begins a document')
    if min(input_ids) < 0 or max(input_ids) >= vocab_size:
        raise ValueError(
            f"the prompt has token ids from {min(input_ids)} to {max(input_ids)} but the model "
            f"knows 0 to {vocab_size - 1}; encode it with the model's own tokenizer"
        )


def check_sampling(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> None:
    """Raise ValueError, in one sentence, for a value that `generate` cannot use."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is negative; pass 0 or more")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} is not a number of at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} leaves no token; pass 1 or more, or null for all")
    if top_p is not None and not 0 <= top_p <= 1:
        raise ValueError(f"top_p={top_p} is not a probability; pass a number from 0 to 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} is not a probability; pass a number from 0 to 1")
