"""The engine as a process: started, asked, killed, drained."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from serving.engine.client import EngineClient, EngineError, EngineProcess
from serving.engine.messages import Finished, Generate, SamplingParams, Settings, Tokens
from serving.engine.server import Server
from tests.engine_models import write_model


@pytest.fixture
def process(tmp_path: Path) -> Iterator[EngineProcess]:
    write_model(tmp_path / "run" / "checkpoints" / "last.ckpt")
    settings = Settings(str(tmp_path), dtype="fp32", cache_gb=0.1, threads=1, drain_s=20)
    process = EngineProcess(settings, tmp_path)
    process.start()
    yield process
    process.stop()


async def connected(process: EngineProcess) -> EngineClient:
    client = EngineClient(process.address, process.secret)
    await client.connect(60)
    return client


def request(client: EngineClient, max_tokens: int) -> Generate:
    return Generate(client.new_id(), "run", [1, 2, 3], SamplingParams(max_tokens, temperature=0))


async def ids(client: EngineClient, max_tokens: int) -> list[int]:
    answers = [a async for a in client.generate(request(client, max_tokens))]
    assert isinstance(answers[-1], Finished)
    return [i for a in answers if isinstance(a, Tokens) for i in a.ids]


def test_a_process_serves_front_ends_survives_a_kill_and_drains(process: EngineProcess) -> None:
    async def run() -> None:
        client, other = await connected(process), await connected(process)
        details = await client.details(client.find(None))
        assert (details.block_size, details.dtype) == (256, "fp32")
        said = await asyncio.gather(ids(client, 20), ids(other, 20))
        assert len(said[0]) == 20
        assert said[0] == said[1]

        killed = client.generate(request(client, 250))
        await anext(killed)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineError) as raised:
            [a async for a in killed]
        assert raised.value.kind == "unavailable"
        await client.connect(60)
        assert await ids(client, 20) == said[0]
        assert process.restarts == 1

        async with aclosing(client.generate(request(client, 200))) as draining:
            await anext(draining)
            process.drain()
            answers = [a async for a in draining]
        assert isinstance(answers[-1], Finished)
        await client.close()
        await other.close()

    asyncio.run(run())
    assert process.stop() == 0


def test_a_front_end_without_the_secret_hears_nothing(process: EngineProcess) -> None:
    async def run() -> None:
        await (await connected(process)).close()
        stranger = EngineClient(process.address, "guess")
        with pytest.raises(EngineError, match="no engine answers"):
            await stranger.connect(1)
        await stranger.close()

    asyncio.run(run())


def test_the_watcher_outlives_a_look_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks: Iterator[OSError | bool] = iter([OSError("injected"), True])

    def rescan() -> bool:
        if isinstance(look := next(looks, False), OSError):
            raise look
        return look

    async def run() -> None:
        server = Server(Settings(str(tmp_path), watch_s=0.001), f"unix:{tmp_path}/e", "")
        monkeypatch.setattr(server.engine.registry, "rescan", rescan)
        changed = asyncio.Event()
        monkeypatch.setattr(server.engine, "post", lambda work: changed.set())
        watching = asyncio.create_task(server._watch())
        await asyncio.wait_for(changed.wait(), 10)
        watching.cancel()

    asyncio.run(run())
    assert "injected" in caplog.text
