"""Reach an engine in another process (`EngineClient`), and keep one running (`EngineProcess`)."""

import asyncio
import itertools
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

from serving.engine.messages import (
    Cancel,
    Describe,
    EngineError,
    Failed,
    Message,
    ModelDetails,
    ModelInfo,
    Models,
    Request,
    Settings,
    Stats,
    Tokens,
    read_frame,
    to_frame,
)

RECONNECT_S = 0.1
RESTART_S = (0.1, 10.0)  # first and longest pause before a dead engine is started again
STARTING = "The engine is starting; try again in a moment."
STALLED = "The engine does not respond; try again in a moment."
LOST = "The engine stopped while it computed the answer; try again."
START_S = 60.0  # torch takes seconds to import, on a busy machine many
FIRST_BEAT_S = 600.0  # kernels may be compiled before
POLL_S = 0.1  # how often a process is looked at
LATE_S = 0.5  # of a timer: later, the process was suspended
MAX_ROOT_BYTES = 70  # of the directory of a socket's: the path of a socket has at most 103

log = logging.getLogger(__name__)
Answer = TypeVar("Answer", bound=Message)


class EngineClient:
    """One connection to an engine, shared by all requests of a front end.

    It connects again whenever the connection is lost; requests that were open, and those made
    meanwhile, raise EngineError("unavailable"). So do new requests when the engine's computing
    thread has shown no heartbeat for `stall_s`; those that are open go on waiting.
    """

    def __init__(self, address: str, stall_s: float = 10.0) -> None:
        self.address, self.stall_s = address, stall_s
        self.stalled = False
        self.stats: Stats | None = None  # the latest, while the engine responds
        self._receivers: dict[str, Callable[[Message], None]] = {}  # of open requests
        self._models: list[ModelInfo] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._ready = asyncio.Event()
        self._stalling: asyncio.TimerHandle | None = None
        self._numbers = itertools.count()
        self._prefix = secrets.token_hex(4)
        self._task: asyncio.Task[None] | None = None

    async def connect(self, timeout_s: float | None = START_S) -> None:
        """Begin to connect, and wait for the engine's first list of models.

        Raises asyncio.TimeoutError after `timeout_s` (the client goes on trying).
        """
        if self._task is None:
            self._task = asyncio.create_task(self._stay_connected())
        await asyncio.wait_for(self._ready.wait(), timeout_s)

    @property
    def connected(self) -> bool:
        """Whether the engine takes requests now."""
        return self._ready.is_set() and not self.stalled

    def models(self) -> list[ModelInfo]:
        """Return the engine's latest list of models.

        Raises EngineError("unavailable") before the first.
        """
        if self._models is None:
            raise EngineError("unavailable", STARTING)
        return self._models

    def new_id(self, cause: str = "client") -> str:
        """Return a unique request id; it begins with the id of its cause."""
        return f"{cause}-{self._prefix}-{next(self._numbers)}"

    async def details(self, model: ModelInfo) -> ModelDetails:
        """Return a model's tokenizer record, template and shape; raises EngineError."""
        return await self.answer(Describe(self.new_id(), model.id), ModelDetails)

    def submit(self, request: Request, receive: Callable[[Message], None]) -> None:
        """Send a request; `receive` is called with each message of its answer.

        The last is Tokens with a `finish_reason`, Failed, or the only one of another type. Raises
        EngineError("unavailable").
        """
        if self._writer is None or not self.connected:
            raise EngineError("unavailable", STALLED if self.stalled else STARTING)
        self._receivers[request.request_id] = receive
        self._writer.write(to_frame([request]))

    def cancel(self, request_id: str, reason: Literal["left", "stop"] = "left") -> None:
        """Drop a request, or report its answer as complete; no effect on an answered one."""
        if self._receivers.pop(request_id, None) and self._writer is not None:
            self._writer.write(to_frame([Cancel(request_id, reason)]))

    async def answer(self, request: Request, kind: type[Answer]) -> Answer:
        """Return the one answer to a request; raises EngineError."""
        answers: asyncio.Queue[Message] = asyncio.Queue()
        self.submit(request, answers.put_nowait)
        try:
            answer = await answers.get()
        finally:
            self.cancel(request.request_id)
        if isinstance(answer, Failed):
            raise EngineError(answer.kind, answer.message)
        assert isinstance(answer, kind)
        return answer

    async def close(self) -> None:
        """Disconnect: the engine cancels what is still open."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _stay_connected(self) -> None:
        while True:
            try:
                path = self.address.removeprefix("unix:")
                reader, self._writer = await asyncio.open_unix_connection(path)
                try:
                    await self._receive(reader)
                finally:
                    self._lost()
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                log.debug("engine connection: %s", error)
            await asyncio.sleep(RECONNECT_S)

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        while True:
            for message in await read_frame(reader):
                if isinstance(message, Models):
                    self._models = message.models
                    self._ready.set()
                elif isinstance(message, Stats):
                    self.stats = message
                    self._beat()
                elif receive := self._receivers.get(message.request_id):
                    if not (isinstance(message, Tokens) and message.finish_reason is None):
                        del self._receivers[message.request_id]
                    receive(message)

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
        self.stalled, self.stats = True, None
        log.error("the engine has not responded for %g s; new requests are refused", self.stall_s)

    def _calm(self) -> None:
        self.stalled = False
        if self._stalling is not None:
            self._stalling.cancel()

    def _lost(self) -> None:
        self._calm()
        assert self._writer is not None
        self._writer.close()
        self._writer = self.stats = None
        self._ready.clear()
        receivers, self._receivers = self._receivers, {}
        for request_id, receive in receivers.items():
            receive(Failed(request_id, "unavailable", LOST))


class EngineProcess:
    """An engine in a process of its own, started again whenever it dies or hangs.

    It hangs when its computing thread has shown no heartbeat for `hang_s`. It ends with its parent,
    however that ends: its standard input is closed then.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.restarts = settings, 0
        root = tempfile.gettempdir()
        root = root if len(os.fsencode(root)) <= MAX_ROOT_BYTES else "/tmp"
        self._directory = tempfile.TemporaryDirectory(prefix="nanogpt-", dir=root)
        self.address = f"unix:{self._directory.name}/engine.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._keep_alive, daemon=True, name="engine-watch")

    def start(self) -> None:
        """Start the process; a client's `connect` waits until it is ready."""
        self._spawn()
        self._watcher.start()

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
            self._process.wait(self.settings.drain_s + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._watcher.join()
        self._directory.cleanup()
        return self._process.wait()

    def _spawn(self) -> None:
        command = [sys.executable, "-m", "serving.engine", self.address]
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            # Threads that spin for the others keep them from the processor where it is shared: at
            # a load of 8 on two cores a 124M int8 step took 14 ms so, and 190 ms by default.
            "GOMP_SPINCOUNT": "300",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
        }
        self._process = subprocess.Popen(
            [*command, self.settings.model_dump_json()],
            stdin=subprocess.PIPE,  # closed when this process ends, and with it the engine
            stdout=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C is for the parent, which drains
        )

    def _keep_alive(self) -> None:
        shortest, longest = RESTART_S
        pause = shortest
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                code = asyncio.run(self._watch())
                if self._stopping.is_set():
                    return
                is_lasting = time.monotonic() - started > START_S
                pause = shortest if is_lasting else min(2 * pause, longest)
                log.error("the engine ended with code %s; starting it again in %.1f s", code, pause)
                if not self._stopping.wait(pause):
                    self._spawn()
                    self.restarts += 1
            except OSError as error:  # too many open files
                log.error("the engine cannot be watched (%s); trying again", error)
                self._stopping.wait(longest)

    async def _watch(self) -> int:
        """Wait until the process ends, and return its code; kill it when its heartbeats stop."""
        process = self._process
        assert process is not None
        client = EngineClient(self.address, self.settings.hang_s)
        connecting = asyncio.create_task(client.connect(FIRST_BEAT_S))
        while process.poll() is None:
            if client.stalled or (connecting.done() and connecting.exception()):
                silent_s = client.stall_s if client.stalled else FIRST_BEAT_S
                log.error("the engine has not responded for %g s; it is killed", silent_s)
                process.kill()
                process.wait()
            await asyncio.sleep(POLL_S)
        connecting.cancel()
        await client.close()
        process.communicate()  # closes its standard input
        return process.returncode
