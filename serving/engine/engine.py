"""The engine: takes requests, loads models for them, and steps until all is answered.

One thread calls `run`; others hand over work through `post`. Each checkpoint is loaded in a thread
of its own: neither models that compute nor the loading of others wait long for one that hangs.
"""

import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from serving.engine.counters import Counters
from serving.engine.loading import all_cache_bytes, load_runner
from serving.engine.messages import (
    AskStats,
    Cancel,
    Classify,
    Describe,
    Failed,
    FailureKind,
    Generate,
    Message,
    ModelInfo,
    Models,
    Request,
    Score,
    Settings,
    Stats,
)
from serving.engine.registry import Entry, Registry
from serving.engine.requests import Refused, details, sequence
from serving.engine.runner import Event, Runner
from serving.engine.scheduler import Sequence
from serving.logs import of_request

IDLE_S = 0.5  # how often an idle engine looks up
RETRY_S = 30.0  # how long a checkpoint that did not load is not tried again
PATIENCE_S = 2.0  # how long the loading of one model keeps the next from being loaded
LOAD_S = 60.0  # how long requests wait for a model; longer for a large file, at
LOAD_BYTES_PER_S = 20e6  # a slow disk on a busy machine

log = logging.getLogger(__name__)
Tell = Callable[[list[Event]], None]


class _Load(NamedTuple):
    """A checkpoint that is being loaded, since when, and until when it is waited for."""

    entry: Entry
    started: float
    deadline: float


class Engine:
    """All models and their sequences; what happens is told through `tell`, once per step.

    `beat` is called between any two computations, and at least every IDLE_S.
    """

    def __init__(
        self, settings: Settings, tell: Tell, beat: Callable[[], None] = lambda: None
    ) -> None:
        self.settings, self.tell, self.beat = settings, tell, beat
        self.registry = Registry(settings.models, settings.runs_dir, settings.default_model)
        self.counters = Counters()
        self.cache_bytes = all_cache_bytes(settings)
        self.runners: dict[str, Runner] = {}
        self.retiring: list[Runner] = []  # older weights that finish what they began
        self._waiting: dict[str, list[tuple[object, Request]]] = {}  # for a model to be loaded
        self._loading: dict[tuple[str, str], _Load] = {}  # by id and revision
        self._broken: dict[tuple[str, str], tuple[float, str]] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._events: list[Event] = []
        self._drain_until: float | None = None
        self._ended = False

    def post(self, work: Callable[[], None]) -> None:
        """Have the engine's thread do something before its next step."""
        self._inbox.put(work)

    def run(self) -> None:
        """Step until told to end."""
        if len(self.registry.entries) == 1:  # it will be asked for
            self._waiting.setdefault(self.registry.entries[0].id, [])
            self._load_next()
        while not self._ended:
            self.beat()
            self.take_inbox(wait=not self.computes)
            self.step()
            if self._drain_until is not None:
                self._ended = self.idle or time.monotonic() > self._drain_until

    @property
    def computes(self) -> bool:
        """Whether a step would compute anything."""
        return any(not runner.scheduler.idle for runner in self._all_runners())

    @property
    def idle(self) -> bool:
        """Whether nothing is left to compute, nor to be loaded first."""
        return not self.computes and not self._waiting

    def take_inbox(self, *, wait: bool) -> None:
        """Do what was posted; with `wait`, until something is or a moment has passed."""
        try:
            work = self._inbox.get(timeout=IDLE_S) if wait else self._inbox.get_nowait()
            while True:
                work()
                work = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def step(self) -> None:
        """Let every model compute once, and tell what came of it."""
        for runner in self._all_runners():
            self._events += runner.step()
            self.beat()
        self.retiring = [runner for runner in self.retiring if not runner.scheduler.idle]
        self._load_next()
        if self._events:
            events, self._events = self._events, []
            self.tell(events)

    def accept(self, client: object, message: Message) -> None:
        """Take what a front end sent."""
        if isinstance(message, Cancel):
            n = self._forget(lambda s: s.client is client and s.request_id == message.request_id)
            if message.reason == "stop":
                self.counters.finished += n
            else:
                self.counters.cancelled += n
            self._forget_waiting(client, message.request_id)
        elif isinstance(message, AskStats):
            self._events.append(Event(client, self._stats(message.request_id)))
        elif isinstance(message, Generate | Score | Classify | Describe):
            self.counters.requests += 1
            with self._refusing(client, message):
                self._accept(client, message)

    def leave(self, client: object) -> None:
        """Drop all that a front end asked for: it is gone."""
        self.counters.cancelled += self._forget(lambda s: s.client is client)
        self._forget_waiting(client, None)

    def drain(self) -> None:
        """Take nothing new; end when all is answered, or after `drain_s`."""
        self._drain_until = time.monotonic() + self.settings.drain_s

    def models(self) -> Models:
        """Return the models that can be asked for."""
        return Models([self._info(entry) for entry in self.registry.entries])

    def changed(self) -> None:
        """Heed that the registry found other checkpoints: load newer weights of those in use."""
        for entry in self.registry.entries:
            self._renew(entry)
        for gone in self.runners.keys() - {entry.id for entry in self.registry.entries}:
            self.retiring.append(self.runners.pop(gone))
        self._events.append(Event(None, self.models()))

    def _all_runners(self) -> list[Runner]:
        return [*self.runners.values(), *self.retiring]

    def _renew(self, entry: Entry) -> None:
        """Have newer weights loaded of a model in use, where there are some."""
        runner = self.runners.get(entry.id)
        if runner is not None and runner.revision != entry.revision:
            self._waiting.setdefault(entry.id, [])

    def _info(self, entry: Entry) -> ModelInfo:
        """Return what is told of a model: of the weights that compute, until newer ones do."""
        runner = self.runners.get(entry.id)
        weights = runner or entry
        return ModelInfo(
            id=entry.id,
            aliases=list(entry.aliases),
            created=weights.created,
            revision=weights.revision,
            loaded=runner is not None,
            default=entry == self.registry.default,
            default_to_generate=entry == self.registry.default_to_generate,
            default_to_classify=entry == self.registry.default_to_classify,
            name=entry.name,
            max_model_len=entry.max_model_len,
            error=self._broken.get((entry.id, entry.revision), (0.0, ""))[1],
        )

    def _accept(self, client: object, request: Generate | Score | Classify | Describe) -> None:
        if self._drain_until is not None:
            raise Refused("unavailable", "The engine is shutting down.")
        entry = self.registry.find(request.model)
        if entry is None:
            raise Refused("not_found", f"The model {request.model!r} does not exist.")
        if not isinstance(request, Describe):
            self._check_queue(request.key)
        self._renew(entry)  # again, where they did not load
        if runner := self.runners.get(entry.id):
            self._begin(runner, client, request)
        else:
            self._waiting.setdefault(entry.id, []).append((client, request))

    def _check_queue(self, key: str) -> None:
        """Refuse one request more of a key that has its share of a full queue.

        Each key that waits has an equal share; one that is alone has all.
        """
        n_queued = sum(runner.scheduler.n_queued for runner in self._all_runners())
        n_queued += sum(map(len, self._waiting.values()))
        if n_queued < self.settings.max_queue:
            return
        unloaded = (r for waiting in self._waiting.values() for _, r in waiting)
        keys = Counter(r.key for r in unloaded if not isinstance(r, Describe | AskStats))
        keys.update(s.key for runner in self._all_runners() for s in runner.scheduler.waiting)
        if keys[key] >= max(1, self.settings.max_queue // len({*keys, key})):
            raise Refused("overloaded", f"The queue is full ({n_queued} requests wait).")

    def _begin(self, runner: Runner, client: object, request: Request) -> None:
        runner.used = time.monotonic()
        if isinstance(request, Describe):
            self._events.append(Event(client, details(runner, request.request_id)))
        else:
            runner.scheduler.waiting.append(sequence(runner, client, request))

    def _load_next(self) -> None:
        """Begin to load a model that is waited for, when there is room for one more."""
        for id_ in list(self._waiting):
            entry = next((e for e in self.registry.entries if e.id == id_), None)
            if entry is None:
                what = f"The model {id_!r} does not exist any more."
                self._refuse_waiting(id_, "not_found", what)
            elif why := self._why_not(entry):
                self._refuse_waiting(id_, "internal", why)
            elif self._may_load(entry):
                self._begin_to_load(entry)

    def _why_not(self, entry: Entry) -> str:
        """Return why a model is not loaded now, nothing where it can be or soon is."""
        now, key = time.monotonic(), (entry.id, entry.revision)
        if load := self._loading.get(key):
            waited = load.deadline - load.started
            late = f"{entry.id} could not be loaded within {waited:.0f} s."
            return late if now > load.deadline else ""
        when, why = self._broken.get(key, (0.0, ""))
        return why if now < when + RETRY_S else ""

    def _may_load(self, entry: Entry) -> bool:
        """Return whether to load a model now: one at a time, but for those that take long."""
        now, loads = time.monotonic(), self._loading.values()
        if (entry.id, entry.revision) in self._loading:
            return False
        if any(now < load.started + PATIENCE_S for load in loads):
            return False
        if sum(now <= load.deadline for load in loads) > self.settings.max_models:
            return False  # each takes the memory of a model
        return entry.id in self.runners or self._make_room()

    def _begin_to_load(self, entry: Entry) -> None:
        now = time.monotonic()
        deadline = now + LOAD_S + entry.size / LOAD_BYTES_PER_S
        self._loading[entry.id, entry.revision] = _Load(entry, now, deadline)
        n_models = min(self.settings.max_models, len(self.registry.entries))
        # A daemon, so that a load that hangs does not keep the process from ending.
        threading.Thread(
            target=self._load, args=(entry, n_models), name="load", daemon=True
        ).start()

    def _make_room(self) -> bool:
        """Return whether one more model may be loaded, after another is evicted if need be."""
        return len(self.runners) < self.settings.max_models or self._evict()

    def _evict(self, *, but: Runner | None = None) -> bool:
        """Drop the idle model that was asked longest ago; return whether there was one."""
        idle = [r for r in self.runners.values() if r.scheduler.idle and r is not but]
        if idle:
            oldest = min(idle, key=lambda runner: runner.used)
            log.info("evicting %s", oldest.id)
            del self.runners[oldest.id]
            if self._waiting.get(oldest.id) == []:
                del self._waiting[oldest.id]  # nobody asks for its newer weights
        return bool(idle)

    def _load(self, entry: Entry, n_models: int) -> None:
        try:
            runner = load_runner(entry, self.settings, self.counters, self.cache_bytes, n_models)
        except Exception as error:  # whatever a file can do to its reader
            self.post(partial(self._not_loaded, entry, error))
        else:
            self.post(partial(self._loaded, runner))

    def _loaded(self, runner: Runner) -> None:
        key = (runner.id, runner.revision)
        self._loading.pop(key, None)
        if self._broken.pop(key, None):
            self.registry.readmit(*key)
        old = self.runners.get(runner.id)
        entry = self.registry.find(runner.id)
        if old is not None and entry is not None and old.revision == entry.revision:
            return  # newer weights were loaded in less time
        runner.used = time.monotonic()
        if old is not None:
            self.retiring.append(old)
            runner.used = old.used  # nobody asked
        self.runners[runner.id] = runner
        for client, request in self._waiting.pop(runner.id, []):
            with self._refusing(client, request):
                self._begin(runner, client, request)
        while self._holds_too_much() and self._evict(but=runner):
            pass  # models that were loaded when there were fewer have larger shares
        self.changed()  # it may have, while this was loaded

    def _holds_too_much(self) -> bool:
        """Return whether there are too many models, or keys and values of them.

        Those of weights that are replaced do not count.
        """
        held = sum(runner.scheduler.slots.cache.nbytes for runner in self.runners.values())
        return held > self.cache_bytes or len(self.runners) > self.settings.max_models

    def _not_loaded(self, entry: Entry, error: Exception) -> None:
        """Note why; who waits is refused, or served with newer weights that came meanwhile."""
        key = (entry.id, entry.revision)
        self._loading.pop(key, None)
        is_known = isinstance(error, ValueError | OSError)
        what = str(error).replace(f"{entry.path.parent}{os.sep}", "")
        why = f"{entry.id} could not be loaded: {what if is_known else type(error).__name__}"
        if self._broken.get(key, (0.0, ""))[1] != why:  # once, and not at each request
            trace = None if is_known else error
            log.error("could not load %s: %s", entry.id, error, exc_info=trace)
        self._broken[key] = time.monotonic(), why
        self.registry.pass_over(entry)
        self._events.append(Event(None, self.models()))

    @contextmanager
    def _refusing(self, client: object, request: Request) -> Iterator[None]:
        """Tell who asked why a request is not taken; an error that nobody foresaw is its alone."""
        try:
            yield
        except Refused as refused:
            self._refuse(client, request.request_id, refused.kind, str(refused))
        except Exception as error:
            log.exception("a request was not taken", extra=of_request(request.request_id))
            why = f"The request could not be taken ({type(error).__name__}: {error})."
            self._refuse(client, request.request_id, "internal", why)

    def _refuse(self, client: object, request_id: str, kind: FailureKind, why: str) -> None:
        self.counters.failed += 1
        self._events.append(Event(client, Failed(request_id, kind, why)))

    def _refuse_waiting(self, id_: str, kind: FailureKind, why: str) -> None:
        for client, request in self._waiting.pop(id_, []):
            self._refuse(client, request.request_id, kind, why)

    def _forget(self, unwanted: Callable[[Sequence], bool]) -> int:
        return sum(runner.forget(unwanted) for runner in self._all_runners())

    def _forget_waiting(self, client: object, request_id: str | None) -> None:
        for id_, waiting in self._waiting.items():
            self._waiting[id_] = [
                (c, request)
                for c, request in waiting
                if c is not client or request_id not in (None, request.request_id)
            ]

    def _stats(self, request_id: str) -> Stats:
        import torch

        runners, counted = self._all_runners(), self.counters
        newest = max(self.runners.values(), key=lambda runner: runner.used, default=None)
        return Stats(
            request_id,
            slots=sum(len(r.scheduler.slots.slots) for r in runners),
            slots_used=sum(r.scheduler.slots.n_used for r in runners),
            queued=sum(len(r.scheduler.waiting) for r in runners)
            + sum(map(len, self._waiting.values())),
            requests=counted.requests,
            finished=counted.finished,
            failed=counted.failed,
            cancelled=counted.cancelled,
            prompt_tokens=counted.prompt_tokens,
            cached_tokens=counted.cached_tokens,
            completion_tokens=counted.completion_tokens,
            steps=counted.steps,
            queue_s=counted.queue_s.histogram(),
            first_token_s=counted.first_token_s.histogram(),
            inter_token_s=counted.inter_token_s.histogram(),
            device=str(newest.forward.device) if newest else self.settings.device,
            dtype=newest.dtype if newest else self.settings.dtype,
            threads=torch.get_num_threads(),
        )
