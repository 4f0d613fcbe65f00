"""Which sequences wait, prefill and decode, and what the next step computes of them."""

import time
from collections import Counter
from dataclasses import dataclass, field
from operator import itemgetter

from torch import Tensor

from serving.engine.forward import UNREAD, Span
from serving.engine.grammar import Matcher
from serving.engine.messages import Computation, Generate, Logprobs, SamplingParams, Score, Tokens
from serving.engine.slots import Slot, Slots

MAX_GROUPS = 4096  # whose last turns the scheduler remembers

Group = str | tuple[str, str]
Turns = dict[Group, float]  # when each group was served last, the longest ago first


@dataclass(eq=False)
class SequenceState:
    """A request's tokens on their way through the engine.

    `ids` are the prompt and the answer; the first `n_computed` of them have keys and values. The
    `n_ahead` tokens after them are drawn, on a GPU, and not yet read.
    """

    request: Computation
    client: object
    ids: list[int]
    max_ids: int = 0  # an answer that is as long has ended
    matcher: Matcher | None = None  # of the answer's grammar
    slot: Slot | None = None
    n_computed: int = 0
    n_ahead: int = 0
    is_flat: bool = False  # whether a draw took more candidates than the first ones
    n_reused: int = 0  # of n_computed, those that the slot held already
    n_cached: int = 0  # n_reused at the first admission
    max_tokens: int | None = None  # of a step, where memory did not suffice for more
    scored: list[Logprobs] = field(default_factory=list)  # of the tokens computed so far
    state_sum: Tensor | int = 0  # (C,) int64, of the states of the tokens computed so far
    arrived: float = field(default_factory=time.monotonic)
    queue_s: float = 0.0  # seconds between arrival and the first slot
    first_token: float = 0.0
    last_token: float = 0.0

    def __post_init__(self) -> None:
        request = self.request
        self.n_prompt, self.generates = len(self.ids), isinstance(request, Generate)
        # The key, and the request of this key, that take turns with others.
        self.groups = request.key, (request.key, request.origin or request.request_id)
        # The label of the sequences whose prefixes it may reuse.
        self.cache_scope = request.key if self.shared_ids else request.request_id

    @property
    def shared_ids(self) -> list[int]:
        """The tokens up to the first whose state it needs: those before that may be reused."""
        if isinstance(self.request, Score):
            return self.ids[: self.request.start]
        return self.ids if self.generates else []  # others need the states of all tokens

    @property
    def params(self) -> SamplingParams:
        """The sampling parameters of a request that generates."""
        assert isinstance(self.request, Generate)
        return self.request.params

    @property
    def is_decoding(self) -> bool:
        """Whether only the latest token is not computed."""
        n_tokens = len(self.ids) + self.n_ahead
        return self.n_computed == n_tokens - 1 and n_tokens > self.n_prompt

    def tokens(self, ids: list[int]) -> Tokens:
        """Return the message with the next tokens of the answer."""
        return Tokens(
            self.request.request_id, ids, cached_tokens=self.n_cached, queue_s=self.queue_s
        )

    def next_span(self, n_tokens: int) -> Span:
        """Return the next tokens to compute, at most `n_tokens`."""
        assert self.slot is not None
        start, n_tokens = self.n_computed, min(n_tokens, self.max_tokens or n_tokens)
        before = self.ids[start - 1] if start else 0
        return Span(self.slot.index, start, self.ids[start : start + n_tokens] or [UNREAD], before)


class Scheduler:
    """Sequences of one model: as many at a time as there are slots, the others wait.

    API keys take turns, and so do the requests of each key. A free slot goes to the key, and then
    to the request, with the fewest; where none is free, the one with the most gives one up if it
    has two more: its youngest sequence waits again, and is computed again later.

    Every step takes one token of each sequence that decodes, and of those in prefill as many tokens
    as the budget holds, of one key after another and of one request after another.
    """

    def __init__(self, slots: Slots, chunk_tokens: int) -> None:
        self.slots, self.chunk_tokens = slots, chunk_tokens
        self.waiting: list[SequenceState] = []
        self.running: list[SequenceState] = []
        self._admissions: Turns = {}
        self._prefills: Turns = {}

    @property
    def sequences(self) -> list[SequenceState]:
        """The sequences that run and wait."""
        return [*self.running, *self.waiting]

    @property
    def n_queued(self) -> int:
        """The number of sequences that wait for a slot that is not free."""
        return max(len(self.waiting) - self.slots.n_free, 0)

    def admit(self) -> None:
        """Give slots to waiting sequences, but for those whose prefix is being computed."""
        while self.waiting:
            held = Counter(group for s in self.running for group in s.groups)
            sequence = self._next(held)
            if sequence is None:
                return
            if not self.slots.n_free:
                victim = self._victim(sequence, held)
                if victim is None:
                    return
                self.remove(victim)
                victim.scored, victim.state_sum = [], 0
                self.waiting.insert(0, victim)
            self._start(sequence)

    def _next(self, held: Counter[Group]) -> SequenceState | None:
        """Return the sequence to start, by the slots that keys and requests hold."""

        def turn(sequence: SequenceState) -> tuple[float, ...]:
            key, request = sequence.groups
            key_since, since = _since(self._admissions, sequence)
            return held[key], key_since, held[request], since

        ready = (s for s in sorted(self.waiting, key=turn) if not self._is_being_computed(s))
        return next(ready, None)

    def _victim(self, sequence: SequenceState, held: Counter[Group]) -> SequenceState | None:
        """Return the running sequence whose slot is due to one that waits."""
        own = [s for s in self.running if s.groups[0] == sequence.groups[0]]
        for level, rivals in enumerate((self.running, own)):
            most = max(
                rivals, key=lambda s: (*(held[g] for g in s.groups), s.arrived), default=None
            )
            if most and held[most.groups[level]] - held[sequence.groups[level]] > 1:
                return most
        return None

    def _start(self, sequence: SequenceState) -> None:
        scope = sequence.cache_scope
        sequence.slot, sequence.n_reused = self.slots.acquire(sequence.shared_ids, scope)
        sequence.n_computed = sequence.n_reused
        if not sequence.queue_s:
            sequence.n_cached = sequence.n_reused
            sequence.queue_s = time.monotonic() - sequence.arrived
        _serve(self._admissions, sequence)
        self.waiting.remove(sequence)
        self.running.append(sequence)

    def _is_being_computed(self, sequence: SequenceState) -> bool:
        """Return whether another sequence's prefill begins with a prompt's first tokens."""
        start = sequence.ids[: self.chunk_tokens]
        return bool(sequence.shared_ids) and any(
            len(other.ids) == other.n_prompt > other.n_computed
            and other.cache_scope == sequence.cache_scope
            and other.n_prompt > self.chunk_tokens
            and other.ids[: self.chunk_tokens] == start
            for other in self.running
        )

    def plan(self) -> list[tuple[SequenceState, Span]]:
        """Return the sequences of the next step, and the tokens of each."""
        decoding = [(s.slot.index, s) for s in self.running if s.slot and s.is_decoding]
        budget = self.chunk_tokens * (1 if decoding else 4)
        # In the order of slots, of which a forward pass may read neighbours without a copy.
        planned = [(s, s.next_span(1)) for _, s in sorted(decoding, key=itemgetter(0))]
        for sequence in sorted((s for s in self.running if not s.is_decoding), key=self._turn):
            if budget > 0:
                planned.append((sequence, sequence.next_span(budget)))
                budget -= len(planned[-1][1].ids)
                _serve(self._prefills, sequence)
        return planned

    def _turn(self, sequence: SequenceState) -> tuple[float, ...]:
        """Order by turns of keys; of a key, a prefill that has begun goes on to its end."""
        key_since, since = _since(self._prefills, sequence)
        return key_since, sequence.n_computed == sequence.n_reused, since, sequence.arrived

    def remove(self, sequence: SequenceState, *, clean: bool = True) -> None:
        """Drop a sequence and free its slot, whose content may be used again if `clean`."""
        if sequence.slot is None:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self.slots.hold(sequence.slot, sequence.ids[: sequence.n_computed])
        self.slots.release(sequence.slot, clean=clean)
        _serve(self._admissions, sequence)  # until now
        sequence.slot, sequence.n_ahead = None, 0


def _since(turns: Turns, sequence: SequenceState) -> tuple[float, ...]:
    """Return since when a sequence's key and request wait; new ones, since they came."""
    return tuple(turns.get(group, sequence.arrived) for group in sequence.groups)


def _serve(turns: Turns, sequence: SequenceState) -> None:
    """Move a sequence's key and request to the end of their lines."""
    for group in sequence.groups:
        turns.pop(group, None)
        turns[group] = time.monotonic()
    while len(turns) > MAX_GROUPS:
        del turns[next(iter(turns))]
