"""Text of prompts and models is text: nothing in it runs, loads, or leads anywhere it must not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_engine import FakeEngine
from tests.front_end import says, serve
from tests.page import opened

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<img src=https://evil.example/x.png>",
    "![x](https://evil.example/x.png)",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x]( java\tscript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:x) <javascript:alert(1)>",
    '[x](https://ok.example/" onmouseover=alert(1) )',
    "<iframe src=https://evil.example></iframe>",
    "<svg onload=alert(1)>",
    "`<script>alert(1)</script>`",
    "```<img src=x onerror=alert(1)>\n<script>alert(1)</script>\n```",
    "| <script>alert(1)</script> |\n|---|\n| <img src=x onerror=alert(1)> |",
    "<style>*{display:none}</style><base href=https://evil.example/>",
    "<form action=https://evil.example><button>x</button></form>",
    "</div></article><h1>out</h1>",
]
UNCLOSED = ["```", "~~~python\n", "**", "_ _ _ _", "[", "![", "[x](", "[x]()", "\\", "`" * 31]
ENDLESS = ["> " * 60, "- " * 60, "#" * 40, "* " * 500, "[" * 3000, "*a " * 2000, "_a" * 2000]
ODD = [
    *("|||\n|-|\n|", "\n" * 500, "\x00\u202e\ufeff\u200b", "\ud83d"),
    "1. a\n   - b\n      1. c\n         > d\n  e",
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
    kept = '{"max_tokens": 4096, "temperature": 0}'
    with serve(engine) as url, opened(browser, url) as found:
        found.evaluate(f"localStorage.setItem('nanogpt.sampling', '{kept}')")
        found.reload()
        found.wait_for_selector("body[data-model]", state="attached")
        yield found


def converse(page: Any, text: str) -> None:
    """Say a text in a new conversation, and see it through."""
    page.click("#new-chat")
    page.fill("#chat-text", text)
    page.press("#chat-text", "Enter")
    page.wait_for_selector("#send:visible")
    page.wait_for_selector(".theirs .icon-button, .theirs .failure")


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_in_a_prompt_and_in_an_answer_does_nothing(
    page: Any, engine: FakeEngine, attack: str
) -> None:
    engine.reply = says(f"{attack}\n\nand {attack} inline")
    converse(page, attack)
    page.wait_for_timeout(50)
    found = page.evaluate(INERT)
    assert found["running"] == 0
    assert found["handlers"] == []
    assert set(found["links"]) <= {"https:"}
    assert page.inner_text(".mine .bubble").split() == attack.split()


def test_attacks_in_names_and_errors_do_nothing(page: Any, engine: FakeEngine) -> None:
    engine.failure = ("invalid", "<img src=x onerror=alert(1)>")
    converse(page, "<img src=x onerror=alert(1)>")
    assert "<img" in page.inner_text(".failure")
    assert page.inner_text("#conversation-list .name").startswith("<img")
    assert page.evaluate("document.querySelectorAll('img').length") == 0


def test_broken_markdown_is_shown_as_some_text(page: Any, engine: FakeEngine) -> None:
    for text in UNCLOSED + ENDLESS + ODD:
        engine.reply = says(text.encode("utf-8", "surrogatepass"))
        converse(page, "Hello")
        assert page.locator(".theirs .failure").count() == 0, text[:40]


def test_links_say_where_they_lead_and_take_nothing_along(page: Any, engine: FakeEngine) -> None:
    engine.reply = says("[safe](https://one.example/a?b=c), https://two.example/x. <b>")
    converse(page, "Hello")
    links = page.locator(".theirs a").evaluate_all(
        "all => all.map((e) => [e.href, e.rel, e.target])"
    )
    rel = "noopener noreferrer nofollow"
    assert links == [
        ["https://one.example/a?b=c", rel, "_blank"],
        ["https://two.example/x", rel, "_blank"],
    ]


@pytest.mark.parametrize("kept", ["null", "[]", "{", '{"temperature": "hot", "stop": 5}', "9"])
def test_broken_kept_values_are_put_right(page: Any, kept: str) -> None:
    names = ["nanogpt.sampling", "nanogpt.page", "nanogpt.last", "nanogpt.text", "nanogpt.chat.x"]
    for name in names:
        page.evaluate("([name, value]) => localStorage.setItem(name, value)", [name, kept])
    page.reload()
    page.wait_for_selector("body[data-model]", state="attached")
    converse(page, "Hello")
    assert page.locator(".theirs .failure").count() == 0
