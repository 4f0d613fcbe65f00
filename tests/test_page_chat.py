"""Chat in the page, before an engine with prepared replies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.engine.messages import Generate
from tests.fake_engine import FakeEngine
from tests.front_end import eventually, fixed_reply, generated
from tests.page import answers, opened, send


def prompt_text(request: Generate) -> str:
    """Return the prompt of a request as text."""
    return bytes(token for token in request.prompt_ids if token < 256).decode()


def counting(request: Generate) -> list[int]:
    """Answer with the number of the user's turns."""
    return list(f"Answer {prompt_text(request).count('### Instruction')}".encode())


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(f"unix:{tmp_path}/e", reply=counting, template="alpaca", stage="instruct")


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    with opened(browser, url, permissions=["clipboard-read", "clipboard-write"]) as found:
        yield found


def test_tokens_are_seen_as_they_arrive(page: Any, engine: FakeEngine) -> None:
    engine.reply, engine.delay_s = fixed_reply("abcdefghij" * 3), 0.05
    page.fill("#chat-text", "Hello")
    page.click("#send")
    seen = set()
    while page.is_visible("#chat-stop"):
        seen.add("".join(answers(page)))
        page.wait_for_timeout(30)
    grown = [text for text in seen if text.startswith("abc")]
    assert len(grown) > 5
    assert answers(page) == ["abcdefghij" * 3]
    assert "30 tokens" in page.inner_text(".theirs .facts")
    page.fill("#chat-text", "Hello")
    page.wait_for_selector("#chat-meter:has-text('of 1,024 tokens')")


def test_stopping_keeps_what_is_there_and_frees_the_slot(page: Any, engine: FakeEngine) -> None:
    engine.reply, engine.delay_s = fixed_reply("x" * 900), 0.02
    page.fill("#chat-text", "Hello")
    page.press("#chat-text", "Enter")
    page.wait_for_selector(".theirs .text:has-text('xxx')")
    page.keyboard.press("Escape")
    page.wait_for_selector(".theirs .facts:has-text('stopped')")
    assert eventually(lambda: engine.cancelled)
    assert 3 <= len(answers(page)[0]) < 900
    # after an answer in another conversation one can send
    page.click("#new-chat")
    engine.reply, engine.delay_s = fixed_reply("x" * 40), 0.02
    page.fill("#chat-text", "Hello")
    page.click("#send")
    page.wait_for_selector(".theirs .text:has-text('xxx')")
    page.click("#new-chat")
    page.wait_for_selector("#chat-stop", state="hidden")
    send(page, "Here")


def test_the_whole_conversation_is_sent_with_its_system_prompt(
    page: Any, engine: FakeEngine
) -> None:
    page.click("#settings-button")
    page.fill("#system-prompt", "Be brief.")
    page.keyboard.press("Escape")
    send(page, "One")
    page.fill("#chat-text", "Two")
    page.press("#chat-text", "Enter")
    page.wait_for_selector("text=Answer 2")
    prompt = prompt_text(generated(engine)[-1])
    parts = ["Be brief.", "One", "Answer 1", "Two", "### Response:"]
    places = [prompt.rindex(part) for part in parts]
    assert places == sorted(places)


def test_an_answer_is_generated_again_and_copied(page: Any, engine: FakeEngine) -> None:
    send(page, "Hello")
    engine.reply = fixed_reply("Another")
    page.click("[aria-label='Regenerate']")
    page.wait_for_selector("text=2/2")
    assert answers(page) == ["Another"]
    page.click("[aria-label='Previous answer']")
    assert answers(page) == ["Answer 1"]
    page.click("#new-chat")
    engine.reply = fixed_reply("**bold** text")
    send(page, "Hello")
    page.click(".theirs [aria-label='Copy']")
    page.wait_for_selector("#notice:has-text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == "**bold** text"  # as it was written


def test_a_message_is_edited_and_what_followed_it_is_replaced(page: Any) -> None:
    send(page, "First")
    send(page, "Second")
    page.wait_for_selector("text=Answer 2")
    page.locator(".mine").first.hover()
    page.locator("[aria-label='Edit and send again']").first.click()
    assert page.input_value("#chat-text") == "First"
    page.fill("#chat-text", "Changed")
    page.press("#chat-text", "Enter")
    page.wait_for_selector("text=Changed")
    page.wait_for_selector(".theirs .icon-button")
    assert page.locator(".mine .bubble").all_inner_texts() == ["Changed"]
    assert answers(page) == ["Answer 1"]
    page.locator(".mine").hover()  # leaving the editing changes nothing
    page.click("[aria-label='Edit and send again']")
    page.keyboard.press("Escape")
    assert page.input_value("#chat-text") == ""
    assert page.locator(".mine .bubble").all_inner_texts() == ["Changed"]


def test_conversations_are_stored_opened_renamed_and_deleted(page: Any) -> None:
    send(page, "About cats")
    page.click("#new-chat")
    assert page.locator("article").count() == 0
    send(page, "About dogs")
    page.reload()
    names = page.locator("#conversation-list .name")
    names.first.wait_for()
    assert names.all_inner_texts() == ["About dogs", "About cats"]
    names.nth(1).click()
    assert page.inner_text(".mine .bubble") == "About cats"
    names.nth(1).hover()
    page.locator("[aria-label='Rename']").nth(1).click()
    page.locator("#conversation-list input").fill("Felines")
    page.keyboard.press("Enter")
    assert "Felines" in names.all_inner_texts()
    page.locator("#conversation-list li", has_text="Felines").hover()
    page.locator("#conversation-list li", has_text="Felines").locator("[title='Delete']").click()
    assert names.all_inner_texts() == ["About dogs"]
    page.click("#notice button")
    assert sorted(names.all_inner_texts()) == ["About dogs", "Felines"]


def test_two_tabs_see_each_other_s_conversations(page: Any, url: str) -> None:
    other = page.context.new_page()
    other.goto(url)
    other.wait_for_selector("body[data-model]", state="attached")
    send(page, "From one tab")
    send(other, "From the other")
    for tab in (page, other):
        tab.wait_for_selector("#conversation-list li:nth-child(2)")
        titles = tab.locator("#conversation-list .name").all_inner_texts()
        assert sorted(titles) == ["From one tab", "From the other"]


def test_a_full_storage_is_reported_and_the_conversation_continues(page: Any) -> None:
    page.evaluate("""() => {
        let size = 1 << 22;
        while (size >= 1) {
            try { localStorage.setItem(`filler${size}${Math.random()}`, "x".repeat(size)); }
            catch { size >>= 1; }
        }
    }""")
    send(page, "Hello")
    page.wait_for_selector("#notice:has-text('storage is full')")
    assert answers(page) == ["Answer 1"]
    page.click("#new-chat")
    page.click("#conversation-list .name:has-text('Hello')")
    assert answers(page) == ["Answer 1"]


def test_sampling_controls_are_sent_within_their_limits_and_reset(
    page: Any, engine: FakeEngine
) -> None:
    page.click("#settings-button")
    for name, value in {
        "temperature": "0.3",
        "top_p": "7",
        "top_k": "40",
        "min_p": "0.05",
        "max_tokens": "12",
        "presence_penalty": "0.5",
        "frequency_penalty": "-9",
        "repetition_penalty": "1.1",
        "seed": "42",
    }.items():
        page.fill(f"#sampling-{name}", value)
        page.press(f"#sampling-{name}", "Tab")
    page.fill("#sampling-stop", "7\\n\n8")
    send(page, "Hello")
    params = generated(engine)[-1].params
    assert (params.temperature, params.top_p, params.top_k) == (0.3, None, 40)  # 1 is left out
    assert (params.min_p, params.max_tokens, params.seed) == (0.05, 12, 42)
    assert (params.presence_penalty, params.frequency_penalty) == (0.5, -2.0)
    assert params.repetition_penalty == 1.1
    page.click("text=Reset")
    page.click("[aria-label='Regenerate']")
    page.wait_for_selector("text=2/2")
    params = generated(engine)[-1].params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.8, 0.95, 256)
    assert (params.top_k, params.frequency_penalty) == (None, 0.0)
    page.click("#new-chat")
    engine.reply = fixed_reply("one STOP two")
    page.fill("#sampling-stop", "STOP")
    send(page, "Hello")
    assert answers(page) == ["one"]


def test_an_answer_by_a_schema_is_shown_in_lines_or_as_incomplete(
    page: Any, engine: FakeEngine
) -> None:
    page.click("#settings-button")
    page.fill("#sampling-schema", '{"type": "object"}')
    engine.reply = fixed_reply('{"n":10000000000000000001, "of":["*a*"]}')
    send(page, "Hello")
    assert generated(engine)[-1].params.grammar
    shown = page.locator(".theirs .code pre").inner_text().splitlines()
    assert shown == ["{", '  "n": 10000000000000000001,', '  "of": [', '    "*a*"', "  ]", "}"]
    assert "valid JSON" in page.locator(".theirs .facts").inner_text()
    engine.reply = fixed_reply('{"n":')
    page.click("[aria-label='Regenerate']")
    page.wait_for_selector("text=2/2")
    assert answers(page) == ['{"n":']
    assert "incomplete JSON" in page.locator(".theirs .facts").inner_text()


def test_a_schema_that_is_none_is_refused_with_the_reason(page: Any, engine: FakeEngine) -> None:
    page.click("#settings-button")
    page.fill("#sampling-schema", '{"type": ')
    send(page, "Hello")
    assert "guided_json cannot be followed" in page.locator(".theirs .failure").inner_text()
    assert generated(engine) == []


def test_long_words_and_other_directions_stay_within_the_page(
    page: Any, engine: FakeEngine
) -> None:
    engine.reply = fixed_reply("W" * 400 + "\n\nשלום עולם\n\n`" + "c" * 300 + "`")
    page.set_viewport_size({"width": 360, "height": 640})
    page.click("#settings-button")
    page.fill("#sampling-max_tokens", "900")
    page.keyboard.press("Escape")
    send(page, "u" * 300)
    wide = "document.querySelector('#chat-scroller').scrollWidth - innerWidth"
    assert page.evaluate(wide) <= 0
    hebrew = page.locator(".theirs p", has_text="שלום")
    assert hebrew.evaluate("e => getComputedStyle(e).direction") == "rtl"
