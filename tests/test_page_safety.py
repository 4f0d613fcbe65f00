"""Text of prompts and models is text: nothing in it runs, loads, or leads anywhere it must not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_engine import FakeEngine
from tests.front_end import fixed_reply, serve
from tests.page import opened

ATTACKS = [  # more of them, on the renderer alone, in tests/js/markdown.test.mjs
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](https://evil.example/x.png)",
    "[x](javascript:alert(1))",
    "<iframe src=https://evil.example></iframe>",
    "<style>*{display:none}</style><base href=https://evil.example/>",
    "</div></article><h1>out</h1>",
]
INERT = """() => ({
    running: document.querySelectorAll("main script, main iframe, main img, main style, main base,"
        + " main object, main embed, main link, main form:not(#chat-form)").length,
    handlers: [...document.querySelectorAll("main *")].flatMap((e) =>
        e.getAttributeNames().filter((name) => name.startsWith("on") || name === "style")
        .filter(() => !e.closest(".composer, .editor"))),
    links: [...document.querySelectorAll("main a")].map((e) => new URL(e.href).protocol),
})"""


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(f"unix:{tmp_path}/e", template="alpaca", stage="instruct", step=1000)


@pytest.fixture
def page(browser: Any, engine: FakeEngine) -> Iterator[Any]:
    stored = '{"max_tokens": 4096, "temperature": 0}'
    with serve(engine) as url, opened(browser, url) as found:
        found.evaluate(f"localStorage.setItem('nanogpt.sampling', '{stored}')")
        found.reload()
        found.wait_for_selector("body[data-model]", state="attached")
        yield found


def converse(page: Any, text: str) -> None:
    """Send a text in a new conversation and wait for the end of the answer."""
    page.click("#new-chat")
    page.fill("#chat-text", text)
    page.press("#chat-text", "Enter")
    page.wait_for_selector("#send:visible")
    page.wait_for_selector(".theirs .icon-button, .theirs .failure")


def test_attacks_do_nothing(page: Any, engine: FakeEngine) -> None:
    text = "\n\n".join(ATTACKS)
    engine.reply = fixed_reply(text)
    converse(page, text)
    page.wait_for_timeout(50)
    found = page.evaluate(INERT)
    assert found["running"] == 0
    assert found["handlers"] == []
    assert set(found["links"]) <= {"https:"}
    assert page.inner_text(".mine .bubble").split() == text.split()
    # in names and errors
    engine.failure = ("invalid", "<img src=x onerror=alert(1)>")
    converse(page, "<img src=x onerror=alert(1)>")
    assert "<img" in page.inner_text(".failure")
    assert page.inner_text("#conversation-list .name >> nth=0").startswith("<img")
    assert page.evaluate("document.querySelectorAll('img').length") == 0


def test_malformed_stored_values_are_replaced(page: Any) -> None:
    for value in ("null", '{"temperature": "hot", "stop": 5}', "{"):
        for name in ("sampling", "page", "last", "text", "chat.x"):
            page.evaluate(
                "([name, value]) => localStorage.setItem(name, value)", [f"nanogpt.{name}", value]
            )
    page.reload()
    page.wait_for_selector("body[data-model]", state="attached")
    converse(page, "Hello")
    assert page.locator(".theirs .failure").count() == 0
