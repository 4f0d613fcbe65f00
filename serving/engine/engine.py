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
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from serving.engine.messages import (
    Cancel,
    Computation,
    Describe,
    EngineError,
    Failed,
    Message,
    ModelInfo,
    Models,
    Settings,
    Stats,
    Task,
)
from serving.engine.registry import Entry, Registry
from serving.engine.runner import Runner, all_cache_bytes, load_runner
from serving.logs import of_request

BEAT_S = 0.4  # the shortest time between two heartbeats
IDLE_S = 0.5  # how often an idle engine looks up
RETRY_S = 30.0  # how long a checkpoint that did not load is not tried again
PATIENCE_S = 2.0  # how long the loading of one model keeps the next from being loaded
LOAD_S = 60.0  # how long requests wait for a model; longer for a large file, at
LOAD_BYTES_PER_S = 20e6  # a slow disk on a busy machine

log = logging.getLogger(__name__)

Events = dict[object, list[Message]]  # to a client, or to all for None


class Load(NamedTuple):
    """The loading of a checkpoint: since when, and until when requests wait for it."""

    started: float
    deadline: float


class Engine:
    """All models and their sequences; events go to `emit`, all of a step at once.

    Between any two computations, and at least every IDLE_S, a heartbeat is due.
    """

    def __init__(self, settings: Settings, emit: Callable[[Events], None]) -> None:
        self.settings, self.emit = settings, emit
        self.registry = Registry(settings.models, settings.runs_dir, settings.default_model)
        self.stats = Stats(device=settings.device, dtype=settings.dtype)
        self.cache_bytes = all_cache_bytes(settings)
        self.runners: dict[str, Runner] = {}
        self.retiring: list[Runner] = []  # older weights that finish what they began
        self._waiting: list[tuple[object, Computation | Describe]] = []  # for models to be loaded
        self._loading: dict[tuple[str, str], Load] = {}  # by id and revision
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._events: Events = {}
        self._beat_at = 0.0
        self._drain_until: float | None = None

    def post(self, work: Callable[[], None]) -> None:
        """Have the engine's thread do something before its next step."""
        self._inbox.put(work)

    def run(self) -> None:
        """Step until drained."""
        if len(self.registry.entries) == 1:  # requests for it will come
            self._load(self.registry.entries[0])
        while self._drain_until is None or (
            not self.idle and time.monotonic() <= self._drain_until
        ):
            self._beat()
            self.take_inbox(wait=not self.computes)
            self.step()

    @property
    def computes(self) -> bool:
        """Whether a step would compute anything."""
        return any(runner.scheduler.sequences for runner in self._all_runners())

    @property
    def idle(self) -> bool:
        """Whether nothing is left to compute, nor to be loaded first."""
        is_loading = any(time.monotonic() <= load.deadline for load in self._loading.values())
        return not (self.computes or self._waiting or is_loading)

    def take_inbox(self, *, wait: bool) -> None:
        """Do the posted work; with `wait`, wait for some for a moment."""
        try:
            work = self._inbox.get(timeout=IDLE_S) if wait else self._inbox.get_nowait()
            while True:
                work()
                work = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def step(self) -> None:
        """Begin what waits for a model, let every model compute once, and emit the events."""
        self._begin_waiting()
        for id_, runner in self.runners.items():
            newest = self.registry.get(id_)
            if newest and newest.key not in {runner.entry.key, *self.registry.failures}:
                self._load(newest)
        for runner in self._all_runners():
            runner.step()
            self._beat()
        self.retiring = [runner for runner in self.retiring if runner.scheduler.sequences]
        if self._events:
            events, self._events = self._events, {}
            self.emit(events)

    def _emit(self, client: object, message: Message) -> None:
        self._events.setdefault(client, []).append(message)

    def accept(self, client: object, message: Message) -> None:
        """Take a front end's message."""
        if isinstance(message, Cancel):
            n = self._drop(client, message.request_id)
            if message.reason == "stop":
                self.stats.finished += n
            else:
                self.stats.cancelled += n
        elif isinstance(message, Computation | Describe):
            self.stats.requests += 1
            self._take(client, message, is_new=True)

    def leave(self, client: object) -> None:
        """Drop all requests of a front end that is gone."""
        self.stats.cancelled += self._drop(client)

    def drain(self) -> None:
        """Take no new requests; end when the open ones are answered, or after `drain_s`."""
        self._drain_until = time.monotonic() + self.settings.drain_s

    def models(self) -> Models:
        """Return the models that are served, by the weights that compute until newer ones do."""
        tasks: tuple[Task | None, ...] = (None, "generate", "classify")
        default = {task: self.registry.default(task) for task in tasks}
        models = []
        for entry in self.registry.entries:
            runner = self.runners.get(entry.id)
            weights = runner.entry if runner else entry
            models.append(
                ModelInfo(
                    id=entry.id,
                    aliases=list(entry.aliases),
                    created=weights.created,
                    revision=weights.revision,
                    loaded=runner is not None,
                    default_for=[task for task, best in default.items() if best == entry],
                    name=entry.name,
                    task=entry.task,
                    max_model_len=entry.max_model_len,
                    error=self.registry.failures.get(entry.key, (0.0, ""))[1],
                )
            )
        return Models(models)

    def changed(self) -> None:
        """Retire models that are gone, after the registry found other checkpoints."""
        for id_ in [id_ for id_ in self.runners if self.registry.get(id_) is None]:
            self.retiring.append(self.runners.pop(id_))
        self._emit(None, self.models())

    def _beat(self) -> None:
        """Emit the statistics, with the present load, where a heartbeat is due."""
        if time.monotonic() < self._beat_at:
            return
        self._beat_at = time.monotonic() + BEAT_S
        schedulers = [runner.scheduler for runner in self._all_runners()]
        stats = self.stats
        stats.slots = sum(len(s.slots.slots) for s in schedulers)
        stats.slots_used = sum(len(s.slots.slots) - s.slots.n_free for s in schedulers)
        stats.queued = sum(len(s.waiting) for s in schedulers) + len(self._waiting)
        stats.threads = torch.get_num_threads()
        if self.runners:
            newest = max(self.runners.values(), key=lambda runner: runner.used)
            stats.device, stats.dtype = str(newest.forward.device), newest.dtype
        self.emit({None: [stats]})

    def _all_runners(self) -> list[Runner]:
        return [*self.runners.values(), *self.retiring]

    def _check_queue(self, request: Computation | Describe) -> None:
        """Refuse requests while draining, and those of a key that has its share of a full queue.

        Each key that waits has an equal share; one that is alone has all.
        """
        if self._drain_until is not None:
            raise EngineError("unavailable", "The engine is shutting down.")
        n_queued = sum(runner.scheduler.n_queued for runner in self._all_runners())
        n_queued += len(self._waiting)
        if isinstance(request, Describe) or n_queued < self.settings.max_queue:
            return
        keys = Counter(r.key for _, r in self._waiting if isinstance(r, Computation))
        for runner in self._all_runners():
            keys.update(s.request.key for s in runner.scheduler.waiting)
        if keys[request.key] >= max(1, self.settings.max_queue // len({*keys, request.key})):
            raise EngineError("overloaded", f"The queue is full ({n_queued} requests wait).")

    def _begin(self, client: object, request: Computation | Describe) -> None:
        """Give a request to its model, or have it wait for that; raises EngineError."""
        entry = self.registry.find(request.model)
        if entry is None:
            raise EngineError("not_found", f"The model {request.model!r} does not exist.")
        runner = self.runners.get(entry.id)
        if runner is None or runner.entry.key != entry.key:
            why = self._load(entry)
            if runner is None:
                if why:
                    raise EngineError("internal", why)
                self._waiting.append((client, request))
                return
        runner.used = time.monotonic()
        if not runner.prepared(request, partial(self.post, self._begin_waiting)):
            self._waiting.append((client, request))
        elif isinstance(request, Describe):
            self._emit(client, runner.details(request.request_id))
        else:
            runner.add(client, request)

    def _begin_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for client, request in waiting:
            self._take(client, request)

    def _load(self, entry: Entry) -> str:
        """Begin to load a model where there is room; return why it will not be loaded, or ""."""
        now, loads = time.monotonic(), self._loading.values()
        if load := self._loading.get(entry.key):
            late = f"{entry.id} could not be loaded within {load.deadline - load.started:.0f} s."
            return late if now > load.deadline else ""
        failed_at, why = self.registry.failures.get(entry.key, (0.0, ""))
        if why and now < failed_at + RETRY_S:
            return why
        # One at a time, but for those that take long; each takes the memory of a model.
        if any(now < load.started + PATIENCE_S for load in loads):
            return ""
        if sum(now <= load.deadline for load in loads) > self.settings.max_models:
            return ""
        has_room = entry.id in self.runners or len(self.runners) < self.settings.max_models
        if has_room or self._evict():
            self._loading[entry.key] = Load(now, now + LOAD_S + entry.size / LOAD_BYTES_PER_S)
            # A daemon, so that a load that hangs does not keep the process from ending.
            threading.Thread(target=self._read, args=(entry,), name="load", daemon=True).start()
        return ""

    def _evict(self, *, but: Runner | None = None) -> bool:
        """Drop the least recently used idle model; return whether there was one."""
        idle = [r for r in self.runners.values() if not r.scheduler.sequences and r is not but]
        if idle:
            oldest = min(idle, key=lambda runner: runner.used)
            log.info("evicting %s", oldest.entry.id)
            del self.runners[oldest.entry.id]
        return bool(idle)

    def _read(self, entry: Entry) -> None:
        """Load a checkpoint (in a thread of its own)."""
        n_models = min(self.settings.max_models, len(self.registry.entries))
        try:
            runner = load_runner(
                entry, self.settings, self.stats, self._emit, self.cache_bytes, n_models
            )
            self.post(partial(self._loaded, runner))
        except Exception as error:  # whatever a file can do to its reader
            self.post(partial(self._not_loaded, entry, error))

    def _loaded(self, runner: Runner) -> None:
        loaded = runner.entry
        self._loading.pop(loaded.key, None)
        self.registry.failures.pop(loaded.key, None)
        old, newest = self.runners.get(loaded.id), self.registry.get(loaded.id)
        if old is not None and newest is not None and old.entry.key == newest.key:
            return  # newer weights were loaded in less time
        runner.used = old.used if old else time.monotonic()  # newer weights are no use of a model
        if old is not None:
            self.retiring.append(old)
        self.runners[loaded.id] = runner
        self._begin_waiting()
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
        """Note why; the next step refuses its requests, or loads the weights that came since."""
        self._loading.pop(entry.key, None)
        is_known = isinstance(error, ValueError | OSError)
        what = str(error).replace(f"{entry.path.parent}{os.sep}", "")
        why = f"{entry.id} could not be loaded: {what if is_known else type(error).__name__}"
        if self.registry.failures.get(entry.key, (0.0, ""))[1] != why:  # once, not at each request
            trace = None if is_known else error
            log.error("could not load %s: %s", entry.id, error, exc_info=trace)
        self.registry.failures[entry.key] = time.monotonic(), why
        self._emit(None, self.models())

    def _take(
        self, client: object, request: Computation | Describe, *, is_new: bool = False
    ) -> None:
        """Begin a request, or answer with the reason; an unexpected error is its alone."""
        try:
            if is_new:
                self._check_queue(request)
            self._begin(client, request)
        except Exception as error:
            if not isinstance(error, EngineError):
                log.exception("a request was not taken", extra=of_request(request.request_id))
                why = f"The request could not be taken ({type(error).__name__}: {error})."
                error = EngineError("internal", why)
            self.stats.failed += 1
            self._emit(client, Failed(request.request_id, error.kind, str(error)))

    def _drop(self, client: object, request_id: str | None = None) -> int:
        """Drop a client's request, or all of them; return the number of those in the queue."""

        def is_gone(other: object, request: Computation | Describe) -> bool:
            return other is client and request_id in (None, request.request_id)

        self._waiting = [waiting for waiting in self._waiting if not is_gone(*waiting)]
        schedulers = [runner.scheduler for runner in self._all_runners()]
        gone = [(t, s) for t in schedulers for s in t.sequences if is_gone(s.client, s.request)]
        for scheduler, sequence in gone:
            scheduler.remove(sequence)
        return len(gone)
