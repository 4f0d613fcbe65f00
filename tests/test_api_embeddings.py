"""POST /v1/embeddings, with the client of the OpenAI API and without."""

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serving.api.settings import ApiSettings
from serving.engine.messages import Embed
from tests.fake_engine import FakeEngine
from tests.front_end import serve


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(f"unix:{tmp_path}/e", block_size=8)


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with serve(engine, ApiSettings(max_prompts=2)) as address:
        yield address


def embed(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/embeddings", json=body)


def prompts(engine: FakeEngine) -> list[list[int]]:
    return [message.prompt_ids for message in engine.requests if isinstance(message, Embed)]


def test_the_openai_client_decodes_the_vectors_and_the_usage(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="tiny", input=["one", "two!"])
        floats = client.embeddings.create(model="tiny", input="one", encoding_format="float")
    assert [item.index for item in answer.data] == [0, 1]
    assert answer.data[1].embedding == pytest.approx([0.6, 0.8])
    assert answer.data[0].embedding == floats.data[0].embedding
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (7, 7)


def test_base64_is_little_endian_float32(url: str) -> None:
    found = embed(url, input="one", encoding_format="base64").json()["data"][0]["embedding"]
    assert base64.b64decode(found) == struct.pack("<2f", 0.6, 0.8)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97, 98], [99]], [[97, 98], [99]]),
        (["a", "b", "c", "d", "e"], [[97], [98], [99], [100], [101]]),  # more than max_prompts
    ],
)
def test_texts_and_token_ids_are_embedded_in_order(
    url: str, engine: FakeEngine, given: Any, expected: list[list[int]]
) -> None:
    answer = embed(url, input=given).json()
    assert prompts(engine) == expected
    assert len(answer["data"]) == len(expected)


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"input": [1] * 9}, "input", "9 tokens"),
        ({"input": "x" * 20_000}, "input", "more than 8 tokens"),
        ({"input": [1000]}, "input", "Token id 1000"),
        ({"input": ""}, "input", "empty"),
        ({"input": ["one", ""]}, "input", "empty"),
        ({"input": []}, "input", "no text"),
        ({}, "input", "required"),
        ({"input": "x", "dimensions": 3}, "dimensions", "2 dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format", "base64"),
    ],
)
def test_what_cannot_be_embedded_is_refused(
    url: str, engine: FakeEngine, body: Any, param: str, reason: str
) -> None:
    answer = embed(url, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert reason in answer.json()["error"]["message"]
    assert prompts(engine) == []


def test_a_text_may_fill_the_context_and_name_its_width(url: str, engine: FakeEngine) -> None:
    assert embed(url, input="x" * 8, dimensions=2).status_code == 200
    assert prompts(engine) == [list(b"x" * 8)]
