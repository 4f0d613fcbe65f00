"""What is answered before the application hears of it."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serving.api import middleware
from serving.api.connection import MAX_HEAD_BYTES, Connection
from serving.api.settings import ApiSettings
from tests import front_end
from tests.fake_engine import FakeEngine
from tests.front_end import eventually, fixed_reply, generated, serve

BODY = b'{"prompt": "x", "max_tokens": 900}'
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: https://a.example\r\n"
    b"Content-Type: application/json\r\n"
)
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("x" * 900), delay_s=0.01)


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    """A server with room for one request and half a second's patience."""
    origins = ("https://a.example",)
    with serve(engine, ApiSettings(max_open=1, body_s=0.5, cors_origins=origins)) as address:
        yield address


def connect(url: str) -> socket.socket:
    return socket.create_connection((httpx.URL(url).host, httpx.URL(url).port or 0), timeout=10)


def read(connection: socket.socket) -> bytes:
    """Return what comes until the server closes the connection."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def read_one(connection: socket.socket) -> bytes:
    """Return one answer with a body, which may come in parts."""
    answer = b""
    while not answer.partition(b"\r\n\r\n")[2]:
        answer += connection.recv(65536)
    return answer


def refusal_of(answer: bytes) -> tuple[int, dict[str, str], str]:
    """Return status, headers and code of one answer with an error object."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(body) == int(headers["content-length"])
    assert headers["x-request-id"]
    return int(status.split()[1]), headers, error["code"]


@pytest.fixture
def full(url: str, engine: FakeEngine) -> Iterator[str]:
    """The server while it is full."""
    with connect(url) as first:
        first.sendall(REQUEST)
        assert eventually(lambda: generated(engine))
        yield url


def test_a_request_to_a_full_server_is_refused_for_pages_too(full: str) -> None:
    with connect(full) as second:
        second.sendall(REQUEST)
        status, headers, code = refusal_of(read_one(second))
    assert (status, code) == (503, "overloaded")
    assert headers["retry-after"] == "1"
    assert headers["access-control-allow-origin"] == "https://a.example"


def test_a_refused_request_is_read_to_its_end(full: str) -> None:
    with connect(full) as second:
        second.sendall(REQUEST[:-5])
        second.settimeout(0.1)
        with pytest.raises(TimeoutError):
            second.recv(1)
        second.settimeout(10)
        second.sendall(REQUEST[-5:])
        assert refusal_of(read_one(second))[0] == 503


def test_a_refusal_is_not_delayed_where_too_many_are_read(
    full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "MAX_REFUSALS", 0)
    with connect(full) as second:
        second.sendall(REQUEST[:-5])
        assert refusal_of(read_one(second))[0] == 503


def test_a_connection_outlives_a_refusal(full: str, engine: FakeEngine) -> None:
    with httpx.Client(base_url=full) as client:
        assert client.post("/v1/completions", json={}).status_code == 503
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json={}).status_code == 503
    assert len(generated(engine)) == 1


def test_a_client_that_expects_100_continue_is_refused_at_once(full: str) -> None:
    with connect(full) as second:
        second.sendall(HEAD + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n")
        assert refusal_of(read(second))[0] == 503


def test_refusals_are_counted_and_logged_once(full: str, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        httpx.post(f"{full}/v1/completions", json={})
    text = httpx.get(f"{full}/metrics").text
    assert 'method="POST",path="refused",status="503"' in text
    assert eventually(lambda: any("refused 3 requests" in r.message for r in caplog.records))


def test_what_is_no_http_is_refused(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(b"hello\r\n\r\n")
        assert read(connection).startswith(b"HTTP/1.1 400 ")


def test_a_head_without_end_is_refused(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX: " + b"a" * MAX_HEAD_BYTES)
        answer = read_one(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b"The headers are larger than 65,536 bytes.")


def test_a_head_without_end_during_an_answer_ends_the_connection(
    url: str, engine: FakeEngine
) -> None:
    with connect(url) as connection:
        connection.sendall(REQUEST)
        assert eventually(lambda: generated(engine))
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            connection.sendall((b"X: " + b"a" * 2**13 + b"\r\n") * 2**10)


def test_the_body_of_a_wrong_method_is_no_head(url: str) -> None:
    with connect(url) as connection:
        n_bytes = 2 * MAX_HEAD_BYTES
        head = b"PUT /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        connection.sendall(head % n_bytes)
        assert refusal_of(read_one(connection))[0] == 405
        connection.sendall(b"a" * n_bytes)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in read_one(connection)


@pytest.mark.parametrize("part", [b"", b"GET /health HT", REQUEST[:-1]])
def test_a_client_that_sends_nothing_more_is_not_waited_for(url: str, part: bytes) -> None:
    with connect(url) as connection:
        connection.sendall(part)
        assert b" 200 " not in read(connection)


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> list[Connection]:
    """The connections that the server has ended."""
    ended: list[Connection] = []

    class Watched(Connection):
        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            ended.append(self)

    monkeypatch.setattr(front_end, "Connection", Watched)
    return ended


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_client_that_does_not_read_is_cut_off(
    tmp_path: Path, lost: list[Connection], caplog: pytest.LogCaptureFixture, stream: str
) -> None:
    """Its answer is more than the system holds for it."""
    engine = FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("x" * 900), step=50)
    body = b'{"messages": [{"role": "user", "content": "x"}], "logprobs": true, "top_logprobs": 20'
    body += b', "n": 8, "max_tokens": 900, "stream": %b}' % stream.encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: stuck\r\n"
    head += b"Content-Type: application/json\r\n"
    with serve(engine, ApiSettings(write_s=0.2)) as url, connect(url) as stuck:
        stuck.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert eventually(lambda: lost, 30)
    (record,) = [r for r in caplog.records if "it is cut off" in r.message]
    assert record.__dict__["fields"] == {"request_id": "stuck"}
