"""Every answer that is not 2xx is an OpenAI error object, and pages of any origin may read it."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from nanogpt.detokenizer import Detokenizer
from nanogpt.tokenizer import Tokenizer
from serving.api.settings import ApiSettings
from serving.engine.client import EngineClient
from tests.fake_engine import FakeEngine
from tests.front_end import fixed_reply, serve

ORIGIN = {"Origin": "https://chat.example"}
JSON = {"Content-Type": "application/json", **ORIGIN}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("engine") / "e"
    settings = ApiSettings(max_body_bytes=1000, cors_origins=("*",))
    with serve(FakeEngine(f"unix:{path}", reply=fixed_reply("a")), settings) as at:
        yield at


def error_of(answer: httpx.Response) -> Any:
    """Return the error object, having checked what every error has."""
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"text"', b"5", b"\xff", b"[" * 900])
def test_a_body_that_is_no_object_is_refused(url: str, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/predict", "/classify", "/tokenize"):
        answer = httpx.post(url + path, content=body, headers=JSON)
        assert answer.status_code == 400
        error_of(answer)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_what_is_no_finite_number_is_refused(url: str, number: str) -> None:
    for name in ("temperature", "top_p", "seed", "n", "max_tokens", "presence_penalty"):
        body = f'{{"prompt": "x", "{name}": {number}}}'.encode()
        answer = httpx.post(f"{url}/v1/completions", content=body, headers=JSON)
        assert answer.status_code == 400, name
        error_of(answer)


def test_a_number_of_hundreds_of_digits_is_only_a_number(url: str) -> None:
    for name, status in (("temperature", 400), ("n", 400), ("seed", 400), ("max_tokens", 200)):
        body = f'{{"prompt": "x", "{name}": {"9" * 800}}}'.encode()
        answer = httpx.post(f"{url}/v1/completions", content=body, headers=JSON)
        assert answer.status_code == status, name


def test_an_unknown_route_names_the_api(url: str) -> None:
    answer = httpx.post(f"{url}/v1/threads", json={}, headers=ORIGIN)
    assert answer.status_code == 404
    assert "/v1" in error_of(answer)["message"]


def test_a_wrong_method_is_answered_with_the_allowed_ones(url: str) -> None:
    answer = httpx.get(f"{url}/v1/chat/completions", headers=ORIGIN)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    error_of(answer)


def test_the_error_for_a_body_that_is_not_json_names_what_to_send(url: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", data={"prompt": "x"}, headers=ORIGIN)
    assert answer.status_code == 415
    assert "application/json" in error_of(answer)["message"]


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_that_is_too_large_is_refused(url: str, chunked: bool) -> None:
    body = b'{"prompt": "' + b"x" * 2000 + b'"}'
    content = iter([body[:500], body[500:]]) if chunked else body
    answer = httpx.post(f"{url}/v1/completions", content=content, headers=JSON)
    assert answer.status_code == 413
    error_of(answer)


def test_missing_messages_are_named(url: str) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny"}, headers=ORIGIN)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "messages"


def test_a_message_of_an_unknown_role_is_refused(url: str) -> None:
    body = {"messages": [{"role": "root", "content": "x"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=ORIGIN)
    assert answer.status_code == 400
    error_of(answer)


def test_an_unforeseen_exception_is_an_error_object_without_its_text(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: EngineClient) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(EngineClient, "models", fail)
    answer = httpx.get(f"{url}/v1/models", headers=ORIGIN)
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    assert "secret" not in error_of(answer)["message"]
    assert reasons_logged(caplog, answer.headers["x-request-id"]) == ["secret"]


def reasons_logged(caplog: pytest.LogCaptureFixture, request_id: str) -> list[str]:
    """Return the exceptions that the log holds for a request."""
    records = [r for r in caplog.records if r.exc_info]
    assert all(r.__dict__["fields"]["request_id"].startswith(request_id) for r in records)
    return [str(r.exc_info[1]) for r in records if r.exc_info]


def test_what_fails_while_an_answer_grows_is_logged_with_its_request(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Detokenizer, ids: list[int]) -> str:
        raise RuntimeError("secret")

    monkeypatch.setattr(Detokenizer, "feed", fail)
    answer = httpx.post(f"{url}/v1/completions", json={}, headers={"X-Request-ID": "mine"})
    assert answer.status_code == 500
    assert reasons_logged(caplog, "mine") == ["secret"]


def test_a_text_that_breaks_the_tokenizer_fails_alone(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer.encode

    def broken(self: Tokenizer, text: str) -> list[int]:
        if "poison" in text:
            raise RuntimeError("broken")
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", broken)
    poisoned, other = (
        httpx.post(f"{url}/v1/completions", json={"prompt": text}, headers=ORIGIN)
        for text in ("poison", "x")
    )
    assert poisoned.status_code == 500
    error_of(poisoned)
    assert other.status_code == 200


def test_a_preflight_allows_the_requested_headers(url: str) -> None:
    requested = "authorization, content-type, x-stainless-os, x-anything"
    headers = {
        **ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": requested,
    }
    answer = httpx.options(f"{url}/v1/chat/completions", headers=headers)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-headers"] == requested
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in answer.headers


def test_the_request_id_can_be_read_by_a_page(url: str) -> None:
    answer = httpx.get(f"{url}/v1/models", headers=ORIGIN)
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert answer.headers["access-control-allow-origin"] == "*"


def test_only_listed_origins_are_allowed_where_they_are_listed(tmp_path: Any) -> None:
    settings = ApiSettings(cors_origins=("https://chat.example",), cors_private_network=True)
    with serve(FakeEngine(f"unix:{tmp_path}/e"), settings) as url:
        ours = httpx.get(f"{url}/v1/models", headers=ORIGIN)
        theirs = httpx.get(f"{url}/v1/models", headers={"Origin": "https://evil.example"})
        preflight = {"Access-Control-Request-Method": "GET"}
        preflight["Access-Control-Request-Private-Network"] = "true"
        private = httpx.options(f"{url}/v1/models", headers={**ORIGIN, **preflight})
    assert ours.headers["access-control-allow-origin"] == "https://chat.example"
    assert "access-control-allow-origin" not in theirs.headers
    assert private.headers["access-control-allow-private-network"] == "true"


def test_a_request_id_that_could_forge_a_log_line_is_replaced(url: str) -> None:
    answer = httpx.get(f"{url}/health", headers={"X-Request-ID": 'a" b'})
    assert answer.headers["x-request-id"].startswith("req-")
