"""The engine as a process: start, requests, kill, drain."""

import asyncio
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path

import pytest

from serving.engine import engine as engine_module
from serving.engine.client import EngineClient, EngineError, EngineProcess
from serving.engine.engine import Engine, Events
from serving.engine.messages import Generate, SamplingParams, Settings, Stats
from serving.engine.server import Server
from tests.engine_models import write_model
from tests.fake_engine import generate
from tests.front_end import eventually

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="stops a process as Linux does")


@pytest.fixture
def process(tmp_path: Path) -> Iterator[EngineProcess]:
    write_model(tmp_path / "run" / "checkpoints" / "last.ckpt")
    settings = Settings(
        models=str(tmp_path), dtype="fp32", cache_gb=0.1, threads=1, drain_s=20, hang_s=3
    )
    process = EngineProcess(settings)
    process.start()
    yield process
    process.stop()


async def connected(process: EngineProcess) -> EngineClient:
    client = EngineClient(process.address)
    await client.connect(60)
    return client


def request(client: EngineClient, max_tokens: int) -> Generate:
    return Generate(client.new_id(), "run", [1, 2, 3], SamplingParams(max_tokens, temperature=0))


async def ids(client: EngineClient, max_tokens: int) -> list[int]:
    answers = [a async for a in generate(client, request(client, max_tokens))]
    assert answers[-1].finish_reason
    return [i for a in answers for i in a.ids]


def test_a_process_serves_front_ends_survives_a_kill_and_drains(process: EngineProcess) -> None:
    async def run() -> None:
        client, other = await connected(process), await connected(process)
        details = await client.details(client.models()[0])
        assert (details.block_size, details.dtype) == (256, "fp32")
        expected = await asyncio.gather(ids(client, 20), ids(other, 20))
        assert len(expected[0]) == 20
        assert expected[0] == expected[1]

        killed = generate(client, request(client, 250))
        await anext(killed)
        assert process._process is not None
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(EngineError) as raised:
            [a async for a in killed]
        assert raised.value.kind == "unavailable"
        await client.connect(60)
        assert await ids(client, 20) == expected[0]
        assert process.restarts == 1

        async with aclosing(generate(client, request(client, 200))) as draining:
            await anext(draining)
            process.drain()
            answers = [a async for a in draining]
        assert answers[-1].finish_reason
        await client.close()
        await other.close()

    asyncio.run(run())
    assert process.stop() == 0


def test_no_other_user_can_connect(process: EngineProcess) -> None:
    async def run() -> None:
        await (await connected(process)).close()

    asyncio.run(run())
    socket = Path(process.address.removeprefix("unix:"))
    assert [path.stat().st_mode & 0o777 for path in (socket, socket.parent)] == [0o600, 0o700]


@LINUX
def test_a_stopped_process_is_replaced(
    process: EngineProcess, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        client = EngineClient(process.address, stall_s=1.5)
        await client.connect(60)
        expected = await ids(client, 20)
        stopped = generate(client, request(client, 250))
        await anext(stopped)
        assert process._process is not None
        os.kill(process._process.pid, signal.SIGSTOP)
        await asyncio.wait_for(until(lambda: client.stalled), 20)
        assert client.stats is None
        with pytest.raises(EngineError, match="does not respond"):
            await client.details(client.models()[0])
        with pytest.raises(EngineError) as raised:
            [a async for a in stopped]
        assert raised.value.kind == "unavailable"
        await client.connect(60)
        assert await ids(client, 20) == expected
        assert process.restarts == 1
        await client.close()

    asyncio.run(run())
    assert "the engine has not responded for 3 s; it is killed" in caplog.messages


def wait_for(event: threading.Event) -> None:
    event.wait(60)


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


def test_a_heartbeat_is_that_of_the_computing_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Server, "_end_with_parent", lambda server: None)
    goes_on = threading.Event()

    async def run() -> None:
        server = Server(Settings(models=str(tmp_path)), f"unix:{tmp_path}/e")
        serving = asyncio.create_task(server.serve())
        client = EngineClient(f"unix:{tmp_path}/e", stall_s=1.5)
        await client.connect(20)
        await asyncio.wait_for(until(lambda: client.stats is not None), 20)
        server.engine.post(partial(wait_for, goes_on))
        await asyncio.wait_for(until(lambda: client.stalled), 20)
        assert not client.connected
        goes_on.set()
        await asyncio.wait_for(until(lambda: client.connected), 20)
        await client.close()
        server._drain()
        await serving

    asyncio.run(run())
    assert "the engine responds again" in caplog.messages


def test_a_heartbeat_goes_on_while_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "run" / "last.ckpt")
    loaded, emitted = threading.Event(), list[Events]()

    def load(*arguments: object) -> None:
        loaded.wait()
        raise ValueError("injected")

    monkeypatch.setattr(engine_module, "load_runner", load)
    engine = Engine(Settings(models=str(tmp_path)), emitted.append)
    thread = threading.Thread(target=engine.run)
    thread.start()
    try:
        assert eventually(lambda: sum(isinstance(e[None][0], Stats) for e in emitted) > 3)
    finally:
        loaded.set()
        engine.post(engine.drain)
        thread.join()


class Pauses(threading.Event):
    """An event that is set after so many waits, each of which takes no time."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.seconds = n, []  # type: ignore[var-annotated]

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout)
        if len(self.seconds) == self.n:
            self.set()
        return self.is_set()


def test_an_engine_that_dies_at_once_is_started_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    process = EngineProcess(Settings(models=str(tmp_path)))
    pauses = process._stopping = Pauses(9)
    process.start()
    ended = eventually(lambda: not process._watcher.is_alive(), 30)
    pauses.set()
    process.stop()
    assert ended
    assert pauses.seconds == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0]
    assert process.restarts == 8


def test_the_watch_goes_on_after_a_failed_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    process = EngineProcess(Settings(models=str(tmp_path)))
    pauses = process._stopping = Pauses(4)
    starts, spawn = iter([True, False, True]), process._spawn

    def spawn_or_fail() -> None:
        if not next(starts):
            raise OSError("too many open files")
        spawn()

    monkeypatch.setattr(process, "_spawn", spawn_or_fail)
    process.start()
    ended = eventually(lambda: not process._watcher.is_alive(), 30)
    pauses.set()
    process.stop()
    assert ended
    assert pauses.seconds == [0.2, 10.0, 0.4, 0.8]
    assert "too many open files" in caplog.text


def test_the_watcher_outlives_a_look_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks: Iterator[OSError | bool] = iter([OSError("injected"), True])

    def rescan() -> bool:
        if isinstance(look := next(looks, False), OSError):
            raise look
        return look

    async def run() -> None:
        server = Server(Settings(models=str(tmp_path), watch_s=0.001), f"unix:{tmp_path}/e")
        monkeypatch.setattr(server.engine.registry, "rescan", rescan)
        changed = asyncio.Event()
        monkeypatch.setattr(server.engine, "post", lambda work: changed.set())
        watching = asyncio.create_task(server._watch())
        await asyncio.wait_for(changed.wait(), 10)
        watching.cancel()

    asyncio.run(run())
    assert "injected" in caplog.text


def test_a_front_end_that_does_not_read_does_not_fail_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(Settings(models=str(tmp_path)), f"unix:{tmp_path}/e")
    connected = threading.Event()

    def fill() -> None:
        for writer in server.front_ends:
            writer.write(bytes(2**24))

    def end(engine: Engine) -> None:
        connected.wait(10)
        server.loop.call_soon_threadsafe(fill)

    monkeypatch.setattr(Engine, "run", end)
    monkeypatch.setattr(server, "_end_with_parent", lambda: None)

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        await asyncio.to_thread(eventually, server.path.exists)
        _, writer = await asyncio.open_unix_connection(server.path, limit=1)
        await asyncio.to_thread(eventually, lambda: server.front_ends)
        connected.set()
        await serving
        writer.close()

    asyncio.run(run())
