"""The hub's silence is noticed within seconds and told in one sentence."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from nanogpt.hub import check_reachable

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
    """A hub on this machine that answers 200 until told otherwise."""
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        server.status = 200  # type: ignore[attr-defined]
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask() -> None:
    check_reachable("the weights of gpt2", "copy them here")


@pytest.mark.parametrize("status", [200, 302, 401, 404, 501])
def test_any_answer_of_the_hub_will_do(server: HTTPServer, status: int) -> None:
    server.status = status  # type: ignore[attr-defined]
    ask()


def test_a_gateway_without_a_way_to_the_hub_is_no_answer(server: HTTPServer) -> None:
    server.status = 503  # type: ignore[attr-defined]
    with pytest.raises(ConnectionError, match=r"^the weights of gpt2 .* answered 503; copy them"):
        ask()


def test_a_closed_port_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    with pytest.raises(ConnectionError, match=rf"fetched: {endpoint} cannot be reached \(Connect"):
        ask()


def test_silence_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanogpt.hub.ANSWERS_WITHIN_S", 0.05)
    monkeypatch.setattr("nanogpt.hub._ask", lambda endpoint: time.sleep(0.5))
    with pytest.raises(ConnectionError, match=r"huggingface\.co did not answer in 0\.05 s; copy"):
        ask()


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanogpt.hub._ask", pytest.fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="fetched: HF_HUB_OFFLINE is set; copy them here"):
        ask()
