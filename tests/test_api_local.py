"""A server without API keys answers programs and pages of its own machine, and no others."""

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from serving.api.middleware import Admission
from serving.api.settings import ApiSettings
from tests.fake_engine import FakeEngine
from tests.front_end import generated, serve

ROUTES = [
    *(("GET", path) for path in ("/", "/health", "/ready", "/metrics", "/runs", "/v1/runs")),
    *(("GET", path) for path in ("/v1", "/v1/models", "/v1/system_info", "/static/app.js")),
    *(("GET", path) for path in ("/openapi.json", "/nothing")),
    *(("POST", path) for path in ("/v1/completions", "/predict", "/tokenize", "/nothing")),
    ("OPTIONS", "/v1/completions"),
    ("HEAD", "/health"),
]
FOREIGN = "https://evil.example"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> FakeEngine:
    return FakeEngine(f"unix:{tmp_path_factory.mktemp('engine')}/e")


@pytest.fixture(scope="module")
def url(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(engine, ApiSettings(runs_dir=str(tmp_path_factory.mktemp("runs")))) as address:
        yield address


def code(answer: httpx.Response) -> Any:
    assert answer.status_code == 403
    return answer.json()["error"]["code"] if answer.content else "head"


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_host_name_that_is_not_loopback_is_refused_on_every_route(
    url: str, method: str, path: str
) -> None:
    answer = httpx.request(method, url + path, headers={"Host": "rebound.example:5001"})
    assert code(answer) in ("host_not_allowed", "head")
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_request_of_another_site_s_page_is_refused_on_every_route(
    url: str, method: str, path: str
) -> None:
    headers = {"Origin": FOREIGN, "Sec-Fetch-Site": "cross-site"}
    assert code(httpx.request(method, url + path, headers=headers)) in (
        "origin_not_allowed",
        "head",
    )


@pytest.mark.parametrize(
    ("headers", "refused_as"),
    [
        ({"Host": "127.0.0.1.evil.example"}, "host_not_allowed"),
        ({"Host": "localhost.evil.example"}, "host_not_allowed"),
        ({"Host": "127.0.0.1@evil.example"}, "host_not_allowed"),
        ({"Host": "192.168.1.5:5001"}, "host_not_allowed"),
        ({"Host": ""}, "host_not_allowed"),
        ({"Host": "["}, "host_not_allowed"),
        ({"Origin": FOREIGN}, "origin_not_allowed"),
        ({"Origin": "null"}, "origin_not_allowed"),
        ({"Origin": "http://127.0.0.1.evil.example"}, "origin_not_allowed"),
        ({"Origin": "chrome-extension://localhost"}, "origin_not_allowed"),
        ({"Sec-Fetch-Site": "cross-site"}, "origin_not_allowed"),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "iframe"}, "origin_not_allowed"),
        ({"X-Forwarded-For": "192.0.2.1"}, "proxy_not_allowed"),
        ({"X-Forwarded-Proto": "https"}, "proxy_not_allowed"),
        ({"Forwarded": "for=192.0.2.1"}, "proxy_not_allowed"),
        ({"Via": "1.1 proxy"}, "proxy_not_allowed"),
        ({"CF-Connecting-IP": "192.0.2.1"}, "proxy_not_allowed"),
    ],
)
def test_what_another_machine_or_site_may_have_sent_is_refused(
    url: str, headers: dict[str, str], refused_as: str
) -> None:
    assert code(httpx.get(f"{url}/v1/models", headers=headers)) == refused_as


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "localhost:5001"},
        {"Host": "LOCALHOST"},
        {"Host": "[::1]:5001"},
        {"Host": "127.8.9.1"},
        {"Origin": "http://localhost:3210", "Sec-Fetch-Site": "same-site"},
        {"Origin": "http://127.0.0.1:3000", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://[::1]:3000"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {
            "Sec-Fetch-Site": "cross-site",
            "Sec-Fetch-Mode": "navigate",
            "Sec-Fetch-Dest": "document",
        },
    ],
)
def test_programs_and_pages_of_this_machine_are_answered(url: str, headers: dict[str, str]) -> None:
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "hosts", [("localhost", "evil.example"), ("evil.example", "localhost"), ()]
)
def test_two_host_headers_or_none_are_refused(url: str, hosts: tuple[str, ...]) -> None:
    lines = "".join(f"Host: {host}\r\n" for host in hosts)
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 0), timeout=10) as connection:
        connection.sendall(f"GET /v1/models HTTP/1.0\r\n{lines}\r\n".encode())
        assert connection.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.1 403")


def test_a_link_from_another_site_opens_pages_and_computes_nothing(
    url: str, engine: FakeEngine
) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}
    assert httpx.get(url, headers=headers).status_code == 200
    posted = httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, headers=headers)
    assert code(posted) == "origin_not_allowed"
    assert generated(engine) == []


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_of_a_type_that_needs_no_preflight_is_refused(
    url: str, engine: FakeEngine, kind: str | None
) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    answer = httpx.post(f"{url}/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert answer.status_code == 415
    assert generated(engine) == []


def test_listed_hosts_and_origins_are_answered_through_a_proxy_too(tmp_path: Any) -> None:
    settings = ApiSettings(allowed_hosts=("LLM.example",), cors_origins=("https://chat.example",))
    proxied = {"Host": "llm.example", "X-Forwarded-For": "192.0.2.1"}
    with serve(FakeEngine(f"unix:{tmp_path}/e"), settings) as url:

        def status(headers: dict[str, str]) -> int:
            return httpx.get(f"{url}/v1/models", headers=headers).status_code

        assert status(proxied) == 200
        assert status({**proxied, "Origin": "https://chat.example"}) == 200
        assert status({**proxied, "Origin": "https://llm.example"}) == 200
        assert status({**proxied, "Origin": FOREIGN}) == 403
        assert status({"X-Forwarded-For": "192.0.2.1"}) == 403
        assert status({"Origin": "http://localhost:3000"}) == 403


def test_with_a_key_hosts_origins_and_proxies_are_not_looked_at(tmp_path: Any) -> None:
    headers = {"Host": "llm.example", "Origin": FOREIGN, "X-Forwarded-For": "192.0.2.1"}
    with serve(FakeEngine(f"unix:{tmp_path}/e"), ApiSettings(api_keys=("k",))) as url:
        answer = httpx.get(f"{url}/v1/models", headers={**headers, "X-API-Key": "k"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "*"
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401


def test_answers_are_not_cached_and_vary_by_origin(url: str) -> None:
    answer = httpx.get(f"{url}/v1/models", headers={"Origin": "http://localhost:3000"})
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert answer.headers["cache-control"] == "no-store"
    assert "Origin" in answer.headers["vary"]
    files = httpx.get(f"{url}/static/app.js")
    assert "Origin" in files.headers["vary"]
    assert files.headers["cache-control"] == "no-cache"


async def _status(settings: ApiSettings, server: tuple[str, int | None]) -> int:
    scope: Scope = {
        "type": "http",
        "method": "GET",
        "path": "/v1/models",
        "headers": [(b"host", b"localhost")],
        "server": server,
        "state": {"request_id": "test", "status": 0},
    }
    statuses: list[int] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        statuses.append(message.get("status", 0))

    await Admission(_ok, settings)(scope, receive, send)
    return statuses[0]


async def _ok(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("server", "insecure", "status"),
    [
        (("127.0.0.1", 5001), False, 200),
        (("192.168.1.5", 5001), False, 403),
        (("192.168.1.5", 5001), True, 200),
        (("/run/x.sock", None), False, 200),
    ],
)
async def test_without_keys_only_this_machine_is_answered(
    server: tuple[str, int | None], insecure: bool, status: int
) -> None:
    assert await _status(ApiSettings(insecure=insecure), server) == status


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
