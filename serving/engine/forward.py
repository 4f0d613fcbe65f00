"""A GPT over slots: any tokens of any sequences in one pass, each as if it were alone.

A step computes rows: one for each sequence that writes, many for one that is read in. A row's
result depends on its own sequence only, bit for bit. Matrix products give a row the same bits
whatever stands beside it once there are enough rows (`smallest_batch` finds how many; below, on
CPUs in fp32, other kernels are used). Attention is computed for each sequence apart, over its own
context rounded up to whole blocks, so that reading and writing a token add in the same order.

Shapes: R rows, C channels, H heads, D head size, T context, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.classifier import Classifier
from nanogpt.model import GPT, NORM_EPSILON, Block, rotary_angles, rotate

CONTEXT_BLOCK = 64  # tokens; attention reads whole blocks
LARGEST_PROBE = 64  # rows
PROBES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32)


@dataclass(frozen=True)
class Span:
    """Tokens that follow each other in a slot, the first at `start`."""

    slot: int
    start: int
    ids: list[int]


class _Piece(NamedTuple):
    """Rows of one slot whose last positions lie in one block of context."""

    rows: slice
    slot: int
    n_context: int
    hidden: Tensor  # (rows, T) booleans: the keys after each row's own


class Forward:
    """Compute states and logits of spans, with keys and values in `cache` (L, 2, S, H, T, D)."""

    def __init__(self, model: GPT, cache: Tensor, *, int8: bool = False) -> None:
        self.model, self.config, self.cache = model, model.config, cache
        self.device, self.dtype = cache.device, cache.dtype
        self.head: Callable[[Tensor], Tensor] = model.head
        if int8:
            self.model, self.head = with_int8_weights(model)
        self.min_rows = self._smallest_batch()

    def _smallest_batch(self) -> int:
        first, row = self.model.h[0], self.model.wte.weight[0]
        assert isinstance(first, Block)
        wide = row.repeat(4)
        maps: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
            (first.attn.c_attn, row),
            (first.mlp.c_fc, row),
            (first.mlp.c_proj, wide),
            (self.head, row),
        ]
        return max(smallest_batch(linear, like) for linear, like in maps)

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
            head_size = self.config.n_embd // self.config.n_head
            rotation = rotary_angles(F.pad(positions, (0, len(x) - len(ids))), head_size)
        for layer, block in enumerate(self.model.h):
            assert isinstance(block, Block)
            qkv = self._qkv(block, block.ln_1(x), rotation)
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

    def _qkv(self, block: Block, x: Tensor, rotation: Tensor | None) -> Tensor:
        """Return queries, keys and values (3, R, H, D)."""
        config = self.config
        head_size = config.n_embd // config.n_head
        q, k, v = block.attn.c_attn(x).view(len(x), 3, config.n_head, head_size).unbind(1)
        if config.qk_norm:
            norm = F.rms_norm if config.norm == "rmsnorm" else F.layer_norm
            q, k = norm(q, (head_size,), eps=NORM_EPSILON), norm(k, (head_size,), eps=NORM_EPSILON)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return torch.stack((q, k, v))

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
            y[piece.rows] = self._gather(q[piece.rows], keys, values, piece.hidden)
        return y.flatten(1)

    def _gather(self, q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(D)) v (rows, H, D) of queries (rows, H, D)."""
        n_rows = len(q)
        q, hidden = self._padded(q).transpose(0, 1), self._padded(hidden)  # (H, rows, D)
        scores = torch.bmm(q, keys.transpose(1, 2)).float() * q.size(-1) ** -0.5  # (H, rows, T)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(values.dtype)
        return torch.bmm(weights, values).transpose(0, 1)[:n_rows]

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
        n_missing = self.min_rows - len(x)
        return x if n_missing <= 0 else torch.cat((x, x.new_zeros(n_missing, *x.shape[1:])))

    def _column(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.device)


@torch.inference_mode()
def smallest_batch(linear: Callable[[Tensor], Tensor], like: Tensor) -> int:
    """Return how many rows it takes for a product to give a row the same bits in any batch.

    Found by trying on rows such as `like` (C,): each size from there on agrees with a large one.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(LARGEST_PROBE, len(like), generator=generator).to(like)
    among_many = linear(x)
    differing = [n for n in PROBES if not linear(x[-n:]).equal(among_many[-n:])]
    return min((n for n in PROBES if n > max(differing, default=0)), default=LARGEST_PROBE)


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
        y = torch._weight_int8pack_mm(x, self.weight, self.scales)
        return y if self.bias is None else y + self.bias


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights (N, K) as int8 and the float32 scale (N,) of each row, exact in bfloat16."""
    scales = (weight.float().abs().amax(1) / 127).clamp_min(1e-12).to(torch.bfloat16).float()
    return (weight.float() / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def with_int8_weights(model: GPT) -> tuple[GPT, Int8Linear]:
    """Replace the linear maps of a bfloat16 model's blocks; return it and its head as one more."""
    for block in model.h:
        assert isinstance(block, Block)
        for module, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc")):
            _replace(module, name)
        _replace(block.mlp, "c_proj")
    return model, Int8Linear(model.wte.weight[: model.config.vocab_size], None)


def _replace(module: nn.Module, name: str) -> None:
    linear = getattr(module, name)
    setattr(module, name, Int8Linear(linear.weight, linear.bias))
