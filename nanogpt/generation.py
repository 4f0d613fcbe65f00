"""Autoregressive generation: replies to conversations, sampling, the cache of keys and values.

Shapes: B batch, T time, H heads, D head size, V vocabulary.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.detokenizer import Detokenizer
from nanogpt.model import GPT, Attend, causal_attention
from nanogpt.prompts import Message, Template, trimmed
from nanogpt.support import IN_MODEL, check_supported, mixes_by_attend
from nanogpt.tokenizer import Tokenizer


class Reply:
    """A model's reply to a conversation, or its continuation of a text.

    Iterate over the pieces of its text, or `read` it as a whole. It ends at a stop token or stop
    string, which is no part of `text`, or after `max_new_tokens`. A `prompt` with a template is a
    conversation, or its only message; without one, an empty prompt begins a document. `sampling`
    is that of `generate`. `text`, `ids` and `is_complete` (whether it ended before
    `max_new_tokens`) grow with the iteration; after a stop string `ids` are those of `text`.

    Raises ValueError for a prompt that the template cannot encode and as `generate` does.

        >>> Reply(model, tokenizer, "Hello", template, max_new_tokens=9).read().text
        'Hello! How can I'
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        prompt: str | Sequence[Message],
        template: Template | None = None,
        *,
        stops: Sequence[str] = (),
        max_new_tokens: int,
        **sampling: Any,
    ) -> None:
        if template is None:
            assert isinstance(prompt, str)
            prompt_ids, stop_ids = tokenizer.encode_prompt(prompt), tokenizer.end_ids
        else:
            messages = [Message("user", prompt)] if isinstance(prompt, str) else prompt
            prompt_ids, _ = template.encode(tokenizer, messages, add_generation_prompt=True)
            stop_ids, stops = template.stop_ids(tokenizer), [*stops, *template.stop_texts]
        self.text, self.is_complete = "", False
        self.ids: list[int] = []
        self._tokenizer, self._max_new_tokens = tokenizer, max_new_tokens
        self._detokenizer = Detokenizer(tokenizer.token_bytes(), stops)
        self._new_ids = generate(
            model, prompt_ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids, **sampling
        )

    def __iter__(self) -> Iterator[str]:
        for token in self._new_ids:
            self.ids.append(token)
            yield self._add(self._detokenizer.feed([token]))
            if self._detokenizer.stopped:
                break
        self.is_complete = self._detokenizer.stopped or len(self.ids) < self._max_new_tokens
        yield self._add(self._detokenizer.finish())
        if self._detokenizer.stopped:
            self.ids = self._tokenizer.encode(trimmed(self.text))

    def read(self) -> "Reply":
        """Generate the rest of the reply, and return it."""
        for _ in self:
            pass
        return self

    def _add(self, text: str) -> str:
        self.text += text
        return text


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
    """Return a lazy iterator over the tokens that continue `input_ids`.

    It ends after `max_new_tokens`, or before the first of `stop_ids`, which is not yielded.
    A temperature of 0 always takes the likeliest token. The same seed gives the same tokens; the
    random state of torch is neither read nor changed. A prompt longer than the context is truncated
    to its end; when the context is full, generation continues from its last half. A model whose
    blocks mix tokens outside `attend` recomputes the whole context for each token.

    Raises ValueError, at once, for an empty prompt, unknown ids and invalid sampling options.

        >>> list(generate(model, tokenizer.encode("def "), max_new_tokens=3, temperature=0))
        [305, 1117, 40]
    """
    for name, value, least, most in (
        ("max_new_tokens", max_new_tokens, 0, math.inf),
        ("temperature", temperature, 0, math.inf),
        ("top_k", top_k, 1, math.inf),
        ("top_p", top_p, 0, 1),
        ("min_p", min_p, 0, 1),
    ):
        if value is not None and not (least <= value <= most and value < math.inf):
            raise ValueError(f"{name}={value} is not a number from {least} to {most}")
    vocab_size, device = model.config.vocab_size, model.wte.weight.device
    if not len(input_ids) or not 0 <= min(input_ids) <= max(input_ids) < vocab_size:
        raise ValueError(
            f"the prompt is empty or has token ids other than 0 to {vocab_size - 1}; encode it "
            f"with the model's own tokenizer: tokenizer.encode_prompt(text)"
        )
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % 2**64)

    def tokens() -> Iterator[int]:
        block_size = model.config.block_size
        new = context = list(input_ids)[-block_size:]
        n_tokens = min(block_size, len(context) + max_new_tokens)
        with evaluating(model):
            cached = mixes_by_attend(model)
        cache = KVCache(model, n_tokens=n_tokens) if cached else None
        for _ in range(max_new_tokens):
            if len(context) > block_size:
                new = context = context[-max(1, block_size // 2) :]
                if cache is not None:
                    cache.length = 0
            with torch.inference_mode(), evaluating(model):
                ids = torch.tensor([new], device=device)  # (1, T)
                logits = model.head(model.hidden_states(ids, cache)[0, -1])  # (V,)
            weights = probabilities(logits, temperature, top_k, top_p, min_p)
            token = int(torch.multinomial(weights, 1, generator=generator))
            if token in stop_ids:
                return
            yield token
            context.append(token)
            new = context if cache is None else [token]

    return tokens()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Disable dropout in the block: before and after it the caller may train."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


class KVCache(Attend):
    """Attention over the keys and values of all tokens that a model has processed.

    The model's blocks mix tokens through `attend` alone (`mixes_by_attend`). Memory for `n_tokens`,
    by default `block_size`, is allocated at once; a smaller `length` truncates the cache.
    """

    def __init__(self, model: GPT, batch_size: int = 1, n_tokens: int | None = None) -> None:
        super().__init__()
        config, weight = model.config, model.wte.weight
        check_supported(config, "the KV cache (nanogpt/generation.py)", IN_MODEL)
        n_tokens = config.block_size if n_tokens is None else n_tokens
        shape = (config.n_layer, 2, batch_size, config.kv_heads, n_tokens, config.head_dim)
        self.entries = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.ids = torch.zeros(batch_size, n_tokens + 1, dtype=torch.long, device=weight.device)
        self.length = 0

    def before(self, input_ids: Tensor) -> Tensor:
        """Append input_ids (B, T); return the id before each of them (B, T)."""
        end = self.length + input_ids.size(1)
        self.ids[:, self.length + 1 : end + 1] = input_ids
        return self.ids[:, self.length : end]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append a layer's k and v and attend from q to all: (B, T, H, D) each.

        `length` grows with the last layer, so that all layers of a call start at one position. No
        gradient passes through the cache.
        """
        end = self.length + k.size(1)
        keys, values = self.entries[layer]  # (B, H, n_tokens, D) each
        with torch.no_grad():
            keys[:, :, self.length : end] = k.transpose(1, 2)
            values[:, :, self.length : end] = v.transpose(1, 2)
        if layer == len(self.entries) - 1:
            self.length = end
        y = causal_attention(q.transpose(1, 2), keys[:, :, :end], values[:, :, :end])
        return y.transpose(1, 2)


def probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Return the sampling distribution (..., V) of logits (..., V), filtered in this order.

    Temperature 0 is the limit: probability 1 for the likeliest token.
    """
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # no overflow near 0
    if top_k is None and top_p is None and min_p is None:
        return logits.softmax(-1)
    n = min(top_k or logits.size(-1), logits.size(-1))
    best = logits.topk(n) if top_k else logits.sort(descending=True)
    weights = best.values.softmax(-1)
    top_mass = 1.0 if top_p is None else top_p
    allowed = allowed_tokens(weights, weights.cumsum(-1), n, top_mass, min_p or 0.0)
    values = best.values.masked_fill(~allowed, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(-1, best.indices, values).softmax(-1)


def allowed_tokens(
    weights: Tensor,
    sums: Tensor,
    top_k: Tensor | int,
    top_mass: Tensor | float,
    min_p: Tensor | float,
) -> Tensor:
    """Return which tokens (..., K) may be drawn, of weights (..., K) in descending order.

    Those are the `top_k` likeliest; of them, those that sum to `top_mass`, at least one ("The
    Curious Case of Neural Text Degeneration", section 3.1); and of them, those of at least `min_p`
    times the largest weight ("Min-p Sampling", arXiv 2407.01082). `sums` (..., K) are the running
    sums of the weights.
    """
    ranks = torch.arange(weights.size(-1), device=weights.device)
    is_within = (sums - weights < top_mass) | (ranks == 0)
    return (ranks < top_k) & is_within & (weights >= min_p * weights[..., :1])
