"""The page behind a reverse proxy: below a path of its own, and one that authenticates."""

import base64
import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from nanogpt.report.report import write_report
from serving.api.settings import ApiSettings
from tests.fake_engine import FakeEngine
from tests.front_end import fixed_reply, serve
from tests.page import answers, opened, send
from tests.test_runs import write_run

KEY = "sk-schlüssel"
USER = {"username": "ann", "password": "secret"}
BASIC = "Basic " + base64.b64encode(b"ann:secret").decode()
COOKIE = "session=1"
SIGNED_IN: dict[str, Any] = {
    "cookies": [{"name": "session", "value": "1", "domain": "127.0.0.1", "path": "/"}],
    "origins": [],
}


@contextlib.contextmanager
def reverse_proxy(url: str, prefix: str, required: tuple[str, str] | None = None) -> Iterator[str]:
    """Serve a server below a path; a request lacking the `required` header is not passed on."""
    target = urlsplit(url)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if required and required[1] not in self.headers.get(required[0], ""):
                self._require_sign_in()
                return
            if not self.path.startswith(prefix):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
            path = "/" + self.path.removeprefix(prefix)
            headers["X-Forwarded-For"] = "192.0.2.1"
            with contextlib.closing(http.client.HTTPConnection(target.netloc)) as upstream:
                upstream.request(self.command, path, body or None, headers)
                with upstream.getresponse() as answer:
                    self._pass_on(answer, answer.read())

        def _pass_on(self, answer: http.client.HTTPResponse, content: bytes) -> None:
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            with contextlib.suppress(ConnectionError):  # the browser left
                self.end_headers()
                self.wfile.write(content)

        do_POST = do_GET

        def _require_sign_in(self) -> None:
            if required == ("Cookie", COOKIE):
                self.send_response(302)
                self.send_header("Location", "/sign-in")
            else:
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="proxy"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A server with a key, a model that chats, and a run with a report."""
    rows = [f"{step},{8 * step},{4 - step / 40},{4 - step / 50},9" for step in range(1, 40)]
    write_report(write_run(tmp_path / "runs" / "tiny", *rows, summary={"steps": 39}))
    engine = FakeEngine(f"unix:{tmp_path}/e", template="alpaca", reply=fixed_reply("Hi there."))
    with serve(engine, ApiSettings(api_keys=(KEY,), runs_dir=str(tmp_path / "runs"))) as address:
        yield address


def enter_key(page: Any) -> None:
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")


@pytest.mark.parametrize(
    ("prefix", "required"),
    [
        ("/llm/", None),
        ("/", ("Authorization", BASIC)),
        ("/user/ann/proxy/5001/", ("Cookie", COOKIE)),
    ],
)
def test_all_of_the_page_works_behind_a_proxy(
    browser: Any, url: str, prefix: str, required: tuple[str, str] | None
) -> None:
    with (
        reverse_proxy(url, prefix, required) as address,
        opened(
            browser, address, path=f"{prefix}#", http_credentials=USER, storage_state=SIGNED_IN
        ) as page,
    ):
        enter_key(page)
        page.wait_for_selector("body[data-model='tiny']", state="attached")
        send(page, "Hello")
        assert answers(page) == ["Hi there."]
        page.click("text=Runs")
        page.click("[aria-label='Report: tiny']")
        assert page.frame_locator("#report iframe").locator("h1").inner_text() == "tiny"
        page.keyboard.press("Escape")
        page.click("text=Try it")
        page.wait_for_selector("body[data-model='tiny']", state="attached")
        assert page.url == f"{address}{prefix}?model=tiny"


def test_a_session_of_the_proxy_that_ended_is_named(browser: Any, url: str) -> None:
    with (
        reverse_proxy(url, "/", ("Cookie", COOKIE)) as address,
        opened(browser, address, path="/#", storage_state=SIGNED_IN) as page,
    ):
        enter_key(page)
        page.wait_for_selector("body[data-model]", state="attached")
        page.context.clear_cookies()
        page.fill("#chat-text", "Hello")
        page.press("#chat-text", "Enter")
        assert "requires a login" in page.inner_text(".theirs .failure")
