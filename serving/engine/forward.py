"""The forward pass of the server in torch: tokens of any sequences at once, each row as if alone.

A step computes rows: one for each sequence in decode, many for one in prefill. A row's result
depends on its own sequence only, bit for bit. Matrix products give a row the same bits in any
company where the number of rows is a multiple of `row_multiple`, which is found by trials (CPU
kernels in fp32 compute by fours and divide rows among threads; the remainder takes another path).
Where there is no such number (a GPU's library chooses a kernel by the number of rows), products are
always computed for the same number of rows.

Attention takes one call in each layer for all queries over contexts of one length. On a CPU, a
context is rounded up to whole blocks and queries to a multiple, because the order in which its
kernels add depends on both, though not on the number of sequences. On a GPU, all contexts of a step
have one length: its kernel reads keys in order, and those behind the mask change nothing. A step of
decode is then one program of tensors whose shapes are few, which is captured as a CUDA graph.

Shapes: R rows, C channels, H heads, H' heads of keys and values, D head size, T context, S slots,
V vocabulary, K classes; of one call of attention, N sequences and Q queries of each.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanogpt.classifier import Classifier
from nanogpt.model import GPT, Attend, soft_capped

CONTEXT_BLOCK = 64  # tokens; attention reads whole blocks
MULTIPLES = (1, 2, 4, 8, 16, 32)  # of rows
QUERY_MULTIPLE = 4  # of a CPU's attention: in bf16, some sums of fewer queries differ, but few
PROBES = (1, 2, 3, 4, 5, 7, 8, 13)  # how many of a multiple are tried
PROBED_ROWS = 128
UNREAD = -1  # the id of a token that was drawn on the device and that the host does not know yet
TILE_ROWS = 32  # rows of each product where no multiple is invariant; on a GPU, at least
# Without cuDNN, which prepares a plan for each shape.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a slot, the first at `start` and after the token `before`."""

    slot: int
    start: int
    ids: list[int]
    before: int = 0


def in_few_shapes(spans: list[Span]) -> list[Span]:
    """Return spans of decode with copies of the first up to a power of two: each is a graph."""
    return spans + spans[:1] * (_power_of_two(len(spans)) - len(spans))


def ids_before(spans: list[Span]) -> list[int]:
    """Return the id before each token of spans."""
    return [i for span in spans for i in (span.before, *span.ids[:-1])]


# Of a call of attention: N slots, Q queries of each, tokens of context, and the first slot of N
# neighbours, which are read in place; the keys and values of other slots are copied.
Shape = tuple[int, int, int, int | None]
# Its rows (N, Q) and slots (N,), and what is added to the scores (N, H', Q H / H', T) of a head.
Piece = tuple[Tensor, Tensor | slice, Tensor]


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
        self.is_cpu = self.device.type == "cpu"
        self.max_queries = self.config.block_size
        self.row_multiple = 1
        if invariant and not (self.is_cpu and self._find_row_multiple()):
            n_tiles = 1 if self.is_cpu else -(-cache.size(2) // TILE_ROWS)
            n_rows = n_tiles * TILE_ROWS
            _replace_linear(self.model, lambda linear: InTiles(linear, n_rows))
            self.head = InTiles(self.head, n_rows)
            self.row_multiple = n_rows
            if self.is_cpu:
                self.max_queries = n_rows
        self.decode = Captured(self.states, self.device)

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
        n_rows = sum(len(span.ids) for span in spans)
        if self.is_cpu or n_rows > len(spans):
            numbers, _, n_padded, shapes = self.layout(spans)
            return self.states(upload(numbers, self.device), n_rows, n_padded, shapes)[:n_rows]
        return self.decode(*self.layout(in_few_shapes(spans)))[:n_rows].clone()

    def layout(self, spans: list[Span]) -> tuple[Tensor, int, int, tuple[Shape, ...]]:
        """Return the arguments of `states` for spans.

        Each part of a span is a slot's queries in one call of attention; those of one context and
        number of queries share a call.
        """
        groups: dict[tuple[int, int], list[tuple[int, range]]] = {}  # a slot and its rows
        positions, slots = list[int](), list[int]()
        multiple = max(QUERY_MULTIPLE, self.row_multiple) if self.is_cpu else 1
        longest = max(span.start + len(span.ids) for span in spans)
        for span in spans:
            start, end = span.start, span.start + len(span.ids)
            slots += [span.slot] * len(span.ids)
            while start < end:
                n_blocks = (start if self.is_cpu else longest - 1) // CONTEXT_BLOCK + 1
                n_blocks = n_blocks if self.is_cpu else _power_of_two(n_blocks)
                n_context = min(n_blocks * CONTEXT_BLOCK, self.config.block_size)
                n = min(end, n_context, start + self.max_queries) - start
                members = groups.setdefault((n_context, _power_of_two(max(n, multiple))), [])
                members.append((span.slot, range(len(positions), len(positions) + n)))
                positions += range(start, start + n)
                start += n
        n_rows, shapes, tail, at = len(slots), [], list[int](), 0
        order = [0] * n_rows
        for (n_context, n_queries), members in groups.items():
            of_members, first = [slot for slot, _ in members], members[0][0]
            is_run = self.is_cpu and of_members == list(range(first, first + len(members)))
            shapes.append((len(members), n_queries, n_context, first if is_run else None))
            tail += of_members
            for _, rows in members:
                tail += [rows[min(i, len(rows) - 1)] for i in range(n_queries)]
                order[rows.start : rows.stop] = range(at, at + len(rows))
                at += n_queries
        ids = [i for span in spans for i in span.ids]
        columns = (ids, ids_before(spans), positions, slots, order)
        n_padded = n_rows + -n_rows % self.row_multiple
        head = [n for column in columns for n in column + column[:1] * (n_padded - n_rows)]
        return torch.tensor(head + tail), n_rows, n_padded, tuple(shapes)

    def states(
        self, numbers: Tensor, n_rows: int, n_padded: int, shapes: tuple[Shape, ...]
    ) -> Tensor:
        """Return the states (n_padded, C) of rows, the first `n_rows` of which are stored.

        `numbers` int64 are the id, the id before, the position, the slot and the query of each row,
        then the slots and the rows (N, Q) of the pieces of each shape.
        """
        sizes = [n for n_slots, n_queries, _, _ in shapes for n in (n_slots, n_slots * n_queries)]
        ids, before, positions, slots, order, *parts = numbers.split([n_padded] * 5 + sizes)
        pieces, n_sharing = list[Piece](), self.config.n_head // self.config.kv_heads
        for shape, own, rows in zip(shapes, parts[::2], parts[1::2], strict=True):
            n_slots, n_queries, n_context, first = shape
            rows = rows.view(n_slots, n_queries)
            keys = torch.arange(n_context, device=rows.device)
            masked = keys > positions[rows].repeat(1, n_sharing)[:, None, :, None]
            mask = torch.zeros_like(masked, dtype=self.cache.dtype).masked_fill(masked, -torch.inf)
            index = own if first is None else slice(first, first + n_slots)
            pieces.append((rows, index, mask))
        attend = SlotAttend(self.cache, slots[:n_rows], positions[:n_rows], pieces, order)
        rotation = None if self.rotation is None else self.rotation[:, positions]
        x = self.model.embed(ids, positions, before)[None]  # (1, R, C)
        with sdpa_kernel(BACKENDS):
            return self.model.run_blocks(x, rotation, attend)[0]

    @torch.inference_mode()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return the logits (R, V) float32 of states (R, C); on a GPU, of more rows that pad."""
        logits = self._computed(self.head, hidden_states)
        return logits[: len(hidden_states)] if self.is_cpu else logits

    @torch.inference_mode()
    def class_probabilities(self, hidden_states: Tensor) -> Tensor:
        """Return a classifier's probabilities (R, K) float32 of states (R, C)."""
        assert isinstance(self.model, Classifier)
        classes = self._computed(self.model.classes, hidden_states)
        return classes[: len(hidden_states)].softmax(-1)

    def _computed(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return compute(F.pad(x, (0, 0, 0, -len(x) % self.row_multiple))).float()


class SlotAttend(Attend):
    """Attention of rows, each to its own slot of a cache (L, 2, S, H', T, D).

    The first rows' keys and values are stored at `slots` and `positions`. `order` (R,) are the
    rows' queries among those of all pieces.
    """

    def __init__(
        self, cache: Tensor, slots: Tensor, positions: Tensor, pieces: list[Piece], order: Tensor
    ) -> None:
        super().__init__()
        self.cache, self.slots, self.positions = cache, slots, positions
        self.pieces, self.order = pieces, order

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store a layer's k and v (1, R, H', D); return the attention (1, R, H, D) of q."""
        for entries, new in zip(self.cache[layer], (k[0], v[0]), strict=True):
            entries[self.slots, :, self.positions] = new[: len(self.slots)]
        y = []
        for rows, slots, mask in self.pieces:
            context = self.cache[layer, :, :, :, : mask.size(-1)]
            keys, values = (entries[slots] for entries in context)  # (N, H', T, D) each
            # H / H' query heads share a head of keys and values, as further queries of it.
            own = q[0, rows].unflatten(2, (keys.size(1), -1)).permute(0, 2, 3, 1, 4)
            attended = F.scaled_dot_product_attention(own.flatten(2, 3), keys, values, mask)
            y.append(attended.view_as(own).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1))
        return (torch.cat(y) if len(y) > 1 else y[0])[self.order][None]


class Captured:
    """A program `compute(inputs, *shape)` on a device, captured as a CUDA graph for each shape.

    Its result is overwritten by the next call. Where it cannot be captured, it is called.
    """

    def __init__(self, compute: Callable[..., Tensor], device: torch.device) -> None:
        self.compute, self.device = compute, device
        self.graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.is_captured = device.type == "cuda"

    def __call__(self, inputs: Tensor, *shape: Any) -> Tensor:
        """Return the program's result for inputs in the host's memory."""
        if self.is_captured and shape not in self.graphs:
            try:
                self.graphs[shape] = self._capture(upload(inputs, self.device), *shape)
            except RuntimeError as error:  # of CUDA, memory included
                self.is_captured = False
                log.warning("decode steps are not captured as CUDA graphs: %s", error)
        if not self.is_captured:
            return self.compute(upload(inputs, self.device), *shape)
        graph, own_inputs, result = self.graphs[shape]
        own_inputs.copy_(inputs.pin_memory(), non_blocking=True)
        graph.replay()
        return result

    def _capture(self, inputs: Tensor, *shape: Any) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Return the graph, its inputs and its result.

        All graphs share the first one's memory. Other threads may load models meanwhile.
        """
        stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # libraries choose their kernels at the first call
            self.compute(inputs, *shape)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()  # captured on that stream, which is of this device
        pool = next((first.pool() for first, _, _ in self.graphs.values()), None)
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
            result = self.compute(inputs, *shape)
        return graph, inputs, result


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Return values (...) of the host's memory on a device, without waiting for the device."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class InTiles(nn.Module):
    """A computation over rows (..., R, C), R a multiple of n_rows, of n_rows at a time."""

    def __init__(self, compute: Callable[[Tensor], Tensor], n_rows: int) -> None:
        super().__init__()
        self.compute, self.n_rows = compute, n_rows

    def forward(self, x: Tensor) -> Tensor:
        """Return the results (..., R, N) of rows (..., R, C)."""
        y = [self.compute(rows) for rows in x.split(self.n_rows, -2)]
        return torch.cat(y, -2) if len(y) > 1 else y[0]


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
        """Return the products (..., N) of a CPU's bfloat16 inputs (..., K)."""
        y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scales)
        y = y.unflatten(0, x.shape[:-1])
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


def _power_of_two(n: int) -> int:
    """Return the smallest power of two from n on."""
    return 1 << (n - 1).bit_length()
