"""A GPT over slots: any tokens of any sequences in one pass, each as if it were alone.

A step computes rows: one for each sequence that writes, many for one that is read in. A row's
result depends on its own sequence only, bit for bit. Matrix products give a row the same bits
whatever stands beside it where the number of rows is a multiple of what `row_multiple` finds (CPU
kernels in fp32 compute by fours and divide rows among threads; what is left over goes another way).
Attention is computed for each sequence apart, over its own
context rounded up to whole blocks, so that reading and writing a token add in the same order.

Shapes: R rows, C channels, H heads, D head size, T context, V vocabulary.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.classifier import Classifier
from nanogpt.model import GPT, NORM_EPSILON, Block, rotary_angles, rotate

CONTEXT_BLOCK = 64  # tokens; attention reads whole blocks
MULTIPLES = (1, 2, 4, 8, 16, 32)  # of rows
PROBES = (1, 2, 3, 4, 5, 7, 8, 13)  # how many of a multiple are tried

log = logging.getLogger(__name__)


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
    """Compute states and logits of spans, with keys and values in `cache` (L, 2, S, H, T, D)."""

    def __init__(self, model: GPT, cache: Tensor, *, int8: bool = False) -> None:
        self.model, self.config, self.cache = model, model.config, cache
        self.device, self.dtype = cache.device, cache.dtype
        self.head: Callable[[Tensor], Tensor] = model.head
        if int8:
            self.model, self.head = with_int8_weights(model)
        every = torch.arange(self.config.block_size, device=self.device)
        self.rotations = rotary_angles(every, self.config.n_embd // self.config.n_head)
        self.row_multiple = self._row_multiple()

    def _row_multiple(self) -> int:
        first, row = self.model.h[0], self.model.wte.weight[0].to(self.dtype)
        assert isinstance(first, Block)
        maps: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
            (first.attn.c_attn, row),
            (first.attn.c_proj, row),
            (first.mlp.c_fc, row),
            (first.mlp.c_proj, row.repeat(4)),
            (self.head, row),
            *((self._gathering(n), row) for n in {CONTEXT_BLOCK, self.config.block_size}),
        ]
        return max(row_multiple(compute, like) for compute, like in maps)

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
            own, hidden = self._padded(q[piece.rows]), self._padded(piece.hidden)
            y[piece.rows] = gather(own, keys, values, hidden)[: len(piece.hidden)]
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


@torch.inference_mode()
def row_multiple(compute: Callable[[Tensor], Tensor], like: Tensor) -> int:
    """Return the number of rows whose multiples all get the same bits from a computation.

    Found by trying on rows such as `like` (C,).
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(MULTIPLES[-1] * 4, len(like), generator=generator).to(like)
    among_many = compute(x)
    for multiple in MULTIPLES:
        sizes = [multiple * n for n in PROBES if multiple * n <= len(x)]
        if all(compute(x[-size:]).equal(among_many[-size:]) for size in sizes):
            return multiple
    log.warning("no number of rows makes rows the same in any batch: answers may differ")
    return MULTIPLES[-1]


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
