"""A hub that does not answer or refuses is one sentence, within seconds."""

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from nanogpt.hub import hub_errors

huggingface_hub = pytest.importorskip("huggingface_hub")


class Answering(BaseHTTPRequestHandler):
    """Answers every question with the server's `status`."""

    def do_HEAD(self) -> None:
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """A hub on this machine that answers with `server.status`, 200 at first."""
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        server.status = 200  # type: ignore[attr-defined]
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def access_hub() -> None:
    with hub_errors("the weights of gpt2", "copy them here"):
        pass


@pytest.mark.parametrize("status", [200, 302, 401, 404, 501])
def test_any_answer_of_the_hub_will_do(server: HTTPServer, status: int) -> None:
    server.status = status  # type: ignore[attr-defined]
    access_hub()


def test_a_gateway_without_a_way_to_the_hub_is_no_answer(server: HTTPServer) -> None:
    server.status = 503  # type: ignore[attr-defined]
    with pytest.raises(ConnectionError, match=r"^the weights of gpt2 .* answered 503; copy them"):
        access_hub()


def test_a_closed_port_is_an_error_of_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    with pytest.raises(ConnectionError, match=rf"fetched: {endpoint} cannot be reached \(Connect"):
        access_hub()


def test_silence_ends_with_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanogpt.hub.TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        with pytest.raises(ConnectionError, match=rf"{endpoint} cannot be reached \(ReadT"):
            access_hub()


def test_offline_mode_sends_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanogpt.hub.problem_of", pytest.fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="fetched: HF_HUB_OFFLINE is set; copy them here"):
        access_hub()


def refusal(kind: str, status: int) -> Exception:
    """Return an error of huggingface_hub for a response with this status."""
    from huggingface_hub import errors

    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    error: type[errors.HfHubHTTPError] = getattr(errors, kind)
    return error("of the hub\nin two lines", response=response)


@pytest.mark.parametrize(
    ("error", "type_", "words"),
    [
        (lambda: refusal("GatedRepoError", 403), PermissionError, "gated or private: .*HF_TOKEN"),
        (
            lambda: refusal("RevisionNotFoundError", 404),
            FileNotFoundError,
            "no such file or revision",
        ),
        (
            lambda: refusal("RemoteEntryNotFoundError", 404),
            FileNotFoundError,
            "no such file or revision .*; c",
        ),
        (lambda: refusal("RepositoryNotFoundError", 404), PermissionError, "is not on the hub"),
        (lambda: refusal("HfHubHTTPError", 401), PermissionError, "set HF_TOKEN"),
        (
            lambda: refusal("HfHubHTTPError", 500),
            ConnectionError,
            "off .*same command continues",
        ),
        (lambda: ConnectionResetError("reset"), ConnectionError, "broke off .*; .* or copy it"),
        (lambda: TimeoutError(), ConnectionError, "fetching gpt2 broke off"),
    ],
)
def test_an_error_of_the_hub_is_one_sentence(
    server: HTTPServer, error: Callable[[], Exception], type_: type[Exception], words: str
) -> None:
    cause = error()
    with pytest.raises(type_, match=words) as raised, hub_errors("gpt2", "copy it"):
        raise ValueError("of a library above") from cause
    assert "\n" not in str(raised.value)


def test_an_error_that_is_not_the_hubs_passes(server: HTTPServer) -> None:
    error = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left") as raised, hub_errors("gpt2", "copy it"):
        raise error
    assert raised.value is error
