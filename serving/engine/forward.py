"""A GPT over slots: any tokens of any sequences in one pass, each as if it were alone.

A step computes rows: one for each sequence that writes, many for one that is read in. A row's
result depends on its own sequence only, bit for bit. Matrix products give a row the same bits
whatever stands beside it where the number of rows is a multiple of what `row_multiple` finds (CPU
kernels in fp32 compute by fours and divide rows among threads; what is left over goes another way).
Where no number does (a GPU's library may choose another kernel for each), products are computed for
the same number of rows at a time, always. Attention is computed for each sequence apart, over its
own context rounded up to whole blocks, so that reading and writing a token add in the same order.

On a GPU this is right by design but was not measured: each sequence's attention is a launch of its
own in every layer, and CUDA graphs, which would hide that, are not used.

Shapes: R rows, C channels, H heads, D head size, T context, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.classifier import Classifier
from nanogpt.model import GPT, Block, rotary_angles

CONTEXT_BLOCK = 64  # tokens; attention reads whole blocks
MULTIPLES = (1, 2, 4, 8, 16, 32)  # of rows
PROBES = (1, 2, 3, 4, 5, 7, 8, 13)  # how many of a multiple are tried
PROBED_ROWS = 128
TILE_ROWS = 32  # at a time where no multiple does


@dataclass(frozen=True)
class Span:
    """Tokens that follow each other in a slot, the first at `start`."""

    slot: int
    start: int
    ids: list[int]


class Computes(Protocol):
    """What a runner asks of a forward pass."""

    device: torch.device

    def hidden_states(self, spans: list[Span]) -> Tensor: ...

    def logits(self, hidden_states: Tensor) -> Tensor: ...

    def class_probabilities(self, hidden_states: Tensor) -> Tensor: ...


class _Piece(NamedTuple):
    """Rows of one slot whose last positions lie in one block of context."""

    rows: slice
    slot: int
    n_context: int
    hidden: Tensor  # (rows, T) booleans: the keys after each row's own


class Forward:
    """Compute states and logits of spans, with keys and values in `cache` (L, 2, S, H, T, D).

    Unless `invariant`, rows are not padded: a row's bits may depend on how many there are.
    """

    def __init__(
        self, model: GPT, cache: Tensor, *, int8: bool = False, invariant: bool = True
    ) -> None:
        self.model, self.config, self.cache = model, model.config, cache
        self.device, self.dtype = cache.device, cache.dtype
        self.head: Callable[[Tensor], Tensor] = model.head
        if int8:
            self.model, self.head = with_int8_weights(model)
        every = torch.arange(self.config.block_size, device=self.device)
        self.rotations = rotary_angles(every, self.config.n_embd // self.config.n_head)
        self.gather = gather
        self.row_multiple = self._row_multiple() if invariant else 1

    def _row_multiple(self) -> int:
        """Return the number of rows that every product gets a multiple of."""
        multiples = [row_multiple(compute, like) for compute, like in self._products()]
        found = [multiple for multiple in multiples if multiple is not None]
        if len(found) == len(multiples):
            return max(found)
        _each_linear(self.model, lambda linear: InTiles(linear, TILE_ROWS))
        self.head, self.gather = InTiles(self.head, TILE_ROWS), gather_in_tiles
        return TILE_ROWS

    def _products(self) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
        """Return one of each kind of product over rows, and what a row is like."""
        first, row = self.model.h[0], self.model.wte.weight[0].to(self.dtype)
        assert isinstance(first, Block)
        return [
            (first.attn.c_attn, row),
            (first.attn.c_proj, row),
            (first.mlp.c_fc, row),
            (first.mlp.c_proj, row.repeat(4)),
            (self.head, row),
            *([(self.model.classes, row)] if isinstance(self.model, Classifier) else []),
            *((self._gathering(n), row) for n in {CONTEXT_BLOCK, self.config.block_size}),
        ]

    def _gathering(self, n_context: int) -> Callable[[Tensor], Tensor]:
        """Return attention over some context as a function of queries (R, C)."""
        n_head = self.config.n_head
        head_size = self.config.n_embd // n_head
        generator = torch.Generator().manual_seed(1)
        random = torch.randn(2, n_head, n_context, head_size, generator=generator)
        keys, values = random.to(self.cache)  # (H, T, D) each
        hidden = torch.zeros(1, n_context, dtype=torch.bool, device=self.device)
        return lambda x: gather(x.view(-1, n_head, head_size), keys, values, hidden).flatten(1)

    @torch.inference_mode()
    def hidden_states(self, spans: list[Span]) -> Tensor:
        """Read spans into their slots; return the normalised final states (R, C) of all rows."""
        ids = self._column([i for span in spans for i in span.ids])
        slots = self._column([span.slot for span in spans for _ in span.ids])
        positions = self._column([span.start + n for span in spans for n in range(len(span.ids))])
        pieces = self._pieces(spans)
        x = self._padded(self.model.wte(ids).to(self.dtype))  # (R, C)
        rotation = None
        if self.config.position == "learned":
            x = x + self._padded(self.model.wpe(positions).to(self.dtype))
        else:
            rotation = self.rotations[:, F.pad(positions, (0, len(x) - len(ids)))]
        for layer, block in enumerate(self.model.h):
            assert isinstance(block, Block)
            qkv = torch.stack(block.attn.qkv(block.ln_1(x), rotation))  # (3, R, H, D)
            x = x + block.attn.c_proj(self._attention(layer, qkv, slots, positions, pieces))
            x = x + block.mlp(block.ln_2(x))
        return self.model.ln_f(x)[: len(ids)]

    @torch.inference_mode()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return the logits (R, V) float32 of states (R, C)."""
        return self.head(self._padded(hidden_states))[: len(hidden_states)].float()

    @torch.inference_mode()
    def class_probabilities(self, hidden_states: Tensor) -> Tensor:
        """Return a classifier's probabilities (R, K) float32 of states (R, C)."""
        assert isinstance(self.model, Classifier)
        logits = self.model.classes(self._padded(hidden_states))[: len(hidden_states)]
        return logits.float().softmax(-1)

    def _attention(
        self, layer: int, qkv: Tensor, slots: Tensor, positions: Tensor, pieces: list[_Piece]
    ) -> Tensor:
        """Store new keys and values; return what each row gathers (R, C)."""
        q, k, v = qkv
        self.cache[layer, 0][slots, :, positions] = k[: len(slots)]
        self.cache[layer, 1][slots, :, positions] = v[: len(slots)]
        y = torch.zeros_like(q)
        for piece in pieces:
            keys, values = self.cache[layer, :, piece.slot, :, : piece.n_context]  # (H, T, D) each
            own, hidden = self._padded(q[piece.rows]), self._padded(piece.hidden)
            y[piece.rows] = self.gather(own, keys, values, hidden)[: len(piece.hidden)]
        return y.flatten(1)

    def _pieces(self, spans: list[Span]) -> list[_Piece]:
        pieces, row = [], 0
        for span in spans:
            start, end = span.start, span.start + len(span.ids)
            while start < end:
                n_context = (start // CONTEXT_BLOCK + 1) * CONTEXT_BLOCK
                stop = min(end, n_context)
                n_context = min(n_context, self.config.block_size)
                own = torch.arange(start, stop, device=self.device)
                hidden = torch.arange(n_context, device=self.device) > own[:, None]
                pieces.append(_Piece(slice(row, row + stop - start), span.slot, n_context, hidden))
                row, start = row + stop - start, stop
        return pieces

    def _padded(self, x: Tensor) -> Tensor:
        n_missing = -len(x) % self.row_multiple
        return x if n_missing == 0 else torch.cat((x, x.new_zeros(n_missing, *x.shape[1:])))

    def _column(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.device)


def gather(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v (R, H, D) of queries (R, H, D) over keys (H, T, D)."""
    scores = torch.bmm(q.transpose(0, 1), keys.transpose(1, 2)).float()  # (H, R, T)
    scores = (scores * q.size(-1) ** -0.5).masked_fill(hidden, -torch.inf)
    return torch.bmm(scores.softmax(-1).to(values.dtype), values).transpose(0, 1)


def gather_in_tiles(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """Do as `gather` does, for TILE_ROWS queries at a time."""
    tiles = zip(q.split(TILE_ROWS), hidden.split(TILE_ROWS), strict=True)
    return torch.cat([gather(own, keys, values, unseen) for own, unseen in tiles])


class InTiles(nn.Module):
    """A computation over rows (R, C), R a multiple of n_rows, that gets n_rows at a time."""

    def __init__(self, compute: Callable[[Tensor], Tensor], n_rows: int) -> None:
        super().__init__()
        self.compute, self.n_rows = compute, n_rows

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.compute(rows) for rows in x.split(self.n_rows)])


@torch.inference_mode()
def row_multiple(compute: Callable[[Tensor], Tensor], like: Tensor) -> int | None:
    """Return the number of rows whose multiples all get the same bits from a computation.

    Found by trying on rows such as `like` (C,). None where there is no such number.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBED_ROWS, len(like), generator=generator).to(like)
    among_many = compute(x)
    for multiple in MULTIPLES:
        sizes = [multiple * n for n in PROBES if multiple * n <= len(x)]
        if all(compute(x[-size:]).equal(among_many[-size:]) for size in sizes):
            return multiple
    return None


class Int8Linear(nn.Module):
    """A linear map whose weights (N, K) are rounded to 8 bits, with a scale for each output."""

    weight: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        quantized, scales = quantize(weight)
        self.register_buffer("weight", quantized)
        self.register_buffer("scales", scales.to(torch.bfloat16))
        self.bias = None if bias is None else bias.detach().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu:
            y = torch._weight_int8pack_mm(x, self.weight, self.scales)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scales
        return y if self.bias is None else y + self.bias


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights (N, K) as int8 and the float32 scale (N,) of each row, exact in bfloat16."""
    scales = (weight.float().abs().amax(1) / 127).clamp_min(1e-12).to(torch.bfloat16).float()
    return (weight.float() / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def with_int8_weights(model: GPT) -> tuple[GPT, Int8Linear]:
    """Replace the linear maps of a bfloat16 model's blocks; return it and its head as one more."""
    _each_linear(model, lambda linear: Int8Linear(linear.weight, linear.bias))
    return model, Int8Linear(model.wte.weight[: model.config.vocab_size], None)


@torch.no_grad()
def round_to_24_bits(model: GPT) -> None:
    """Leave a float32 model's matrices 15 bits of mantissa: to nearest, ties to even."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            bits = parameter.view(torch.int32)
            bits += 0x7F + (bits >> 8 & 1)
            bits &= ~0xFF


def _each_linear(model: GPT, replaced: Callable[[Any], nn.Module]) -> None:
    """Put others in the place of the linear maps of a model's blocks."""
    for block in model.h:
        assert isinstance(block, Block)
        for module in (block.attn, block.mlp):
            for name, linear in list(module.named_children()):
                setattr(module, name, replaced(linear))
