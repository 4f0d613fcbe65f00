"""One model at work: its weights, its slots and its sequences, computed step by step."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nanogpt.checkpoint import Checkpoint
from serving.engine import sampling
from serving.engine.counters import Counters
from serving.engine.forward import Computes, Span
from serving.engine.messages import (
    Classified,
    Failed,
    FailureKind,
    Finished,
    Message,
    Scored,
    Tokens,
)
from serving.engine.sampling import Chosen
from serving.engine.scheduler import Scheduler, Sequence
from serving.logs import of_request

LEAST_TOKENS = 8  # of a prompt that are read at a time where memory is short

log = logging.getLogger(__name__)


class Event(NamedTuple):
    """Something to tell a client."""

    client: object
    message: Message


class Read(NamedTuple):
    """What a step read of a sequence, and the states (R, C) it left."""

    sequence: Sequence
    states: Tensor


@dataclass(eq=False)
class Runner:
    """A loaded model. Whatever fails in a step fails for the sequence that causes it alone."""

    id: str
    revision: str
    checkpoint: Checkpoint
    dtype: str
    forward: Computes
    scheduler: Scheduler
    counters: Counters
    created: int = 0  # seconds since 1970
    used: float = 0.0  # when it was asked last

    def step(self) -> list[Event]:
        """Compute the next tokens; return what came of it."""
        self.scheduler.admit()
        plan = self.scheduler.plan()
        if not plan:
            return []
        self.counters.steps += 1
        self.used = time.monotonic()
        events: list[Event] = []
        ready: list[Read] = []
        for read in self._isolated(self._read, plan, events):
            if read.sequence.aim == "score":
                events += self._isolated(self._score, [read], events)
            elif read.sequence.n_read == len(read.sequence.ids):
                if read.sequence.aim == "classify":
                    events += self._isolated(self._classify, [read], events)
                else:
                    ready.append(Read(read.sequence, read.states[-1:]))
        for sequence, chosen in self._isolated(self._choose, ready, events):
            events += self._write(sequence, chosen)
        return events

    def forget(self, unwanted: Callable[[Sequence], bool]) -> int:
        """Drop the sequences that nobody waits for; return how many there were."""
        gone = [s for s in [*self.scheduler.running, *self.scheduler.waiting] if unwanted(s)]
        for sequence in gone:
            self.scheduler.remove(sequence)
        return len(gone)

    def _isolated(self, compute: Callable, items: list, events: list[Event]) -> Iterator:
        """Yield what `compute` makes of all items; where it raises, of each alone, or a failure."""
        if not items:
            return
        try:
            results = compute(items)
        except Exception as error:
            if len(items) > 1:
                for item in items:
                    yield from self._isolated(compute, [item], events)
            else:
                events.append(self._fail(items[0][0], error))
            return
        yield from results

    def _read(self, plan: list[tuple[Sequence, Span]]) -> list[Read]:
        try:
            states = self.forward.hidden_states([span for _, span in plan])
        except Exception as error:
            if len(plan) == 1 and is_out_of_memory(error) and self._read_less(*plan[0]):
                return self._read([(s, self.scheduler.shortened(s, span)) for s, span in plan])
            raise
        parts = states.split([len(span.ids) for _, span in plan])
        for sequence, span in plan:
            sequence.n_read += len(span.ids)
            if not sequence.first_token and sequence.n_read == len(sequence.ids):
                assert sequence.slot is not None
                self.scheduler.slots.hold(sequence.slot, sequence.ids)  # others may use it now
        return [Read(sequence, part) for (sequence, _), part in zip(plan, parts, strict=True)]

    def _read_less(self, sequence: Sequence, span: Span) -> bool:
        """Halve what is read of a sequence at a time; return whether that could be done.

        Its answer stays the same: states do not depend on how a text is cut.
        """
        if len(span.ids) <= LEAST_TOKENS:
            return False
        sequence.most_tokens = max(LEAST_TOKENS, len(span.ids) // 2)
        what = "out of memory; reading %d tokens at a time"
        log.warning(what, sequence.most_tokens, extra=of_request(sequence.request_id))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    def _choose(self, ready: list[Read]) -> list[tuple[Sequence, Chosen | Exception]]:
        logits = self.forward.logits(torch.cat([read.states for read in ready]))
        chosen = sampling.choose(logits, [read.sequence.draw for read in ready])
        return [(read.sequence, c) for read, c in zip(ready, chosen, strict=True)]

    def _write(self, sequence: Sequence, chosen: Chosen | Exception) -> list[Event]:
        if isinstance(chosen, Exception):
            return [self._fail(sequence, chosen)]
        assert sequence.request is not None
        params = sequence.request.params
        self._count_token(sequence)
        if chosen.token in params.stop_ids and not params.ignore_eos:
            return [self._finish(sequence, "stop")]
        sequence.ids.append(chosen.token)
        self.counters.completion_tokens += 1
        events = [Event(sequence.client, _tokens(sequence, chosen))]
        full = len(sequence.ids) >= self.checkpoint.config.block_size
        if full or len(sequence.ids) - sequence.n_prompt >= params.max_tokens:
            events.append(self._finish(sequence, "length"))
        return events

    def _count_token(self, sequence: Sequence) -> None:
        now = time.monotonic()
        if sequence.first_token:
            self.counters.inter_token_s.add(now - sequence.last_token)
        else:
            sequence.first_token = now
            self.counters.queue_s.add(sequence.queue_s)
            self.counters.first_token_s.add(now - sequence.arrived)
            self.counters.prompt_tokens += sequence.n_prompt
            self.counters.cached_tokens += sequence.n_cached
        sequence.last_token = now

    def _finish(self, sequence: Sequence, reason: str) -> Event:
        self.scheduler.remove(sequence)
        self.counters.finished += 1
        finished = Finished(
            sequence.request_id,
            reason,  # type: ignore[arg-type]
            cached_tokens=sequence.n_cached,
            queue_s=sequence.queue_s,
        )
        return Event(sequence.client, finished)

    def _fail(self, sequence: Sequence, error: Exception) -> Event:
        self.scheduler.remove(sequence, clean=False)
        self.counters.failed += 1
        log.error("a request failed", exc_info=error, extra=of_request(sequence.request_id))
        why = f"The answer could not be computed ({type(error).__name__}: {error})."
        kind: FailureKind = "overloaded" if is_out_of_memory(error) else "internal"
        return Event(sequence.client, Failed(sequence.request_id, kind, why))

    def _score(self, reads: list[Read]) -> list[Event]:
        """Tell the prompt's log-probabilities when all of it is read."""
        ((sequence, states),) = reads
        logprobs = sampling.log_probabilities(self.forward.logits(states))
        start = sequence.n_read - len(logprobs)
        following = sequence.ids[start + 1 : sequence.n_read + 1]
        own = logprobs[range(len(following)), following].tolist()
        top_ids, top = sampling.likeliest(logprobs, sampling.MAX_TOP)
        for n, value in enumerate(own):
            sequence.scores.append((value, top_ids[n][: sequence.top], top[n][: sequence.top]))
        if sequence.n_read < len(sequence.ids):
            return []
        self._end(sequence)
        values, ids, tops = zip(*[(None, [], []), *sequence.scores], strict=True)
        scored = Scored(sequence.request_id, list(values), list(ids), list(tops))
        return [Event(sequence.client, scored)]

    def _classify(self, reads: list[Read]) -> list[Event]:
        """Tell the class of a text that is read."""
        ((sequence, states),) = reads
        (probabilities,) = self.forward.class_probabilities(states[-1:]).tolist()
        self._end(sequence)
        classified = Classified(sequence.request_id, probabilities, sequence.n_prompt)
        return [Event(sequence.client, classified)]

    def _end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.counters.finished += 1
        self.counters.prompt_tokens += sequence.n_prompt


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out, on a GPU or not."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


def _tokens(sequence: Sequence, chosen: Chosen) -> Tokens:
    is_first = len(sequence.ids) == sequence.n_prompt + 1
    told = chosen.logprob is not None
    return Tokens(
        sequence.request_id,
        [chosen.token],
        logprobs=[chosen.logprob] if chosen.logprob is not None else None,
        top_ids=[chosen.top_ids] if told else None,
        top_logprobs=[chosen.top_logprobs] if told else None,
        cached_tokens=sequence.n_cached if is_first else None,
        queue_s=sequence.queue_s if is_first else None,
    )
