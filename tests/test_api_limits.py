"""What is refused because there is too much of it, and what happens when the server ends."""

import asyncio
import concurrent.futures
import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from nanogpt.tokenizer import Tokenizer
from serving.api import schemas, stream
from serving.api.generation import Piece
from serving.api.settings import ApiSettings
from serving.engine.messages import Classify, Describe, Embed, Generate, Message, Score
from tests.fake_engine import FakeEngine
from tests.front_end import eventually, fixed_reply, generated, serve

DECISION = {
    "state": "x",
    "questions": {"q": {"type": "choice", "criteria": {"ham": None, "spam": None}}},
}
SLOW = {"prompt": "x", "max_tokens": 900}

JSON = "Content-Type: application/json\r\n"


class SilentEngine(FakeEngine):
    """One whose queue is long."""

    async def _generate(self, request: Generate, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    def _answer(self, message: Message) -> Message | None:
        return None if isinstance(message, Score | Classify | Embed) else super()._answer(message)


class LoadingEngine(FakeEngine):
    """One whose model is never loaded."""

    def _answer(self, message: Message) -> Message | None:
        return None if isinstance(message, Describe) else super()._answer(message)


class StallingEngine(FakeEngine):
    """One that classifies a single text, and then none."""

    def _answer(self, message: Message) -> Message | None:
        n = sum(isinstance(request, Classify) for request in self.requests)
        return None if n > 1 else super()._answer(message)


def slow_engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("x" * 900), delay_s=0.01)


def test_requests_over_the_limit_are_refused_with_retry_after(tmp_path: Path) -> None:
    engine = slow_engine(tmp_path)
    with serve(engine, ApiSettings(max_open=1)) as url:
        with httpx.stream("POST", f"{url}/v1/completions", json={**SLOW, "stream": True}) as first:
            lines = first.iter_lines()  # a reference: without it the stream is closed
            next(lines)
            second = httpx.post(f"{url}/v1/completions", json=SLOW)
            health = httpx.get(f"{url}/health")
        assert eventually(lambda: engine.cancelled)
        assert eventually(
            lambda: httpx.post(f"{url}/v1/completions", json={"max_tokens": 1}).status_code == 200
        )
    assert second.status_code == 503
    assert int(second.headers["retry-after"]) >= 1
    assert second.json()["error"]["code"] == "overloaded"
    assert health.status_code == 200


@pytest.mark.parametrize("limits", [{"max_open_per_key": 1}, {"max_open": 2}])
def test_one_key_cannot_take_all(tmp_path: Path, limits: dict[str, int]) -> None:
    settings = ApiSettings(api_keys=("a", "b"), **limits)  # type: ignore[arg-type]
    with serve(slow_engine(tmp_path), settings) as url:
        mine, other = {"X-API-Key": "a"}, {"X-API-Key": "b"}
        body = {**SLOW, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=mine) as first:
            lines = first.iter_lines()  # a reference: without it the stream is closed
            next(lines)
            second = httpx.post(f"{url}/v1/completions", json=SLOW, headers=mine)
            third = httpx.post(f"{url}/v1/completions", json={"max_tokens": 1}, headers=other)
    assert second.status_code == 429
    assert second.headers["retry-after"]
    assert second.json()["error"]["type"] == "rate_limit_error"
    assert third.status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_waits_too_long_for_a_token_is_refused_with_retry_after(
    tmp_path: Path, stream: bool
) -> None:
    engine = SilentEngine(f"unix:{tmp_path}/e")
    with serve(engine, ApiSettings(queue_s=0.2)) as url:
        answer = httpx.post(f"{url}/v1/completions", json={**SLOW, "stream": stream})
        assert eventually(lambda: engine.cancelled)
    assert answer.status_code == 503
    assert answer.headers["retry-after"]


@pytest.mark.parametrize(
    ("path", "body", "labels"),
    [
        ("/classify", {"input": ["one", "two"]}, ["ham", "spam"]),
        ("/v1/embeddings", {"input": ["one", "two"]}, None),
        ("/v1/systemone", DECISION, None),
        ("/v1/systemone", DECISION, ["ham", "spam"]),
        ("/predict", {"input_data": "one"}, ["ham", "spam"]),
        ("/predict", {"input_data": "one"}, None),
        ("/v1/completions", {"prompt": "x", "echo": True}, None),
        ("/v1/completions", {"prompt": "x", "echo": True, "stream": True}, None),
        ("/v1/completions", {"prompt": "x", "echo": True, "logprobs": 1}, None),
    ],
)
def test_nothing_waits_longer_for_the_engine(
    tmp_path: Path, path: str, body: dict[str, object], labels: list[str] | None
) -> None:
    engine = SilentEngine(f"unix:{tmp_path}/e", labels=labels)
    with serve(engine, ApiSettings(queue_s=0.2)) as url:
        assert eventually(lambda: httpx.get(f"{url}/v1/models/tiny").status_code == 200)
        answer = httpx.post(url + path, json=body)
        kinds = Generate | Score | Classify | Embed
        requests = [m for m in engine.requests if isinstance(m, kinds)]
        assert requests
        assert eventually(lambda: len(engine.cancelled) == len(requests))
    assert answer.status_code == 503
    assert answer.headers["retry-after"]


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/v1/models/tiny"])
def test_a_model_that_takes_long_to_load_is_not_waited_for(tmp_path: Path, path: str) -> None:
    with serve(LoadingEngine(f"unix:{tmp_path}/e"), ApiSettings(queue_s=0.2)) as url:
        method = "GET" if "models" in path else "POST"
        answer = httpx.request(method, url + path, json={"prompt": "x"})
    assert answer.status_code == 503
    assert answer.headers["retry-after"]


@pytest.mark.parametrize("kind", [StallingEngine, SilentEngine, LoadingEngine])
def test_an_answer_that_is_never_complete_is_not_waited_for(
    tmp_path: Path, kind: type[FakeEngine]
) -> None:
    engine = kind(f"unix:{tmp_path}/e", labels=["ham", "spam"])
    with serve(engine, ApiSettings(request_s=0.3)) as url:
        answer = httpx.post(f"{url}/classify", json={"input": ["one", "two"]})
    assert answer.status_code == 504
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("prompts", "n", "status"), [(4, 2, 200), (5, 2, 400), (8, 1, 200), (9, 1, 400), (1, 9, 400)]
)
def test_a_request_with_more_answers_than_the_queue_holds_is_refused_for_good(
    tmp_path: Path, prompts: int, n: int, status: int
) -> None:
    settings = ApiSettings(max_queue=8, max_n=9)
    with serve(FakeEngine(f"unix:{tmp_path}/e"), settings) as url:
        body = {"prompt": ["x"] * prompts, "n": n, "max_tokens": 1}
        answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == status
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize("body", [{}, {"echo": True}, {"echo": True, "stream": True}])
def test_a_full_queue_is_an_error_before_a_stream_begins(
    tmp_path: Path, body: dict[str, object]
) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", failure=("overloaded", "The queue is full."))
    with serve(engine) as url:
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x", **body})
    assert answer.status_code == 503
    assert answer.headers["retry-after"]


def test_a_body_that_does_not_arrive_is_not_waited_for(tmp_path: Path) -> None:
    with serve(slow_engine(tmp_path), ApiSettings(body_s=0.2)) as url:
        host, port = httpx.URL(url).host, httpx.URL(url).port
        with socket.create_connection((host, port or 0), timeout=10) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n{JSON}"
            connection.sendall(f"{head}Content-Length: 10\r\n\r\n{{".encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_open_answers_finish_when_the_server_ends(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("x" * 50), delay_s=0.01)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with serve(engine) as url:
            answer = pool.submit(httpx.post, f"{url}/v1/completions", json={"max_tokens": 50})
            assert eventually(lambda: generated(engine))
        assert answer.result().json()["choices"][0]["text"] == "x" * 50


def test_a_client_that_does_not_read_is_dropped(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("x" * 900))
    body = b'{"max_tokens": 900, "n": 8, "stream": true, "logprobs": 20}'  # some 10 MB of frames
    with serve(engine, ApiSettings(write_s=0.3)) as url, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((httpx.URL(url).host, httpx.URL(url).port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{JSON}"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert eventually(lambda: generated(engine) and not engine._answering)
        assert eventually(lambda: requests_open(url) == 1)


def requests_open(url: str) -> int:
    """Return the number of open requests, that for the metrics included."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    (sample,) = [line for line in lines if line.startswith("nanogpt_http_requests_open{")]
    return int(float(sample.split()[-1]))


def test_two_hundred_clients_that_leave_leave_nothing_behind(tmp_path: Path) -> None:
    engine = slow_engine(tmp_path)
    with serve(engine) as url:
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            list(pool.map(lambda n: leave(url, n), range(200)))
        assert eventually(lambda: not engine._answering, 30)
        assert eventually(lambda: requests_open(url) == 1)


def leave(url: str, n: int) -> None:
    """Send a request, streamed or not, and close the connection after a moment."""
    host, port = httpx.URL(url).host, httpx.URL(url).port
    body = f'{{"prompt": "x", "max_tokens": 900, "stream": {"true" if n % 2 else "false"}}}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, port or 0)) as connection:
        connection.sendall((head + body).encode()[: 40 if n % 7 == 0 else None])
        time.sleep(n % 5 / 50)


# Values of one byte to a few: a body of 1 MB has room for hundreds of thousands of them.
ELEMENTS: list[Any] = [{}, [], 1, 1.5, "", None, True, [[[]]], {"role": "user"}, [1], ["a"]]


def list_fields() -> list[tuple[type[BaseModel], str]]:
    """Return every field of every request that takes a list or a mapping."""
    requests = [
        m
        for m in vars(schemas).values()
        if isinstance(m, type) and m.__module__ == schemas.__name__
    ]
    return [
        (model, name)
        for model in requests
        if issubclass(model, BaseModel)
        for name, field in model.model_fields.items()
        if "list[" in str(field.annotation) or "dict[" in str(field.annotation)
    ]


@pytest.mark.parametrize(("model", "name"), list_fields(), ids=str)
@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_a_long_list_is_not_validated_element_by_element(
    model: type[BaseModel], name: str, element: Any
) -> None:
    fields = {field: "x" for field, info in model.model_fields.items() if info.is_required()}
    longest = [element] * schemas.MAX_ITEMS
    for value in (longest, longest * 25, {str(i): element for i in range(len(longest) * 25)}):
        assert n_errors(model, {**fields, name: value}) < 5


def n_errors(model: type[BaseModel], fields: dict[str, Any]) -> int:
    try:
        model.model_validate(fields)
    except ValidationError as error:
        return error.error_count()
    return 0


def test_a_text_that_cannot_fit_the_context_is_not_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer,
        "encode",
        lambda self, text: encoded.append(len(text)) or encode(self, text),  # type: ignore[func-returns-value]
    )
    text = "x" * 100_000
    requests: dict[str, Any] = {
        "/v1/completions": {"prompt": ["x", text]},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
        "/predict": {"input_data": text},
    }
    with serve(FakeEngine(f"unix:{tmp_path}/e")) as url:
        for path, body in requests.items():
            error = httpx.post(url + path, json=body).json()["error"]
            assert error["code"] == "context_length_exceeded"
    assert max(encoded) < len(text)


def test_all_answers_to_many_prompts_have_the_bias_and_a_seed(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("a"))
    body = {"prompt": ["x"] * 16, "n": 8, "logit_bias": {"65": 1}, "seed": 1}
    with serve(engine) as url:
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
    requests = [request.params for request in generated(engine)]
    assert [params.logit_bias for params in requests] == [{65: 1.0}] * 128
    assert len({params.seed for params in requests}) == 8  # of each prompt's answers


def test_prompts_without_a_seed_have_different_ones(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("a"))
    with serve(engine) as url:
        httpx.post(f"{url}/v1/completions", json={"prompt": ["x"] * 16, "n": 8})
    assert len({request.params.seed for request in generated(engine)}) == 128


class Slowest(stream.CompletionFormat):
    """Count the turns of the event loop while answers are rendered."""

    def __init__(self) -> None:
        self.head = {"object": "text_completion"}
        self.rendered_at: list[int] = []
        self.turns = 0

    async def count(self) -> None:
        while True:
            self.turns += 1
            await asyncio.sleep(0)

    def choice(self, answer: Piece) -> dict[str, Any]:
        self.rendered_at.append(self.turns)
        return {"index": answer.index, "text": answer.text}


def test_the_event_loop_runs_between_the_choices_of_an_answer() -> None:
    async def render() -> tuple[Slowest, bytes]:
        form = Slowest()
        counting = asyncio.create_task(form.count())
        content = await stream.whole(form, [Piece(i, "é") for i in range(8)], {"n": 8})
        counting.cancel()
        return form, content

    form, content = asyncio.run(render())
    assert len(set(form.rendered_at)) == 8
    choices = [{"index": i, "text": "é"} for i in range(8)]
    assert json.loads(content) == {**form.head, "choices": choices, "usage": {"n": 8}}
