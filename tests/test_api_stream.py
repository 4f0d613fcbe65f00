"""The frames of a stream, as strict as the strictest client reads them."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nanogpt.tokenizer import byte_tokenizer
from serving.api.generation import Choice
from serving.api.settings import ApiSettings
from serving.engine.messages import Cancel, Generate, SamplingParams, Tokens
from tests.fake_engine import FakeEngine
from tests.front_end import eventually, fixed_reply, generated, hang_up, serve

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
USAGE = {"stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that answers with the prompt's own last bytes, those after '='."""

    def after_equals(request: Any) -> list[int]:
        ids = request.prompt_ids
        return ids[ids.index(ord("=")) + 1 :] if ord("=") in ids else list("Grüße".encode())

    path = tmp_path_factory.mktemp("engine") / "e"
    with serve(FakeEngine(f"unix:{path}", reply=after_equals)) as address:
        yield address


def events(text: str) -> list[dict[str, Any]]:
    """Parse a stream that has nothing but data events, and [DONE] at the end."""
    *data, last, nothing = text.split("\n\n")
    assert (last, nothing) == ("data: [DONE]", "")
    assert all(line.startswith("data: {") and "\n" not in line for line in data)
    return [json.loads(line.removeprefix("data: ")) for line in data]


def test_the_frames_of_a_chat_are_role_text_reason_usage_and_done(url: str) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, **USAGE})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache, no-transform"
    assert answer.headers["x-accel-buffering"] == "no"
    first, *texts, reason, usage = events(answer.text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in texts)
    assert all(chunk["choices"][0]["delta"]["content"] for chunk in texts)
    assert [chunk["choices"][0]["finish_reason"] for chunk in (first, *texts)] == [None] * (
        1 + len(texts)
    )
    assert reason["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    ]
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert usage["usage"]["tokens_per_second"] > 0


def test_all_chunks_share_id_time_and_model(url: str) -> None:
    chunks = events(httpx.post(f"{url}/v1/chat/completions", json={**CHAT, **USAGE}).text)
    shared = ("id", "created", "model", "object", "system_fingerprint")
    assert len({tuple(chunk[key] for key in shared) for chunk in chunks}) == 1


def test_a_stream_has_no_usage_by_default(url: str) -> None:
    chunks = events(httpx.post(f"{url}/v1/chat/completions", json=CHAT).text)
    assert all(chunk["choices"] for chunk in chunks)


def test_chunks_are_the_client_s_own_type(url: str) -> None:
    body = {**CHAT, **USAGE, "logprobs": True, "top_logprobs": 1, "n": 2}
    for chunk in events(httpx.post(f"{url}/v1/chat/completions", json=body).text):
        openai.types.chat.ChatCompletionChunk.model_validate(chunk, strict=True)


def test_completion_chunks_are_the_client_s_own_type(url: str) -> None:
    body = {"prompt": "x=y", "stream": True, "logprobs": 2}
    for chunk in events(httpx.post(f"{url}/v1/completions", json=body).text):
        chunk["choices"][0]["finish_reason"] = chunk["choices"][0]["finish_reason"] or "stop"
        openai.types.Completion.model_validate(chunk, strict=True)


def test_streamed_and_whole_texts_are_equal_for_random_bytes(url: str) -> None:
    chance = random.Random(5)
    for _ in range(20):
        prompt = [ord("="), *chance.choices([*range(60, 256)], k=40)]
        body = {"prompt": prompt, "max_tokens": 40, "stop": ["ab", "é"], "logprobs": 0}
        whole = httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]
        chunks = events(httpx.post(f"{url}/v1/completions", json={**body, "stream": True}).text)
        choices = [chunk["choices"][0] for chunk in chunks]
        assert "".join(choice["text"] for choice in choices) == whole["text"]
        found = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        for key in ("tokens", "token_logprobs", "text_offset"):
            assert [x for part in found for x in part[key]] == whole["logprobs"][key]


def test_a_text_with_line_ends_and_quotes_is_one_line_of_json(tmp_path: Path) -> None:
    text = 'a\n\n\r"\\\u2028</script>\x00b'
    with serve(FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply(text))) as url:
        chunks = events(
            httpx.post(f"{url}/v1/completions", json={"stream": True, "max_tokens": 99}).text
        )
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


def test_an_error_before_the_first_token_is_an_error_status(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", failure=("overloaded", "The queue is full."))
    with serve(engine) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "overloaded"


def test_an_error_on_the_way_is_an_event_that_clients_raise(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("x" * 1000), delay_s=0.01)
    with serve(engine) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="tiny", prompt="", max_tokens=900, stream=True)
        assert next(stream).choices[0].text
        hang_up(engine)
        with pytest.raises(openai.APIError, match="engine stopped"):
            list(stream)


def test_a_client_that_leaves_a_stream_cancels_it(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("x" * 1000), delay_s=0.01)
    with serve(engine) as url:
        body = {**CHAT, "max_tokens": 900}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
        assert eventually(lambda: engine.cancelled)


def test_a_client_that_leaves_before_the_first_token_cancels_it(tmp_path: Path) -> None:
    half = FakeEngine(
        f"unix:{tmp_path}/e", reply=fixed_reply(b"\xc3" * 9), delay_s=0.2
    )  # of characters
    with serve(half) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=0.15)
        assert eventually(lambda: half.cancelled)


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_takes_too_long_is_ended(tmp_path: Path, stream: bool) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("x" * 1000), delay_s=0.01)
    with serve(engine, ApiSettings(request_s=0.3)) as url:
        body = {**CHAT, "max_tokens": 900, "stream": stream}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert eventually(lambda: engine.cancelled)
    assert answer.status_code == (200 if stream else 504)
    assert '"code":"timeout"' in answer.text.replace(": ", ":")


def test_a_client_that_leaves_a_whole_answer_cancels_it(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("x" * 1000), delay_s=0.01)
    with serve(engine) as url:
        body = {**CHAT, "max_tokens": 900, "stream": False, "n": 3}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.3)
        assert eventually(lambda: len(engine.cancelled) == 3)
    assert len(generated(engine)) == 3


def test_an_answer_that_a_stop_string_ends_is_not_left(tmp_path: Path) -> None:
    engine = FakeEngine(
        f"unix:{tmp_path}/e", reply=fixed_reply("one END" + "x" * 900), delay_s=0.01
    )
    with serve(engine) as url:
        body = {"prompt": "x", "max_tokens": 900, "stop": "END"}
        answer = httpx.post(f"{url}/v1/completions", json=body).json()
        assert eventually(lambda: engine.cancelled)
    assert answer["choices"][0]["text"] == "one "
    assert [m.reason for m in engine.requests if isinstance(m, Cancel)] == ["stop"]


def test_an_answer_that_a_stop_string_ends_knows_how_long_it_waited() -> None:
    request = Generate("a", "tiny", [1], SamplingParams(9))
    choice = Choice(0, request, byte_tokenizer().token_bytes(), ["b"])
    choice.take(Tokens("a", list(b"a"), cached_tokens=3, queue_s=1.5))
    choice.take(Tokens("a", list(b"b"), cached_tokens=3, queue_s=1.5))
    assert (choice.finish_reason, choice.cached_tokens, choice.wait_s) == ("stop", 3, 1.5)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\r"])
def test_every_line_reader_reads_a_stream(url: str, path: str, separator: str) -> None:
    text = f"a{separator}b"
    body: dict[str, Any] = {"stream": True, **USAGE}
    if path == "/v1/completions":
        body |= {"prompt": f"{separator}={text}", "echo": True}
        text = body["prompt"] + text
    else:
        body["messages"] = [{"role": "user", "content": f"={text}"}]
    with httpx.stream("POST", url + path, json=body) as answer:
        *lines, done = [line for line in answer.iter_lines() if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    texts = [c["text"] if "text" in c else c["delta"].get("content") for c in choices]
    assert "".join(filter(None, texts)).startswith(text)
    assert done == "data: [DONE]"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("logprobs", [None, True])
def test_the_chunks_before_the_usage_have_a_null_usage(
    url: str, path: str, logprobs: bool | None
) -> None:
    body = {**CHAT, "prompt": "x", "logprobs": logprobs and (1 if "chat" not in path else True)}
    *chunks, last = events(httpx.post(url + path, json={**body, **USAGE}).text)
    assert len(chunks) > 1
    assert all("usage" in chunk and chunk["usage"] is None for chunk in chunks)
    assert last["usage"]["total_tokens"] > 0
    assert all("usage" not in chunk for chunk in events(httpx.post(url + path, json=body).text))
