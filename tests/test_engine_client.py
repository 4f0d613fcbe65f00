"""The client of the engine, and the frames between them."""

import asyncio
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from serving.engine.client import EngineClient, EngineError
from serving.engine.messages import (
    Cancel,
    Generate,
    Histogram,
    Message,
    ModelInfo,
    Models,
    SamplingParams,
    Stats,
    Tokens,
    read_frame,
    to_frame,
)
from tests.fake_engine import FakeEngine, generate

LOAD: dict[str, Any] = {"slots": 4, "slots_used": 1, "queued": 0, "device": "cpu", "dtype": "fp32"}
MESSAGES: list[Message] = [
    Generate("a", "m", [1, 2], SamplingParams(5, seed=2**63, logit_bias={7: -1.5}, stop_ids=(3,))),
    Tokens("a", [4], [(-0.1, [4, 5], [-0.1, -2.0])]),
    Models([ModelInfo("m", ["n"], 3, "r", True, [None, "classify"])]),
    Stats(**LOAD, threads=2, steps=3, queue_s=Histogram([0.1, 1.0], [1, 2, 3], 2.5)),
]


def request(client: EngineClient, prompt: list[int], max_tokens: int = 4) -> Generate:
    return Generate(client.new_id(), "tiny", prompt, SamplingParams(max_tokens))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_survives_its_frame(message: Message) -> None:
    async def run() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(to_frame([message]))
        assert await read_frame(reader) == [message]

    asyncio.run(run())


def test_an_answer_comes_as_tokens_up_to_its_end(tmp_path: Path) -> None:
    async def run() -> None:
        address = f"unix:{tmp_path}/e"
        async with FakeEngine(address):
            client = EngineClient(address)
            await client.connect(5)
            answers = [a async for a in generate(client, request(client, [7, 8]))]
            assert [i for a in answers for i in a.ids] == [7, 8, 7, 8]
            assert [a.finish_reason for a in answers] == [None] * 4 + ["length"]
            await client.close()

    asyncio.run(run())


def test_closing_an_answer_cancels_it(tmp_path: Path) -> None:
    async def run() -> None:
        address = f"unix:{tmp_path}/e"
        async with FakeEngine(address, delay_s=0.01) as engine:
            client = EngineClient(address)
            await client.connect(5)
            generation = request(client, [7], max_tokens=1000)
            async with aclosing(generate(client, generation)) as answers:
                async for _ in answers:
                    break
            while not engine.cancelled:
                await asyncio.sleep(0.01)
            assert engine.cancelled == [generation.request_id]
            await client.close()

    asyncio.run(run())


def test_an_answer_that_is_complete_is_not_left(tmp_path: Path) -> None:
    async def run() -> None:
        address = f"unix:{tmp_path}/e"
        async with FakeEngine(address, delay_s=0.01) as engine:
            client = EngineClient(address)
            await client.connect(5)
            generation = request(client, [7], max_tokens=1000)
            async with aclosing(generate(client, generation)) as answers:
                async for _ in answers:
                    client.cancel(generation.request_id, "stop")
                    break
            ended = [a async for a in generate(client, request(client, [7]))][-1]
            assert ended.finish_reason
            client.cancel(ended.request_id, "stop")
            await client.details(client.models()[0])  # all that was sent before has come
            cancels = [message for message in engine.requests if isinstance(message, Cancel)]
            assert cancels == [Cancel(generation.request_id, "stop")]
            await client.close()

    asyncio.run(run())


def test_a_refused_request_raises_its_kind(tmp_path: Path) -> None:
    async def run() -> None:
        address = f"unix:{tmp_path}/e"
        async with FakeEngine(address, failure=("overloaded", "full")):
            client = EngineClient(address)
            await client.connect(5)
            with pytest.raises(EngineError, match="full") as raised:
                [a async for a in generate(client, request(client, [7]))]
            assert raised.value.kind == "overloaded"
            await client.close()

    asyncio.run(run())


def test_a_lost_engine_fails_open_requests_and_is_found_again(tmp_path: Path) -> None:
    async def run() -> None:
        address = f"unix:{tmp_path}/e"
        client = EngineClient(address)
        async with FakeEngine(address, delay_s=0.01) as engine:
            await client.connect(5)
            answers = generate(client, request(client, [7], 1000))
            await anext(answers)
            engine.hang_up()
            with pytest.raises(EngineError) as raised:
                [a async for a in answers]
            assert raised.value.kind == "unavailable"
        async with FakeEngine(address):
            await client.connect(5)
            assert (await client.details(client.models()[0])).block_size == 1024
        await client.close()

    asyncio.run(run())


def test_without_a_list_of_models_the_engine_is_unavailable() -> None:
    client = EngineClient("unix:/nowhere")
    with pytest.raises(EngineError) as raised:
        client.models()
    assert raised.value.kind == "unavailable"


def test_a_front_end_that_was_suspended_does_not_take_the_engine_for_stalled() -> None:
    async def run() -> None:
        client = EngineClient("unix:nowhere", stall_s=0.3)
        client._beat()
        time.sleep(1.2)  # the event loop does not run
        for _ in range(3):
            await asyncio.sleep(0)
        assert not client.stalled
        while not client.stalled:
            await asyncio.sleep(0.05)
        client._calm()

    asyncio.run(asyncio.wait_for(run(), 30))
