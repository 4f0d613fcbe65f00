"""Reach an engine in another process (`EngineClient`), and keep one running (`EngineProcess`).

An address is `unix:PATH` or, where there are no such sockets, `tcp:127.0.0.1:PORT` with a secret.
"""

import asyncio
import itertools
import logging
import os
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from serving.engine.messages import (
    LENGTH_BYTES,
    MAX_FRAME_BYTES,
    AskStats,
    Beat,
    Cancel,
    Classified,
    Classify,
    Describe,
    Failed,
    FailureKind,
    Finished,
    Generate,
    Hello,
    Message,
    ModelDetails,
    ModelInfo,
    Models,
    Request,
    Score,
    Scored,
    Settings,
    Stats,
    Task,
    Tokens,
    from_frame,
    settings_json,
    to_frame,
)

SECRET_VARIABLE = "NANOGPT_ENGINE_SECRET"
RECONNECT_S = 0.1
RESTART_S = (0.1, 10.0)  # first and longest pause before a dead engine is started again
STARTING = "The engine is starting; try again in a moment."
STALLED = "The engine does not respond; try again in a moment."
START_S = 60.0  # torch takes seconds to import, on a busy machine many
FIRST_BEAT_S = 600.0  # kernels may be compiled before
LISTEN_S = 0.25  # for a heartbeat, before its absence counts
LATE_S = 0.5  # of a timer: later, the process was suspended
STATS_S = 3.0  # for the engine's counters

log = logging.getLogger(__name__)
Answer = TypeVar("Answer", Scored, Classified, ModelDetails, Stats)


class EngineError(Exception):
    """A request that the engine did not answer: `kind` is one of messages.FailureKind."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class EngineClient:
    """One connection to an engine, shared by all requests of a front end.

    It connects again whenever the connection is lost; requests that were open, and those made
    meanwhile, raise EngineError("unavailable"). So do new requests when the engine's computing
    thread has shown no heartbeat for `stall_s`; those that are open go on waiting.
    """

    def __init__(self, address: str, secret: str | None = None, stall_s: float = 10.0) -> None:
        self.address = address
        self.secret = os.environ.get(SECRET_VARIABLE, "") if secret is None else secret
        self._answers: dict[str, _Mailbox] = {}
        self._models: list[ModelInfo] | None = None
        self._details: dict[tuple[str, str], ModelDetails] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._ready = asyncio.Event()
        self.stall_s, self.stalled = stall_s, False
        self._stalling: asyncio.TimerHandle | None = None
        self._numbers = itertools.count()
        self._prefix = secrets.token_hex(4)
        self._task: asyncio.Task[None] | None = None

    async def connect(self, timeout_s: float | None = START_S) -> None:
        """Begin to connect, and wait until the engine has told its models.

        Raises EngineError("unavailable") after `timeout_s` (the client goes on trying).
        """
        if self._task is None:
            self._task = asyncio.create_task(self._stay_connected())
        try:
            await asyncio.wait_for(self._ready.wait(), timeout_s)
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise EngineError("unavailable", f"no engine answers at {self.address}") from error

    @property
    def connected(self) -> bool:
        """Whether the engine can be asked now."""
        return self._ready.is_set() and not self.stalled

    def models(self) -> list[ModelInfo]:
        """Return the models that the engine told of last.

        Raises EngineError("unavailable") until it has.
        """
        if self._models is None:
            raise EngineError("unavailable", STARTING)
        return self._models

    def find(self, name: str | None, task: Task | None = None) -> ModelInfo:
        """Return the model of an id or alias, or the default one for a task for None and "".

        Raises EngineError: "not_found" for others, "unavailable" as `models` does.
        """
        models = self.models()
        if name:
            found = [model for model in models if name in (model.id, *model.aliases)]
        else:
            found = [m for m in models if task and getattr(m, f"default_to_{task}")]
            found = found or [model for model in models if model.default]
        if found:
            return found[0]
        known = ", ".join(model.id for model in models)
        there = f"there are {known}" if known else "there are none yet"
        raise EngineError("not_found", f"The model {name!r} does not exist; {there}.")

    def new_id(self, cause: str = "client") -> str:
        """Return a request id that nobody else uses; it begins with the id of its cause."""
        return f"{cause}-{self._prefix}-{next(self._numbers)}"

    async def details(self, model: ModelInfo) -> ModelDetails:
        """Return a model's tokenizer record, template and shape; asked once for each revision."""
        key = (model.id, model.revision)
        if key not in self._details:
            details = await self._ask(Describe(self.new_id(), model.id), ModelDetails)
            stale = [k for k in self._details if k[0] == model.id]
            for k in stale:
                del self._details[k]
            self._details[key] = details
        return self._details[key]

    async def generate(self, request: Generate) -> AsyncGenerator[Tokens | Finished, None]:
        """Yield an answer's tokens as they come, then Finished.

        Tokens that came while the reader was busy are one message. Closing the generator cancels
        the request: iterate within `contextlib.aclosing`. Where a stop string ends the answer,
        say so before (`stop`). Raises EngineError.
        """
        async with aclosing(self._stream(request)) as answers:
            async for answer in answers:
                assert isinstance(answer, Tokens | Finished)
                yield answer

    def stop(self, request_id: str) -> None:
        """Tell the engine that an answer is complete; nothing where the engine said so itself."""
        self._cancel(Cancel(request_id, "stop"))

    async def score(self, request: Score) -> Scored:
        """Return the log-probabilities of a prompt's tokens."""
        return await self._ask(request, Scored)

    async def classify(self, request: Classify) -> Classified:
        """Return the label probabilities of a text."""
        return await self._ask(request, Classified)

    async def stats(self) -> Stats:
        """Return the engine's counters; raises EngineError("unavailable") after STATS_S."""
        try:
            return await asyncio.wait_for(self._ask(AskStats(self.new_id()), Stats), STATS_S)
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise EngineError("unavailable", STALLED) from error

    async def close(self) -> None:
        """Disconnect: the engine cancels what is still open."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _ask(self, request: Request, kind: type[Answer]) -> Answer:
        async with aclosing(self._stream(request)) as answers:
            async for answer in answers:
                if isinstance(answer, kind):
                    return answer
        raise EngineError("internal", f"the engine did not answer a {type(request).__name__}")

    async def _stream(self, request: Request) -> AsyncGenerator[Message, None]:
        mailbox = self._send(request)
        try:
            while request.request_id in self._answers:
                answer = await mailbox.take()
                if not isinstance(answer, Tokens):
                    self._answers.pop(request.request_id, None)
                if isinstance(answer, Failed):
                    raise EngineError(answer.kind, answer.message)
                yield answer
        finally:
            self._cancel(Cancel(request.request_id))

    def _cancel(self, cancel: Cancel) -> None:
        """Have the engine forget a request that is open."""
        if self._answers.pop(cancel.request_id, None) and self._writer is not None:
            self._writer.write(to_frame([cancel]))

    def _send(self, request: Request) -> "_Mailbox":
        if self._writer is None or not self.connected:
            raise EngineError("unavailable", STALLED if self.stalled else STARTING)
        mailbox = self._answers[request.request_id] = _Mailbox()
        self._writer.write(to_frame([request]))
        return mailbox

    async def _stay_connected(self) -> None:
        while True:
            try:
                reader, writer = await _open(self.address)
                try:
                    await self._receive(reader, writer)
                finally:
                    self._lost()
                    writer.close()
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                log.debug("engine connection: %s", error)
            await asyncio.sleep(RECONNECT_S)

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        writer.write(to_frame([Hello(self.secret)]))
        while True:
            for message in await read_frame(reader):
                if isinstance(message, Models):
                    self._models = message.models
                    self._ready.set()
                elif isinstance(message, Beat):
                    self._beat()
                elif mailbox := self._answers.get(getattr(message, "request_id", "")):
                    mailbox.put(message)

    def _beat(self) -> None:
        """Wait anew for the next heartbeat."""
        if self.stalled:
            log.warning("the engine responds again")
        self._calm()
        loop = asyncio.get_running_loop()
        due = loop.time() + self.stall_s
        self._stalling = loop.call_at(due, self._stall, due)

    def _stall(self, due: float) -> None:
        if asyncio.get_running_loop().time() > due + LATE_S:
            self._beat()  # this process was suspended, and has yet to read the heartbeats
            return
        self.stalled = True
        log.error("the engine has not responded for %g s; new requests are refused", self.stall_s)

    def _calm(self) -> None:
        self.stalled = False
        if self._stalling is not None:
            self._stalling.cancel()

    def _lost(self) -> None:
        self._calm()
        self._writer = None
        self._ready.clear()
        self._details.clear()
        for request_id, mailbox in self._answers.items():
            why = "The engine stopped while it computed the answer; try again."
            mailbox.put(Failed(request_id, "unavailable", why))


async def read_frame(reader: asyncio.StreamReader) -> list[Message]:
    """Return the messages of the next frame.

    Raises ValueError for a frame of more than MAX_FRAME_BYTES, IncompleteReadError at the end.
    """
    n_bytes = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
    if n_bytes > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {n_bytes} bytes; at most {MAX_FRAME_BYTES} are read")
    return from_frame(await reader.readexactly(n_bytes))


class EngineProcess:
    """An engine in a process of its own, started again whenever it dies or hangs.

    It hangs when its computing thread, which writes heartbeats to standard output, has written none
    for `hang_s`. It ends with its parent, however that ends: its standard input is closed then.
    """

    def __init__(self, settings: Settings, directory: str | os.PathLike[str] | None = None) -> None:
        self.settings = settings
        self.secret = secrets.token_hex(16)
        self.restarts = 0
        self._made = None if directory else tempfile.TemporaryDirectory(prefix="nanogpt-")
        self.address = free_address(Path(directory or str(self._made and self._made.name)))
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._keep_alive, daemon=True, name="engine-watch")

    def start(self) -> None:
        """Start the process; a client's `connect` waits until it is ready."""
        self._spawn()
        self._watcher.start()

    @property
    def pid(self) -> int | None:
        """The process id of the engine that runs now."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def drain(self) -> None:
        """Refuse new requests from now on; the process ends when the open ones have."""
        if not self._stopping.is_set() and self._process and self._process.poll() is None:
            self._process.terminate()
        self._stopping.set()

    def stop(self) -> int:
        """Drain for at most `drain_s`, then end the process; return its exit code."""
        self.drain()
        assert self._process is not None, "stop() before start()"
        try:
            code = self._process.wait(self.settings.drain_s + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()
        if self._watcher.is_alive():
            self._watcher.join()
        if self._made:
            self._made.cleanup()
        return code

    def _spawn(self) -> None:
        command = [sys.executable, "-m", "serving.engine", self.address]
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            # Threads that spin for the others keep them from the processor where it is shared: at
            # a load of 8 on two cores a 124M int8 step took 14 ms so, and 190 ms by default.
            "GOMP_SPINCOUNT": "300",
            **os.environ,
            SECRET_VARIABLE: self.secret,
            "PYTHONPATH": os.pathsep.join(paths),
        }
        self._process = subprocess.Popen(
            [*command, settings_json(self.settings)],
            stdin=subprocess.PIPE,  # closed when this process ends, and with it the engine
            stdout=subprocess.PIPE,  # heartbeats
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C is for the parent, which drains
        )

    def _keep_alive(self) -> None:
        shortest, longest = RESTART_S
        pause = shortest
        while not self._stopping.is_set():
            process, started = self._process, time.monotonic()
            assert process is not None
            code = self._await_end(process)
            if self._stopping.is_set():
                return
            pause = shortest if time.monotonic() - started > START_S else min(2 * pause, longest)
            log.error("the engine ended with code %s; starting it again in %.1f s", code, pause)
            if self._stopping.wait(pause):
                return
            self.restarts += 1
            self._spawn()

    def _await_end(self, process: subprocess.Popen[bytes]) -> int:
        """Return the exit code of a process, which is killed where its heart stops.

        Only the time that passes while this process runs counts as silence: both may be frozen.
        """
        assert process.stdin is not None
        assert process.stdout is not None
        pulse = select.poll()
        pulse.register(process.stdout, select.POLLIN)
        silence_s, limit_s = 0.0, FIRST_BEAT_S
        while silence_s < limit_s:
            if not pulse.poll(1000 * LISTEN_S):
                silence_s += LISTEN_S
            elif os.read(process.stdout.fileno(), 4096):
                silence_s, limit_s = 0.0, self.settings.hang_s
            else:
                break
        else:
            log.error("the engine has not responded for %g s; it is killed", limit_s)
            process.kill()
        code = process.wait()
        process.stdin.close()
        process.stdout.close()
        return code


def free_address(directory: Path) -> str:
    """Return an address for a new engine: a socket in `directory`, or a free loopback port."""
    path = directory / "engine.sock"
    if hasattr(socket, "AF_UNIX") and len(os.fsencode(path)) < 100:  # sun_path holds 108 bytes
        return f"unix:{path}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp:127.0.0.1:{probe.getsockname()[1]}"


async def _open(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    kind, _, rest = address.partition(":")
    if kind == "unix":
        return await asyncio.open_unix_connection(rest)
    host, _, port = rest.rpartition(":")
    return await asyncio.open_connection(host, int(port))


class _Mailbox:
    """The answers to one request that its reader has not taken yet."""

    def __init__(self) -> None:
        self._waiting: deque[Message] = deque()
        self._filled = asyncio.Event()

    def put(self, message: Message) -> None:
        last = self._waiting[-1] if self._waiting else None
        if isinstance(last, Tokens) and isinstance(message, Tokens):
            self._waiting[-1] = _joined(last, message)
        else:
            self._waiting.append(message)
        self._filled.set()

    async def take(self) -> Message:
        while not self._waiting:
            self._filled.clear()
            await self._filled.wait()
        return self._waiting.popleft()


def _joined(first: Tokens, second: Tokens) -> Tokens:
    if first.logprobs is None or second.logprobs is None:
        return replace(first, ids=first.ids + second.ids)
    return replace(
        first,
        ids=first.ids + second.ids,
        logprobs=first.logprobs + second.logprobs,
        top_ids=(first.top_ids or []) + (second.top_ids or []),
        top_logprobs=(first.top_logprobs or []) + (second.top_logprobs or []),
    )
