"""Who is answered, and who is not."""

from collections.abc import Iterator

import httpx
import pytest

from serving.api.auth import is_loopback, key_name
from serving.api.settings import ApiSettings
from tests.fake_engine import FakeEngine
from tests.front_end import generated, serve

KEY = "sk-a-key"
WITHOUT_KEY = {"/", "/runs", "/health", "/ready"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> FakeEngine:
    return FakeEngine(f"unix:{tmp_path_factory.mktemp('engine')}/e")


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with serve(engine, ApiSettings(api_keys=(KEY, "sk-schlüssel"))) as address:
        yield address


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer {KEY}"},
        {"X-API-Key": KEY},
    ],
)
def test_a_key_opens_the_api(url: str, headers: dict[str, str]) -> None:
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer {KEY.upper()}"},
        {"X-API-Key": KEY + "x"},
    ],
)
def test_a_missing_or_wrong_key_is_unauthorized(url: str, headers: dict[str, str]) -> None:
    answer = httpx.get(f"{url}/v1/models", headers={**headers, "Origin": "https://a.example"})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["access-control-allow-origin"] == "*"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert KEY not in answer.text


def test_the_routes_without_a_key_are_these_and_no_others(url: str) -> None:
    schema = httpx.get(f"{url}/openapi.json", headers={"X-API-Key": KEY}).json()
    paths = set(schema["paths"]) | {"/", "/openapi.json", "/nothing"}
    bare = {path.removeprefix("/v1") or "/" for path in paths}
    answered = set()
    for path in paths | bare:
        there = path.replace("{model_id}", "tiny")
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"):
            if httpx.request(method, url + there).status_code != 401:
                answered.add(path)
    assert answered == WITHOUT_KEY


def test_a_preflight_needs_no_key(url: str) -> None:
    assert httpx.options(f"{url}/v1/chat/completions").status_code == 204


def test_prefixes_are_reused_for_one_key_only(url: str, engine: FakeEngine) -> None:
    for key in (KEY, "sk-schlüssel"):
        headers = [(b"X-API-Key", key.encode())]
        httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, headers=headers)
    first, second = (request.key for request in generated(engine)[-2:])
    assert first
    assert second
    assert first != second
    assert KEY not in first


def test_the_name_of_a_key_does_not_reveal_it() -> None:
    one = ApiSettings(api_keys=("one",))
    assert key_name(b"one", one) not in (None, "one")
    assert key_name(b"two", one) is None


@pytest.mark.parametrize(
    "path", ["/static/../v1/models", "/health/../v1/models", "//health", "/health/"]
)
def test_a_path_that_only_looks_public_needs_a_key(url: str, path: str) -> None:
    raw = httpx.Request("GET", url)
    raw.url = httpx.URL(url).copy_with(raw_path=path.encode())
    with httpx.Client() as client:
        answer = client.send(raw)
    assert answer.status_code in (401, 404)
    assert "tiny" not in answer.text


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_loopback_is_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_the_page_s_files_are_public(url: str) -> None:
    assert httpx.get(f"{url}/static/page.js").status_code != 401
    assert httpx.head(f"{url}/static/page.js").status_code != 401
    assert httpx.get(f"{url}/staticfiles").status_code == 401
