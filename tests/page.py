"""The page in a real browser, with a check for errors and requests to other origins."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.front_end import eventually

ROOT = Path(__file__).parent.parent
ANSWER_TEXT = "article.theirs .text"
TIMEOUT_MS = 30_000


@contextlib.contextmanager
def opened(browser: Any, url: str, *, path: str = "/", **context: Any) -> Iterator[Any]:
    """Open the page in a profile of its own, and wait until it knows its model.

    Raise AssertionError if a script failed, the content security policy was violated, or a request
    went to another origin. A failed request is the server's answer and no error here.
    """
    with contextlib.closing(browser.new_context(**{"locale": "en-US", **context})) as profile:
        profile.set_default_timeout(TIMEOUT_MS)
        page = profile.new_page()
        wrong = watched(page, url)
        page.goto(url + path)
        if path.startswith("/?") or path == "/":
            page.wait_for_selector("body[data-model]", state="attached")
        yield page
        assert wrong == []


def watched(page: Any, url: str) -> list[str]:
    """Return a list to which every error of a page is appended."""
    wrong: list[str] = []

    def on_console(message: Any) -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            wrong.append(message.text)

    def on_request(request: Any) -> None:
        if not request.url.startswith((url, "data:", "about:")):
            wrong.append(f"a request to {request.url}")

    page.on("console", on_console)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", on_request)
    page.on("dialog", lambda dialog: wrong.append(f"a dialog: {dialog.message}"))
    return wrong


def send(page: Any, text: str) -> None:
    """Send a message and wait until its answer is complete or has failed."""
    page.fill("#chat-text", text)
    page.press("#chat-text", "Enter")
    page.wait_for_selector(".theirs .actions .icon-button, .theirs .failure")


def answers(page: Any) -> list[str]:
    """Return the texts of the answers."""
    return [str(text).strip() for text in page.locator(ANSWER_TEXT).all_inner_texts()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def real_server(runs_dir: Path, **variables: str) -> Iterator[str]:
    """Run the whole server, engine and all, on the checkpoints of a directory."""
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("NANOGPT_")},
        "NANOGPT_RUNS_DIR": str(runs_dir),
        "NANOGPT_PORT": str(port),
        "NANOGPT_CACHE_GB": "0.2",
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    server = subprocess.Popen([sys.executable, "-m", "serving"], env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        assert eventually(lambda: _is_ready(url), 120)
        yield url
    finally:
        server.terminate()
        server.wait()


def _is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    return False
