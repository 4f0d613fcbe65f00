"""Addresses as clients write them."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serving.api.errors import normalized
from serving.api.settings import ApiSettings
from tests.fake_engine import FakeEngine
from tests.front_end import fixed_reply, serve


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(
        FakeEngine(f"unix:{tmp_path_factory.mktemp('engine')}/e", reply=fixed_reply("a"))
    ) as at:
        yield at


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/runs",
        "/health",
        "/ready",
        "/metrics",
        "/openapi.json",
        "/static/index.html",
        "/v1",
        "/v1/models",
        "/models",
        "/v1/models/tiny",
        "/v1/runs",
        "/v1/system_info",
    ],
)
def test_head_answers_as_get_does_without_a_body(url: str, path: str) -> None:
    got, head = httpx.get(url + path), httpx.head(url + path)
    assert head.status_code == got.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]


def test_head_of_what_is_posted_is_not_allowed(url: str) -> None:
    assert httpx.head(f"{url}/v1/chat/completions").status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "/v1//completions",
        "//v1/completions",
        "/v1/completions/",
        "/v1/v1/completions",
        "/completions/",
        "//completions",
        "/v1///v1//completions//",
    ],
)
def test_superfluous_slashes_and_a_doubled_v1_are_passed_over(url: str, path: str) -> None:
    answer = httpx.post(url + path, json={"prompt": "x"})
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"] == "a"


@pytest.mark.parametrize("path", ["/v1//models", "//v1/models/", "/v1/v1/models", "/v1/models//"])
def test_models_are_listed_at_such_addresses(url: str, path: str) -> None:
    assert httpx.get(url + path).json() == httpx.get(f"{url}/v1/models").json()


@pytest.mark.parametrize("path", ["/metrics/", "//health", "/runs//"])
def test_a_slash_too_many_is_named_elsewhere(url: str, path: str) -> None:
    answer = httpx.get(url + path)
    assert answer.status_code == 404
    assert f"use {normalized(path)}," in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/api/chat", "/v1/edits"])
def test_an_unknown_route_names_the_list_of_routes(url: str, path: str) -> None:
    answer = httpx.post(url + path, json={})
    assert answer.status_code == 404
    assert "the API is under /v1, and GET /v1 lists the routes" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["X-API-Key", "api-key"])
def test_a_key_is_read_from_its_header_and_trimmed(tmp_path: Path, name: str) -> None:
    def status(url: str, key: str) -> int:
        request = urllib.request.Request(f"{url}/v1/models", headers={name: key})
        try:
            with urllib.request.urlopen(request) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    with serve(FakeEngine(f"unix:{tmp_path}/e"), ApiSettings(api_keys=("a",))) as url:
        assert [status(url, key) for key in ("a", " a \t", "b", " ")] == [200, 200, 401, 401]
