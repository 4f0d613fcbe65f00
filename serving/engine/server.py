"""The server of an engine's process: one thread computes, the other talks to front ends."""

import asyncio
import logging
import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path

from serving.engine.engine import Engine, Events
from serving.engine.messages import Settings, read_frame, to_frame

log = logging.getLogger(__name__)


class Server:
    """Front ends' connections: what they send is posted to the engine, its events are sent.

    It drains on SIGTERM and at the end of standard input.
    """

    def __init__(self, settings: Settings, address: str) -> None:
        self.settings, self.path = settings, Path(address.removeprefix("unix:"))
        self.engine = Engine(settings, self._emit)
        self.front_ends: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        """Serve until the engine has drained."""
        self.loop = asyncio.get_running_loop()
        self.path.unlink(missing_ok=True)
        listening = await asyncio.start_unix_server(self._converse, self.path)
        self.path.chmod(0o600)
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self._drain)
        if not sys.stdin.closed:
            threading.Thread(target=self._end_with_parent, daemon=True).start()
        watching = asyncio.create_task(self._watch())
        await asyncio.to_thread(self.engine.run)
        watching.cancel()
        listening.close()
        for writer in self.front_ends:
            writer.close()  # after what is to be sent
        if self.front_ends:
            await asyncio.wait(self.front_ends.values(), timeout=2)
        for writer in self.front_ends:  # they do not read
            writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.front_ends[writer] = task
        try:
            writer.write(to_frame([self.engine.models(), self.engine.stats]))
            while True:
                for message in await read_frame(reader):
                    self.engine.post(partial(self.engine.accept, writer, message))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception:  # a frame that is none: this front end's fault alone
            log.exception("a front end was cut off")
        finally:
            del self.front_ends[writer]
            self.engine.post(partial(self.engine.leave, writer))
            writer.close()

    def _emit(self, events: Events) -> None:
        """Send events, one frame for each front end (called in the engine's thread)."""
        frames = [(client, to_frame(messages)) for client, messages in events.items()]
        self.loop.call_soon_threadsafe(self._send, frames)

    def _send(self, frames: list[tuple[object, bytes]]) -> None:
        for client, frame in frames:
            for writer in list(self.front_ends):
                if client is None or writer is client:
                    writer.write(frame)

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
