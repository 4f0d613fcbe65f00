"""The engine's process: one thread computes, the other talks to front ends.

Started by `EngineProcess`: it ends when its standard input does, and drains on SIGTERM.
"""

import asyncio
import hmac
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from serving.engine.client import SECRET_VARIABLE, read_frame
from serving.engine.engine import Engine
from serving.engine.loading import choose_device
from serving.engine.messages import Beat, Hello, Message, Settings, to_frame
from serving.engine.native import load_library
from serving.engine.runner import Event

BEAT_S = 0.4  # the shortest time between two heartbeats
MAX_UNSENT_BYTES = 64 * 2**20  # a front end that does not read is cut off

log = logging.getLogger(__name__)


class Server:
    """Front ends' connections: what they send is posted to the engine, what it tells is sent.

    Heartbeats are bytes on the descriptor `pulse`, and messages to the front ends.
    """

    def __init__(
        self, settings: Settings, address: str, secret: str, pulse: int | None = None
    ) -> None:
        self.settings, self.address, self.secret = settings, address, secret
        self.pulse, self._beaten = pulse, 0.0
        self.engine = Engine(settings, self._tell, self._beat)
        self.front_ends: set[asyncio.StreamWriter] = set()
        self.talks: set[asyncio.Task[Any]] = set()

    async def serve(self) -> None:
        """Serve until the engine has drained."""
        self.loop = asyncio.get_running_loop()
        listening = await self._listen()
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self._drain)
        if not sys.stdin.closed:
            threading.Thread(target=self._end_with_parent, daemon=True).start()
        watching = asyncio.create_task(self._watch())
        await _in_thread(self.engine.run, "engine")
        watching.cancel()
        listening.close()
        for writer in list(self.front_ends):
            with suppress(ConnectionError):
                await asyncio.wait_for(writer.drain(), 1)
            writer.close()
        if self.talks:
            await asyncio.wait(self.talks, timeout=1)

    async def _listen(self) -> asyncio.Server:
        kind, _, rest = self.address.partition(":")
        if kind == "unix":
            Path(rest).unlink(missing_ok=True)
            server = await asyncio.start_unix_server(self._talk, rest)
            os.chmod(rest, 0o600)
            return server
        host, _, port = rest.rpartition(":")
        return await asyncio.start_server(self._talk, host, int(port))

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.talks.add(task)
        try:
            await self._greet(reader, writer)
            while True:
                for message in await read_frame(reader):
                    self.engine.post(partial(self.engine.accept, writer, message))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception:  # a frame that is none: this front end's fault alone
            log.exception("a front end was cut off")
        finally:
            self.talks.discard(task)
            self.front_ends.discard(writer)
            self.engine.post(partial(self.engine.leave, writer))
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello, *others = await read_frame(reader)
        if not isinstance(hello, Hello) or not hmac.compare_digest(hello.secret, self.secret):
            raise ConnectionError("no secret, or another")
        self.front_ends.add(writer)
        writer.write(to_frame([self.engine.models(), Beat()]))  # others are to follow
        for message in others:
            self.engine.post(partial(self.engine.accept, writer, message))

    def _tell(self, events: list[Event]) -> None:
        """Send events, one frame for each front end (called in the engine's thread)."""
        by_client: dict[object, list[Message]] = {}
        for client, message in events:
            by_client.setdefault(client, []).append(message)
        frames = [(client, to_frame(messages)) for client, messages in by_client.items()]
        self.loop.call_soon_threadsafe(self._send, frames)

    def _beat(self) -> None:
        """Show that the engine's thread moves (called in it)."""
        if time.monotonic() - self._beaten < BEAT_S:
            return
        self._beaten = time.monotonic()
        if self.pulse is not None and select.select([], [self.pulse], [], 0)[1]:
            with suppress(OSError):  # the parent process is gone
                os.write(self.pulse, b"\0")
        self._tell([Event(None, Beat())])

    def _send(self, frames: list[tuple[object, bytes]]) -> None:
        for client, frame in frames:
            for writer in list(self.front_ends):
                if client is None or writer is client:
                    writer.write(frame)
                    if writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
                        log.error("a front end does not read; it is cut off")
                        writer.transport.abort()

    async def _watch(self) -> None:
        """Look for new checkpoints now and then."""
        while True:
            await asyncio.sleep(self.settings.watch_s)
            try:
                if await asyncio.to_thread(self.engine.registry.rescan):
                    self.engine.post(self.engine.changed)
            except OSError as error:
                log.warning("could not look for new checkpoints: %s", error)

    def _drain(self) -> None:
        self.engine.post(self.engine.drain)

    def _end_with_parent(self) -> None:
        while os.read(sys.stdin.fileno(), 1024):  # a raw read holds no lock when we exit
            pass
        self._drain()


async def _in_thread(work: Callable[[], None], name: str) -> None:
    """Run something in a thread of that name that no exit waits for; raise what it raises."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)
        finally:
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name=name, daemon=True).start()
    await done.wait()
    if raised:
        raise raised[0]


def run(address: str, settings: Settings, pulse: int | None = None) -> None:
    """Run an engine until it is told to end; its heartbeats are written to `pulse`."""
    import torch

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if choose_device(settings.device).type == "cpu":
        load_library()  # an engine that listens is ready
    secret = os.environ.get(SECRET_VARIABLE, "")
    try:
        asyncio.run(Server(settings, address, secret, pulse).serve())
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it has ended as asked
