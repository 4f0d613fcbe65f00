"""Who waits, who is read in, who writes: sequences, and what the next step computes of them."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from serving.engine.forward import Span
from serving.engine.messages import Generate
from serving.engine.sampling import Draw
from serving.engine.slots import Slot, Slots

MAX_GROUPS = 4096  # of which the scheduler remembers when each was served

Aim = Literal["write", "score", "classify"]
Group = str | tuple[str, str]


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
    key: str = ""
    origin: str = ""
    request: Generate | None = None
    top: int = 0  # likeliest tokens to tell with scores
    slot: Slot | None = None
    n_read: int = 0
    n_reused: int = 0  # of n_read, what the slot held already
    n_cached: int = 0
    most_tokens: int | None = None  # to read at a time, where memory did not suffice for more
    scores: list[tuple[float, list[int], list[float]]] = field(default_factory=list)
    arrived: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    @cached_property
    def groups(self) -> tuple[str, tuple[str, str]]:
        """The key, and the request of this key, that take turns with others."""
        return self.key, (self.key, self.origin)

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


class Turns:
    """When each group was served last; one that never was waits since its arrival."""

    def __init__(self) -> None:
        self._served: dict[Group, float] = {}

    def since(self, sequence: Sequence) -> tuple[float, float]:
        """Return since when the key and the request of a sequence wait for their turn."""
        key, request = (self._served.get(group, sequence.arrived) for group in sequence.groups)
        return key, request

    def serve(self, sequence: Sequence) -> None:
        """Move a sequence's key and request to the end of their lines."""
        for group in sequence.groups:
            self._served.pop(group, None)
            self._served[group] = time.monotonic()
        while len(self._served) > MAX_GROUPS:
            del self._served[next(iter(self._served))]


class Scheduler:
    """Sequences of one model: as many at a time as there are slots, the others wait.

    API keys take turns, and so do the requests of each key. A free slot goes to the key, and then
    to the request, with the fewest; where none is free, the one with the most gives one up if it
    has two more: its youngest sequence waits again, and is read again later.

    Every step takes one token of each sequence that writes, and of those that are read in as many
    tokens as the budget holds, of one key after another and of one request after another.
    """

    def __init__(self, slots: Slots, chunk_tokens: int) -> None:
        self.slots, self.chunk_tokens = slots, chunk_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._admissions, self._readings = Turns(), Turns()

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
        """Give slots to those who wait, but for who can soon use what another reads in."""
        while self.waiting:
            held = Counter(group for s in self.running for group in s.groups)
            sequence = next(self._in_turn(held), None)
            if sequence is None:
                return
            if self.slots.n_used == len(self.slots.slots):
                victim = self._victim(sequence, held)
                if victim is None:
                    return
                self._pause(victim)
            self._start(sequence)

    def _in_turn(self, held: Counter[Group]) -> Iterator[Sequence]:
        """Yield the sequences that may start, by the slots that their keys and requests hold."""
        lines: defaultdict[Group, list[Sequence]] = defaultdict(list)
        for sequence in self.waiting:
            lines[sequence.groups[1]].append(sequence)

        def place(line: list[Sequence]) -> tuple[float, ...]:
            key, request = line[0].groups
            key_since, since = self._admissions.since(line[0])
            return held[key], key_since, held[request], since

        in_turn = sorted(lines.values(), key=place)
        for sequence in (s for line in in_turn for s in line):
            if not self._is_being_read(sequence):
                yield sequence

    def _victim(self, sequence: Sequence, held: Counter[Group]) -> Sequence | None:
        """Return the running sequence whose slot is due to one that waits."""
        own = [s for s in self.running if s.key == sequence.key]
        for level, rivals in enumerate((self.running, own)):
            most = max(
                rivals, key=lambda s: (*(held[g] for g in s.groups), s.arrived), default=None
            )
            if most and held[most.groups[level]] - held[sequence.groups[level]] > 1:
                return most
        return None

    def _start(self, sequence: Sequence) -> None:
        prompt = sequence.ids if sequence.aim == "write" else sequence.ids[:0]  # all is read
        taken = self.slots.acquire(prompt, sequence.scope)
        assert taken is not None
        sequence.slot, sequence.n_reused = taken
        sequence.n_read = sequence.n_reused
        if not sequence.admitted:
            sequence.n_cached, sequence.admitted = sequence.n_reused, time.monotonic()
        self._admissions.serve(sequence)
        self.waiting.remove(sequence)
        self.running.append(sequence)

    def _pause(self, sequence: Sequence) -> None:
        """Have a sequence wait again; what it computed so far is computed again."""
        self.remove(sequence)
        sequence.scores.clear()
        self.waiting.insert(0, sequence)

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
        for sequence in sorted((s for s in self.running if not s.writes), key=self._reading):
            if budget > 0:
                span = self.shortened(sequence, _span(sequence, budget))
                planned.append((sequence, span))
                budget -= len(span.ids)
                self._readings.serve(sequence)
        return planned

    def _reading(self, sequence: Sequence) -> tuple[float, ...]:
        """Order by turns of keys; of a key, a text that is begun is read to its end first."""
        key_since, since = self._readings.since(sequence)
        return key_since, sequence.n_read == sequence.n_reused, since, sequence.arrived

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
        self._admissions.serve(sequence)  # until now
        sequence.slot = None


def _span(sequence: Sequence, n_tokens: int) -> Span:
    assert sequence.slot is not None
    start = sequence.n_read
    return Span(sequence.slot.index, start, sequence.ids[start : start + n_tokens])
