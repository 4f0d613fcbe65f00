"""Decode on a GPU: the forward pass and the draw are one CUDA graph, a step ahead of the host.

A token that a step draws stays on the device, where the next step takes it. The next step begins
before the host has read the token, so that the host's work overlaps it; a sequence that ends has
one more token computed, which is dropped. Sequences whose next draw depends on the answer's tokens,
as with grammars and penalties, are computed in steps that wait for the host.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from serving.engine.forward import UNREAD, Captured, Forward, Shape, in_few_shapes
from serving.engine.sampling import How, draw, numbers_of, padded_rows
from serving.engine.scheduler import SequenceState


class Begun(NamedTuple):
    """A step that the device computes: its sequences, and a row of `draw` for each."""

    sequences: list[SequenceState]
    rows: Tensor  # in the host's memory, complete at `end`
    end: torch.cuda.Event

    def drawn(self) -> list[tuple[SequenceState, list[float]]]:
        """Wait for the step; return the rows of the sequences that still expect a token."""
        self.end.synchronize()
        drawn = zip(self.sequences, self.rows.tolist(), strict=False)
        return [(sequence, row) for sequence, row in drawn if sequence.n_ahead]


class Decoder:
    """Decode steps of a forward pass on a GPU."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        n_slots, block_size = forward.cache.size(2), forward.config.block_size
        # By slot and position: a step may be repeated, as it is where it is captured.
        self._drawn = torch.zeros(n_slots, block_size + 1, dtype=torch.int64, device=forward.device)
        self._compute = Captured(self._step, forward.device)

    def takes(self, sequences: list[SequenceState]) -> bool:
        """Return whether all sequences decode, and need nothing of the host for it."""
        return all(
            s.is_decoding and not (s.is_flat or s.matcher or s.params.adjusts) for s in sequences
        )

    @torch.inference_mode()
    def begin(self, sequences: list[SequenceState]) -> Begun:
        """Begin to draw the next token of each sequence."""
        spans = in_few_shapes([sequence.next_span(1) for sequence in sequences])
        layout, n_rows, n_padded, shapes = self.forward.layout(spans)
        n_drawn, n_vocab = min(padded_rows(n_rows), n_padded), self.forward.config.vocab_size
        numbers, how = numbers_of(sequences, n_drawn, n_vocab)
        inputs = torch.cat([layout, numbers.flatten().view(torch.int64)])
        rows = self._compute(inputs, n_rows, n_padded, shapes, how.general(), len(layout))
        rows = rows.to("cpu", non_blocking=True)
        end = torch.cuda.current_stream(self.forward.device).record_event()
        for sequence in sequences:  # now that nothing can fail
            sequence.n_computed += 1
            sequence.n_ahead += 1
        return Begun(sequences, rows, end)

    def _step(
        self,
        inputs: Tensor,
        n_rows: int,
        n_padded: int,
        shapes: tuple[Shape, ...],
        how: How,
        n_layout: int,
    ) -> Tensor:
        """Return the rows of `draw`; `inputs` are a layout, and the bits of float64 numbers."""
        layout, numbers = inputs.tensor_split([n_layout])
        ids, _, positions, slots = layout[: 4 * n_padded].view(4, n_padded)
        ids = torch.where(ids == UNREAD, self._drawn[slots, positions], ids)
        layout = torch.cat([ids, layout[n_padded:]])
        states = self.forward.states(layout, n_rows, n_padded, shapes)
        logits = self.forward.logits(states)[: padded_rows(n_rows)]
        rows = draw(logits, logits, numbers.view(torch.float64).view(6, -1, 1), how)
        slots, positions, tokens = slots[: len(rows)], positions[: len(rows)], rows[:, 0].long()
        tokens = torch.where(slots == slots[0], tokens[0], tokens)  # of the copies, the first's
        self._drawn[slots, positions + 1] = tokens
        return rows
