"""The forward pass of the server: tokens of any sequences in one pass, each row as if alone.

A step computes rows: one for each sequence in decode, many for one in prefill. A row's result
depends on its own sequence only, bit for bit. Matrix products give a row the same bits in any
company where the number of rows is a multiple of `row_multiple`, which is found by trials (CPU
kernels in fp32 compute by fours and divide rows among threads; the remainder takes another path).
Where there is no such number (a GPU's library may choose another kernel for each), products are
always computed for the same number of rows. Attention is computed for each sequence apart, over its
own context rounded up to whole blocks, so that prefill and decode of a token add in the same order.

On a GPU this is right by design but was not measured: each sequence's attention is a launch of its
own in every layer, and CUDA graphs, which would hide that, are not used.

Shapes: R rows, C channels, H heads, H' heads of keys and values, D head size, T context,
V vocabulary, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.classifier import Classifier
from nanogpt.model import GPT, Attend, soft_capped

CONTEXT_BLOCK = 64  # tokens; attention reads whole blocks
MULTIPLES = (1, 2, 4, 8, 16, 32)  # of rows
PROBES = (1, 2, 3, 4, 5, 7, 8, 13)  # how many of a multiple are tried
PROBED_ROWS = 128
TILE_ROWS = 32  # rows of each product where no multiple is invariant


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a slot, the first at `start` and after the token `before`."""

    slot: int
    start: int
    ids: list[int]
    before: int = 0


def ids_before(spans: list[Span]) -> list[int]:
    """Return the id before each token of spans."""
    return [i for span in spans for i in (span.before, *span.ids[:-1])]


# Rows of one slot and block of context; the slot; the keys after each row's own (rows, T) bool.
Piece = tuple[slice, int, Tensor]


class Forward:
    """Compute states and logits of spans, with keys and values in `cache` (L, 2, S, H', T, D).

    Unless `invariant`, rows are not padded: a row's bits may depend on how many there are.
    """

    def __init__(
        self, model: GPT, cache: Tensor, *, int8: bool = False, invariant: bool = True
    ) -> None:
        self.model, self.config, self.cache = model, model.config, cache
        self.device = cache.device
        self.head: Callable[[Tensor], Tensor] = model.head
        if int8:
            _replace_linear(model, lambda linear: Int8Linear(linear.weight, linear.bias))
            int8_head = Int8Linear(model.unembedding.weight[: self.config.vocab_size], None)
            self.head = lambda x: soft_capped(int8_head(x), self.config.logit_softcap)
        self.rotation = model.rotation(torch.arange(self.config.block_size, device=self.device))
        self.max_attention_rows = self.config.block_size
        self.row_multiple = 1
        if invariant and not self._find_row_multiple():
            _replace_linear(self.model, lambda linear: InTiles(linear, TILE_ROWS))
            self.head = InTiles(self.head, TILE_ROWS)
            self.row_multiple = self.max_attention_rows = TILE_ROWS

    def _find_row_multiple(self) -> bool:
        """Set the number of rows of which every product gets a multiple, if there is one.

        In trials of the first block and the head, after random contexts, the last rows of a text
        must have the same bits alone and after others.
        """
        config, blocks, context = self.config, self.model.h, self.cache[0, :, 0]  # (2, H', T, D)
        n_rows = min(PROBED_ROWS, config.block_size)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (n_rows,), generator=generator).tolist()
        context.copy_(torch.randn(context.shape, generator=generator))

        def outputs(start: int, n: int) -> Tensor:
            span = Span(0, start + n_rows - n, ids[-n:], ids[-n - 1] if n < n_rows else 0)
            states = self.hidden_states([span])
            if isinstance(self.model, Classifier):
                return torch.cat([self.logits(states), self.class_probabilities(states)], -1)
            return self.logits(states)

        def is_invariant(multiple: int, start: int) -> bool:
            self.row_multiple = multiple
            whole = outputs(start, n_rows)
            sizes = [n * multiple for n in PROBES if n * multiple <= n_rows]
            return all(outputs(start, n).equal(whole[-n:]) for n in sizes)

        self.model.h = blocks[:1]
        starts = {0, config.block_size - n_rows}
        is_found = any(all(is_invariant(m, start) for start in starts) for m in MULTIPLES)
        self.model.h = blocks
        context.zero_()
        return is_found

    @torch.inference_mode()
    def hidden_states(self, spans: list[Span]) -> Tensor:
        """Append spans to their slots; return the normalised final states (R, C) of all rows."""
        ids = self._padded(self._column([i for span in spans for i in span.ids]))
        slots = self._column([span.slot for span in spans for _ in span.ids])
        positions = self._column([span.start + n for span in spans for n in range(len(span.ids))])
        attend = SlotAttend(self.cache, slots, positions, self._pieces(spans))
        positions = self._padded(positions)
        rotation = None if self.rotation is None else self.rotation[:, positions]
        before = self._padded(self._column(ids_before(spans)))
        x = self.model.embed(ids, positions, before)[None]  # (1, R, C)
        return self.model.run_blocks(x, rotation, attend)[0, : len(slots)]

    @torch.inference_mode()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return the logits (R, V) float32 of states (R, C)."""
        return self._computed(self.head, hidden_states)

    @torch.inference_mode()
    def class_probabilities(self, hidden_states: Tensor) -> Tensor:
        """Return a classifier's probabilities (R, K) float32 of states (R, C)."""
        assert isinstance(self.model, Classifier)
        return self._computed(self.model.classes, hidden_states).softmax(-1)

    def _computed(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return compute(self._padded(x))[: len(x)].float()

    def _pieces(self, spans: list[Span]) -> list[Piece]:
        pieces, row = [], 0
        for span in spans:
            start, end = span.start, span.start + len(span.ids)
            while start < end:
                n_context = (start // CONTEXT_BLOCK + 1) * CONTEXT_BLOCK
                stop = min(end, n_context, start + self.max_attention_rows)
                n_context = min(n_context, self.config.block_size)
                own = torch.arange(start, stop, device=self.device)
                masked = torch.arange(n_context, device=self.device) > own[:, None]
                rows = slice(row, row + stop - start)
                pieces.append((rows, span.slot, self._padded(masked)))
                row, start = rows.stop, stop
        return pieces

    def _padded(self, x: Tensor) -> Tensor:
        n_missing = -len(x) % self.row_multiple
        return x if n_missing == 0 else torch.cat((x, x.new_zeros(n_missing, *x.shape[1:])))

    def _column(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.device)


class SlotAttend(Attend):
    """Attention of rows, each to its own slot of a cache (L, 2, S, H', T, D).

    `slots` and `positions` (R,) are where keys and values are stored.
    """

    def __init__(
        self, cache: Tensor, slots: Tensor, positions: Tensor, pieces: list[Piece]
    ) -> None:
        super().__init__()
        self.cache, self.slots, self.positions, self.pieces = cache, slots, positions, pieces

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store a layer's k and v (1, R, H', D); return the attention (1, R, H, D) of q."""
        q, n_rows = q[0], len(self.slots)
        for entries, new in zip(self.cache[layer], (k[0], v[0]), strict=True):
            entries[self.slots, :, self.positions] = new[:n_rows]
        y = torch.zeros_like(q)
        for rows, slot, masked in self.pieces:
            keys, values = self.cache[layer, :, slot, :, : masked.size(1)]  # (H', T, D) each
            own = F.pad(q[rows], (0, 0, 0, 0, 0, len(masked) - len(q[rows])))
            y[rows] = attention(own, keys, values, masked)[: rows.stop - rows.start]
        return y[None]


def attention(q: Tensor, keys: Tensor, values: Tensor, masked: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v (R, H, D) of queries (R, H, D) over keys (H', T, D).

    H / H' consecutive query heads share one of the keys' heads. `masked` (R, T) bool are the keys
    that a query does not attend to.
    """
    if len(keys) < q.size(1):
        n_sharing = q.size(1) // len(keys)
        keys, values = (part.repeat_interleave(n_sharing, 0) for part in (keys, values))
    scores = torch.bmm(q.transpose(0, 1), keys.transpose(1, 2)).float()  # (H, R, T)
    scores = (scores * q.size(-1) ** -0.5).masked_fill(masked, -torch.inf)
    return torch.bmm(scores.softmax(-1).to(values.dtype), values).transpose(0, 1)


class InTiles(nn.Module):
    """A computation over rows (..., R, C), R a multiple of n_rows, of n_rows at a time."""

    def __init__(self, compute: Callable[[Tensor], Tensor], n_rows: int) -> None:
        super().__init__()
        self.compute, self.n_rows = compute, n_rows

    def forward(self, x: Tensor) -> Tensor:
        """Return the results (..., R, N) of rows (..., R, C)."""
        return torch.cat([self.compute(rows) for rows in x.split(self.n_rows, -2)], -2)


class Int8Linear(nn.Module):
    """A linear map whose weights (N, K) are rounded to 8 bits, with a scale for each output."""

    weight: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.float()
        scales = (weight.abs().amax(1) / 127).clamp_min(1e-12).to(torch.bfloat16)
        quantized = (weight / scales.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", quantized.to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else bias.detach().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """Return the products (..., N) of bfloat16 inputs (..., K)."""
        if x.is_cpu:
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scales)
            y = y.unflatten(0, x.shape[:-1])
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scales
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def round_to_24_bits(model: GPT) -> None:
    """Round a float32 model's matrices to 15 bits of mantissa: to nearest, ties to even."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            bits = parameter.view(torch.int32)
            bits += 0x7F + (bits >> 8 & 1)
            bits &= ~0xFF


def _replace_linear(model: GPT, replaced: Callable[[Any], nn.Module]) -> None:
    """Replace every linear map, plain or int8, of a model's blocks."""
    for module in list(model.h.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear | Int8Linear):
                setattr(module, name, replaced(child))
