"""Who waits, who is read in, who writes: sequences, and what the next step computes of them."""

import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Literal

from serving.engine.forward import Span
from serving.engine.messages import Generate
from serving.engine.sampling import Draw
from serving.engine.slots import Slot, Slots

Aim = Literal["write", "score", "classify"]


@dataclass(eq=False)
class Sequence:
    """A request's tokens on their way through the engine.

    `ids` are the prompt and what was written; the first `n_read` of them have keys and values.
    """

    request_id: str
    client: object
    aim: Aim
    ids: list[int]
    n_prompt: int
    scope: str = ""
    request: Generate | None = None
    top: int = 0  # likeliest tokens to tell with scores
    slot: Slot | None = None
    n_read: int = 0
    n_cached: int = 0
    most_tokens: int | None = None  # to read at a time, where memory did not suffice for more
    scores: list[tuple[float, list[int], list[float]]] = field(default_factory=list)
    arrived: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    @property
    def queue_s(self) -> float:
        """How long it waited for a slot."""
        return self.admitted - self.arrived

    @property
    def writes(self) -> bool:
        """Whether all is read but the token that was written last."""
        return self.n_read == len(self.ids) - 1 and len(self.ids) > self.n_prompt

    @property
    def draw(self) -> Draw:
        """What the next token is drawn by."""
        assert self.request is not None
        draw = Draw(self.request.params, len(self.ids))
        if not draw.adjusts:
            return draw
        prompt, answer = self.ids[: self.n_prompt], self.ids[self.n_prompt :]
        return replace(draw, prompt_ids=prompt, answer_ids=answer)


class Scheduler:
    """Sequences of one model: first come, first served, as many at a time as there are slots.

    Every step takes one token of each sequence that writes, and of those that are read in as many
    tokens as the budget holds, the eldest first.
    """

    def __init__(self, slots: Slots, chunk_tokens: int) -> None:
        self.slots, self.chunk_tokens = slots, chunk_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.waiting and not self.running

    @property
    def n_queued(self) -> int:
        """How many wait for a slot that is not free."""
        n_free = len(self.slots.slots) - self.slots.n_used
        return max(len(self.waiting) - n_free, 0)

    def admit(self) -> None:
        """Give free slots to those who wait, but for who can soon use what another reads in."""
        for sequence in list(self.waiting):
            if self.slots.n_used == len(self.slots.slots):
                return
            if self._is_being_read(sequence):
                continue
            prompt = sequence.ids if sequence.aim == "write" else sequence.ids[:0]  # all is read
            taken = self.slots.acquire(prompt, sequence.scope)
            assert taken is not None
            sequence.slot, sequence.n_cached = taken
            sequence.n_read = sequence.n_cached
            sequence.admitted = time.monotonic()
            self.waiting.remove(sequence)
            self.running.append(sequence)

    def _is_being_read(self, sequence: Sequence) -> bool:
        """Return whether a prompt's first tokens are another's that is read in at the moment."""
        wanted = sequence.ids[: self.chunk_tokens]
        return sequence.aim == "write" and any(
            len(other.ids) == other.n_prompt > other.n_read
            and other.aim == "write"
            and other.scope == sequence.scope
            and other.n_prompt > self.chunk_tokens
            and other.ids[: self.chunk_tokens] == wanted
            for other in self.running
        )

    def plan(self) -> list[tuple[Sequence, Span]]:
        """Return what the next step reads, sequence by sequence."""
        writers = [s for s in self.running if s.writes]
        budget = self.chunk_tokens * (1 if writers else 4)
        planned = [(s, _span(s, 1)) for s in writers]
        for sequence in self.running:
            if not sequence.writes and budget > 0:
                span = self.shortened(sequence, _span(sequence, budget))
                planned.append((sequence, span))
                budget -= len(span.ids)
        return planned

    def shortened(self, sequence: Sequence, span: Span) -> Span:
        """Return as much of a span as may be read of its sequence at a time."""
        return replace(span, ids=span.ids[: sequence.most_tokens])

    def remove(self, sequence: Sequence, *, clean: bool = True) -> None:
        """Forget a sequence and free its slot, whose content may be used again if `clean`."""
        if sequence.slot is None:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self.slots.hold(sequence.slot, sequence.ids[: sequence.n_read])
        self.slots.release(sequence.slot, clean=clean)
        sequence.slot = None


def _span(sequence: Sequence, n_tokens: int) -> Span:
    assert sequence.slot is not None
    start = sequence.n_read
    return Span(sequence.slot.index, start, sequence.ids[start : start + n_tokens])
