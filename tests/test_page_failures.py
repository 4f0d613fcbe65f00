"""Failures in the page: a message for each, a way to continue, and no typed text is lost."""

from pathlib import Path
from typing import Any

import pytest

from serving.api.settings import ApiSettings
from serving.engine.messages import FailureKind
from tests.fake_engine import FakeEngine
from tests.front_end import eventually, fixed_reply, generated, hang_up, serve
from tests.page import answers, free_port, opened, send, watched

KEY = "sk-schlüssel"


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    about: dict[str, Any] = {"template": "alpaca", "stage": "instruct", "block_size": 256}
    return FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("Fine."), **about)


def test_a_key_is_requested_checked_and_stored_in_the_tab_only(
    browser: Any, engine: FakeEngine
) -> None:
    with (
        serve(engine, ApiSettings(api_keys=(KEY,))) as url,
        browser.new_context(locale="en-US") as profile,
    ):
        page = profile.new_page()
        wrong = watched(page, url)
        page.goto(url)
        page.wait_for_selector("#key-dialog[open]")
        page.keyboard.press("Escape")
        page.click("#banner button")  # which opens it again
        page.wait_for_selector("#key-dialog[open]")
        assert not page.is_visible("#key-wrong")
        page.fill("#key", "guess")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-wrong")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-model]", state="attached")
        send(page, "Hello")
        page.reload()
        page.wait_for_selector("body[data-model]", state="attached")
        assert page.evaluate("sessionStorage.getItem('nanogpt.key')") == KEY
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")
        other = profile.new_page()
        other.goto(url)
        other.wait_for_selector("#key-dialog[open]")
        assert wrong == []


REFUSALS: dict[FailureKind, str] = {
    "overloaded": "The server is busy; try again in a moment.",
    "unavailable": "The engine is unavailable; try again in a moment.",
    "internal": "The server failed.",
    "invalid": "The request is invalid.",
}


def test_a_refusal_is_shown_and_can_be_retried(browser: Any, engine: FakeEngine, url: str) -> None:
    with opened(browser, url) as page:
        for kind, message in REFUSALS.items():
            page.click("#new-chat")
            engine.failure = (kind, "Some reason.")
            send(page, "Hello")
            assert message in page.inner_text(".theirs .failure")
            engine.failure = None
            page.click(".failure button")
            page.wait_for_selector(".theirs :text('Fine.')")
            assert page.locator(".failure:visible").count() == 0
        assert not page.is_visible("#key-dialog")  # without keys


def test_too_many_requests_of_a_key_are_shown_as_a_failure(
    browser: Any, engine: FakeEngine
) -> None:
    engine.reply, engine.delay_s = fixed_reply("x" * 200), 0.05
    settings = ApiSettings(api_keys=("k",), max_open_per_key=1)
    with serve(engine, settings) as url, browser.new_page(locale="en-US") as page:
        page.add_init_script("sessionStorage.setItem('nanogpt.key', 'k')")
        page.goto(f"{url}/?model=tiny")
        page.wait_for_selector("body[data-model]", state="attached")
        body = "{method: 'POST', body: '{\"max_tokens\": 200, \"stream\": true}', headers}"
        headers = "{'X-API-Key': 'k', 'Content-Type': 'application/json'}"
        page.evaluate(f"() => {{ const headers = {headers}; fetch('/v1/completions', {body}); }}")
        assert eventually(lambda: generated(engine))
        page.fill("#chat-text", "Hello")
        page.press("#chat-text", "Enter")
        page.wait_for_selector(".theirs .failure:has-text('The server is busy')")


def test_a_full_context_is_shown_and_the_oldest_messages_can_be_dropped(
    browser: Any, engine: FakeEngine, url: str
) -> None:
    engine.reply = fixed_reply("An answer. ")
    with opened(browser, url) as page:
        for i in range(5):
            page.fill("#chat-text", f"Message {i} {'and so on ' * 3}")
            page.press("#chat-text", "Enter")
            page.wait_for_selector(f"article.theirs >> nth={i}")
            page.wait_for_selector("#send:visible")
            if page.is_visible(".theirs .failure"):
                break
        assert "longer than the model's context" in page.inner_text(".theirs .failure")
        page.click("text=Continue without the oldest messages")
        page.wait_for_selector("text=The messages above are no longer sent to the model.")
        page.wait_for_selector(".theirs .failure", state="detached")
        page.wait_for_selector("#send:visible")
        assert b"Message 0" not in bytes(i for i in generated(engine)[-1].prompt_ids if i < 256)
        for i in range(3):  # and from now on it happens by itself
            page.fill("#chat-text", f"Later {i} {'and so on ' * 3}")
            page.press("#chat-text", "Enter")
            page.wait_for_selector("#send:visible")
        page.wait_for_selector("article.theirs:last-child .icon-button")
        assert page.locator(".theirs .failure").count() == 0
        page.click("#new-chat")  # a message alone over the context has no such way
        send(page, "long " * 100)
        assert "256 tokens" in page.inner_text(".theirs .failure")
        assert page.locator(".theirs .failure button").count() == 0


def test_a_partial_answer_outlives_the_engine(browser: Any, engine: FakeEngine, url: str) -> None:
    engine.reply, engine.delay_s = fixed_reply("abc" * 80), 0.05
    with opened(browser, url) as page:
        page.fill("#chat-text", "Hello")
        page.press("#chat-text", "Enter")
        page.wait_for_selector(".theirs .text:has-text('abc')")
        hang_up(engine)
        page.wait_for_selector(".theirs .failure")
        assert answers(page)[0].startswith("abc")
        page.reload()
        page.wait_for_selector(".theirs .failure")
        assert answers(page)[0].startswith("abc")


def test_a_lost_server_is_shown_and_so_is_its_return(browser: Any, tmp_path: Path) -> None:
    port = free_port()
    about: dict[str, Any] = {"template": "alpaca", "reply": fixed_reply("Fine.")}
    with browser.new_page(locale="en-US") as page:
        page.clock.install()
        with serve(FakeEngine(f"unix:{tmp_path}/a", **about), port=port) as url:
            page.goto(url)
            page.wait_for_selector("body[data-model]", state="attached")
        page.fill("#chat-text", "Hello")
        page.press("#chat-text", "Enter")
        page.wait_for_selector(".theirs .failure:has-text('cannot be reached')")
        page.clock.fast_forward(10_000)
        page.wait_for_selector("#banner:has-text('cannot be reached')")
        with serve(FakeEngine(f"unix:{tmp_path}/b", **about), port=port):
            page.clock.fast_forward(10_000)
            page.wait_for_selector("#banner", state="hidden")
            page.wait_for_selector("#notice:has-text('Reconnected.')")
            page.click(".failure button")
            page.wait_for_selector(".theirs :text('Fine.')")


def test_a_broken_connection_is_shown(browser: Any, url: str) -> None:
    cut = 'data: {"choices":[{"index":0,"delta":{"content":"Half"},"finish_reason":null}]}\n\n'
    with opened(browser, url) as page:
        stream = {"content_type": "text/event-stream", "body": cut}
        page.route("**/v1/chat/completions", lambda route: route.fulfill(**stream))
        send(page, "Hello")
        assert answers(page)[0] == "Half"
        assert "The connection was lost." in page.inner_text(".theirs .failure")


def test_a_server_without_models_shows_how_to_train_one(browser: Any, engine: FakeEngine) -> None:
    engine.models = []
    with serve(engine) as url, browser.new_page(locale="en-US") as page:
        page.goto(url)
        page.wait_for_selector("#banner:has-text('python train.py')")


def test_a_failing_completion_is_shown_next_to_the_text(browser: Any, tmp_path: Path) -> None:
    failing = FakeEngine(f"unix:{tmp_path}/f", failure=("overloaded", "The queue is full."))
    with serve(failing) as url, opened(browser, url) as page:
        page.fill("#complete-text", "Once")
        page.click("#go")
        page.wait_for_selector("#complete-failure:has-text('The queue is full.')")
        assert page.input_value("#complete-text") == "Once"
