"""The whole front end on a real port, before an engine with prepared replies."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from serving.api.connection import Connection
from serving.api.settings import ApiSettings
from serving.app import create_app
from serving.engine.client import EngineClient
from serving.engine.messages import Generate
from tests.fake_engine import FakeEngine, Reply


def fixed_reply(text: str | bytes) -> Reply:
    """Return a reply function that answers every request with the bytes of a text."""
    ids = list(text.encode() if isinstance(text, str) else text)
    return lambda request: ids


def generated(engine: FakeEngine) -> list[Generate]:
    """Return the generation requests that an engine received."""
    return [message for message in engine.requests if isinstance(message, Generate)]


def hang_up(engine: FakeEngine) -> None:
    """Break an engine's connections, from the test's thread."""
    assert engine._server is not None
    engine._server.get_loop().call_soon_threadsafe(engine.hang_up)


def eventually(true: Any, seconds: float = 10.0) -> bool:
    """Return whether a condition becomes true in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@contextlib.contextmanager
def serve(engine: FakeEngine, settings: ApiSettings | None = None, port: int = 0) -> Iterator[str]:
    """Run engine and front end in a thread; give the server's address, without /v1."""
    started, address, servers = threading.Event(), [""], []

    async def run() -> None:
        stall_s = (settings or ApiSettings()).stall_s
        client = EngineClient(f"unix:{engine.path}", stall_s=stall_s)
        async with engine:
            await client.connect()
            with socket.socket() as listening:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listening.bind(("127.0.0.1", port))
                address[0] = f"http://127.0.0.1:{listening.getsockname()[1]}"
                app = create_app(settings or ApiSettings(), client)
                config = uvicorn.Config(
                    app, http=Connection, log_config=None, timeout_graceful_shutdown=5
                )
                servers.append(uvicorn.Server(config))
                starting = asyncio.create_task(_signal_start(servers[0], started))
                await servers[0].serve([listening])
                await starting
            await client.close()
            await asyncio.sleep(0.01)  # for the engine to see it

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert started.wait(30), "the server did not start"
        yield address[0]
    finally:
        for server in servers:
            server.should_exit = True
        thread.join()


async def _signal_start(server: uvicorn.Server, started: threading.Event) -> None:
    while not server.started:
        await asyncio.sleep(0.005)
    started.set()
