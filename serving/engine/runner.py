"""One model at work: its weights, its slots and its sequences, computed step by step."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nanogpt.checkpoint import Checkpoint
from nanogpt.classifier import enclose
from nanogpt.command import out_of_memory
from serving.engine import sampling
from serving.engine.forward import Span
from serving.engine.messages import (
    Classified,
    Classify,
    Computation,
    Counters,
    EngineError,
    Failed,
    FailureKind,
    Finished,
    Generate,
    Message,
    ModelDetails,
    Score,
    Scored,
    Tokens,
)
from serving.engine.native import ForwardPass
from serving.engine.scheduler import Scheduler, SequenceState
from serving.logs import of_request

MIN_TOKENS = 8  # of a prefill in one step where memory is short

log = logging.getLogger(__name__)


class Event(NamedTuple):
    """A message to a client, or to all for None."""

    client: object
    message: Message


class Computed(NamedTuple):
    """The states (R, C) that a step computed of a sequence."""

    sequence: SequenceState
    states: Tensor


@dataclass(eq=False)
class Runner:
    """A loaded model. Whatever fails in a step fails for the sequence that causes it alone."""

    id: str
    revision: str
    checkpoint: Checkpoint
    dtype: str
    forward: ForwardPass
    scheduler: Scheduler
    counters: Counters
    created: int = 0  # seconds since 1970
    used: float = 0.0  # the time of its latest request or step

    def add(self, client: object, request: Computation) -> None:
        """Queue a request; raises EngineError for a prompt that the model cannot compute."""
        about, ids = self.checkpoint, list(request.prompt_ids)
        block_size, vocab_size = about.config.block_size, about.config.vocab_size
        if isinstance(request, Classify):
            if about.labels is None:
                what = f"The model {self.id} was not trained to classify."
                raise EngineError("invalid", what)
            ids = enclose(ids, about.tokenizer.eot_id, block_size)
        if not ids:
            raise EngineError("invalid", "The prompt is empty; it needs at least one token.")
        if len(ids) + isinstance(request, Generate) > block_size:
            what = f"The model's context is {block_size} tokens and the prompt has {len(ids)}"
            raise EngineError("context_length", f"{what}; shorten it.")
        if min(ids) < 0 or max(ids) >= vocab_size:
            what = f"The prompt has token ids from {min(ids)} to {max(ids)}"
            raise EngineError("invalid", f"{what}; the model knows 0 to {vocab_size - 1}.")
        self.scheduler.waiting.append(SequenceState(request, client, ids))

    def details(self, request_id: str) -> ModelDetails:
        """Return the facts about the model that a front end needs."""
        about = self.checkpoint
        return ModelDetails(
            request_id,
            id=self.id,
            revision=self.revision,
            stage=about.stage,
            step=about.step,
            block_size=about.config.block_size,
            vocab_size=about.config.vocab_size,
            n_params=about.model.num_parameters(),
            dtype=self.dtype,
            tokenizer=about.tokenizer.record(),
            template=about.template,
            labels=about.labels,
        )

    def drop(self, client: object, request_id: str | None = None) -> int:
        """Drop a client's request, or all of them; return how many there were."""
        gone = [
            s
            for s in [*self.scheduler.running, *self.scheduler.waiting]
            if s.client is client and request_id in (None, s.request.request_id)
        ]
        for sequence in gone:
            self.scheduler.remove(sequence)
        return len(gone)

    def step(self) -> list[Event]:
        """Compute the next tokens; return what came of it."""
        self.scheduler.admit()
        plan = self.scheduler.plan()
        if not plan:
            return []
        self.counters.steps += 1
        self.used = time.monotonic()
        events: list[Event] = []
        ready: list[Computed] = []
        for computed in self._isolated(self._forward, plan, events):
            sequence = computed.sequence
            is_whole = sequence.n_computed == len(sequence.ids)
            if isinstance(sequence.request, Score):
                events += self._isolated(self._score, [computed], events)
            elif is_whole and isinstance(sequence.request, Classify):
                events += self._isolated(self._classify, [computed], events)
            elif is_whole:
                ready.append(Computed(sequence, computed.states[-1:]))
        for sequence, chosen in self._isolated(self._sample, ready, events):
            events += self._append(sequence, chosen)
        return events

    def _isolated(self, compute: Callable, items: list, events: list[Event]) -> Iterator:
        """Yield the results of all items; where that raises, of each alone, or its failure."""
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

    def _forward(self, plan: list[tuple[SequenceState, Span]]) -> list[Computed]:
        try:
            states = self.forward.hidden_states([span for _, span in plan])
        except Exception as error:
            if len(plan) == 1 and is_out_of_memory(error) and self._halve(*plan[0]):
                return self._forward([(s, s.next_span(len(span.ids))) for s, span in plan])
            raise
        parts = states.split([len(span.ids) for _, span in plan])
        for sequence, span in plan:
            sequence.n_computed += len(span.ids)
            if not sequence.first_token and sequence.n_computed == len(sequence.ids):
                assert sequence.slot is not None
                self.scheduler.slots.hold(sequence.slot, sequence.ids)  # others may use it now
        return [Computed(sequence, part) for (sequence, _), part in zip(plan, parts, strict=True)]

    def _halve(self, sequence: SequenceState, span: Span) -> bool:
        """Halve a sequence's tokens per step; return whether that could be done.

        Its answer stays the same: states do not depend on how a text is cut.
        """
        if len(span.ids) <= MIN_TOKENS:
            return False
        sequence.max_tokens = max(MIN_TOKENS, len(span.ids) // 2)
        what, extra = "out of memory; %d tokens at a time", of_request(sequence.request.request_id)
        log.warning(what, sequence.max_tokens, extra=extra)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    def _sample(self, ready: list[Computed]) -> list[tuple[SequenceState, Tokens | Exception]]:
        logits = self.forward.logits(torch.cat([computed.states for computed in ready]))
        chosen = sampling.choose(logits, [computed.sequence.draw for computed in ready])
        return [(computed.sequence, c) for computed, c in zip(ready, chosen, strict=True)]

    def _append(self, sequence: SequenceState, chosen: Tokens | Exception) -> list[Event]:
        """Append a token to an answer; return the messages about it."""
        if isinstance(chosen, Exception):
            return [self._fail(sequence, chosen)]
        assert isinstance(sequence.request, Generate)
        params, is_first, (token,) = sequence.request.params, not sequence.first_token, chosen.ids
        self._count_token(sequence)
        if token in params.stop_ids and not params.ignore_eos:
            return [self._finish(sequence, "stop")]
        sequence.ids.append(token)
        self.counters.completion_tokens += 1
        if is_first:
            chosen.cached_tokens, chosen.queue_s = sequence.n_cached, sequence.queue_s
        events = [Event(sequence.client, chosen)]
        is_full = len(sequence.ids) >= self.checkpoint.config.block_size
        if is_full or len(sequence.ids) - sequence.n_prompt >= params.max_tokens:
            events.append(self._finish(sequence, "length"))
        return events

    def _count_token(self, sequence: SequenceState) -> None:
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

    def _finish(self, sequence: SequenceState, reason: Literal["stop", "length"]) -> Event:
        request_id, n_cached = sequence.request.request_id, sequence.n_cached
        return self._end(sequence, Finished(request_id, reason, n_cached, sequence.queue_s))

    def _end(self, sequence: SequenceState, answer: Message) -> Event:
        self.scheduler.remove(sequence)
        self.counters.finished += 1
        if not sequence.generates:
            self.counters.prompt_tokens += sequence.n_prompt
        return Event(sequence.client, answer)

    def _fail(self, sequence: SequenceState, error: Exception) -> Event:
        self.scheduler.remove(sequence, clean=False)
        self.counters.failed += 1
        request_id = sequence.request.request_id
        log.error("a request failed", exc_info=error, extra=of_request(request_id))
        why = f"The answer could not be computed ({type(error).__name__}: {error})."
        kind: FailureKind = "overloaded" if is_out_of_memory(error) else "internal"
        return Event(sequence.client, Failed(request_id, kind, why))

    def _score(self, computed: list[Computed]) -> list[Event]:
        """Add the log-probabilities of the step's tokens; return all after the last."""
        ((sequence, states),) = computed
        assert isinstance(sequence.request, Score)
        start = sequence.n_computed - len(states)
        following = sequence.ids[start + 1 : sequence.n_computed + 1]
        logits = self.forward.logits(states)[: len(following)]
        n_top = [sequence.request.top] * len(following)
        scored = sequence.scored or Scored(sequence.request.request_id, [None], [[]], [[]])
        for own, ids, values in sampling.log_probabilities(logits, following, n_top):
            scored.logprobs.append(own)
            scored.top_ids.append(ids)
            scored.top_logprobs.append(values)
        sequence.scored = scored
        return [self._end(sequence, scored)] if sequence.n_computed == len(sequence.ids) else []

    def _classify(self, computed: list[Computed]) -> list[Event]:
        ((sequence, states),) = computed
        (probabilities,) = self.forward.class_probabilities(states[-1:]).tolist()
        request_id = sequence.request.request_id
        return [self._end(sequence, Classified(request_id, probabilities, sequence.n_prompt))]


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory ran out, on a GPU or not."""
    return isinstance(error, torch.OutOfMemoryError) or bool(out_of_memory(error))
