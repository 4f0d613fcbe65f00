"""Calls of functions in the page, before an engine with prepared replies."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.engine.messages import Generate
from tests.fake_engine import FakeEngine
from tests.page import answers, opened, send

CALL = '{"name": "get_weather", "arguments": {"city": "Oslo", "of": [1, {"a": "b, {c"}]}'
LINES = ["{", '  "city": "Oslo",', '  "of": [', "    1,", "    {", '      "a": "b, {c"', "    }"]
LINES += ["  ]", "}"]
ARGUMENTS = ".theirs .code pre"


def reply(request: Generate) -> list[int]:
    """Answer with the call where one is forced."""
    return list((CALL if request.params.grammar else "It is sunny.").encode())


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(f"unix:{tmp_path}/e", reply=reply, template="alpaca", stage="instruct")


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page with the example of a tool, and the bodies of its chats as `page.bodies`."""
    with opened(browser, url) as found:
        found.bodies = []
        found.on("request", lambda request: record(found.bodies, request))
        found.click("#settings-button")
        found.click("text=Insert an example")
        yield found


def record(bodies: list[Any], request: Any) -> None:
    if request.url.endswith("/chat/completions"):
        bodies.append(json.loads(request.post_data))


def test_a_call_is_shown_indented_while_it_grows(page: Any, engine: FakeEngine) -> None:
    engine.delay_s = 0.05
    page.fill("#chat-text", "What is the weather?")
    page.press("#chat-text", "Enter")
    seen = set()
    while not page.is_visible("#editing"):
        seen.update(page.locator(ARGUMENTS).all_inner_texts())
        page.wait_for_timeout(20)
    assert len(seen) > 3
    assert all(LINES[: text.count("\n")] == text.split("\n")[:-1] for text in seen)
    assert page.locator(ARGUMENTS).inner_text().split("\n") == LINES
    assert page.inner_text(".theirs figcaption span") == "Call of get_weather"


def test_the_result_of_a_call_goes_back_and_the_model_goes_on(page: Any) -> None:
    send(page, "Hello")
    page.fill("[aria-label='Result of get_weather']", '{"sky":"clear"}')
    page.keyboard.press("Enter")
    page.wait_for_selector("text=It is sunny.")
    assert page.locator(ARGUMENTS).nth(1).inner_text() == '{\n  "sky": "clear"\n}'
    first, second = page.bodies
    assert (first["tool_choice"], second["tool_choice"]) == ("required", "auto")
    assert second["tools"] == first["tools"]
    called, result = second["messages"][1:]
    (call,) = called["tool_calls"]
    assert f'{{"name": "get_weather", "arguments": {call["function"]["arguments"]}' == CALL
    assert (result["role"], result["content"]) == ("tool", '{"sky":"clear"}')
    assert result["tool_call_id"] == call["id"] != ""
    assert page.get_attribute("#chat-text", "aria-label") == "Message"


def test_a_call_and_its_result_are_stored_and_the_result_is_changed(page: Any) -> None:
    send(page, "Hello")
    page.wait_for_selector("#editing:visible")
    page.reload()
    page.wait_for_selector("#editing:visible")
    page.fill("#chat-text", "rain")
    page.press("#chat-text", "Enter")
    page.wait_for_selector("text=It is sunny.")
    page.reload()
    page.wait_for_selector("text=It is sunny.")
    result = page.locator("[aria-label='Result of get_weather']", has_text="rain")
    result.locator("[aria-label='Edit and send again']").click()
    assert page.input_value("#chat-text") == "rain"
    page.fill("#chat-text", "snow")
    page.press("#chat-text", "Enter")
    page.wait_for_selector("#send:visible")
    roles = [message["role"] for message in page.bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "tool"]
    assert page.bodies[-1]["messages"][-1]["content"] == "snow"
    assert [text for text in answers(page) if "sunny" in text] == ["It is sunny."]


def test_a_message_can_follow_a_call_instead_of_its_result(page: Any) -> None:
    send(page, "Hello")
    page.click("text=Send a message instead")
    assert page.evaluate("document.activeElement.ariaLabel") == "Message"
    page.keyboard.type("Never mind.")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:visible")
    assert page.bodies[-1]["messages"][-1] == {"role": "user", "content": "Never mind."}


def test_a_function_or_a_text_is_chosen(page: Any) -> None:
    page.select_option("#sampling-tool_choice", "get_weather")
    send(page, "Hello")
    named = {"type": "function", "function": {"name": "get_weather"}}
    assert page.bodies[-1]["tool_choice"] == named
    page.select_option("#sampling-tool_choice", "auto")
    page.click("[aria-label='Regenerate']")
    page.wait_for_selector("text=2/2")
    page.wait_for_selector("text=It is sunny.")
    assert page.bodies[-1]["tool_choice"] == "auto"
    assert not page.is_visible("#editing")
    page.click("[aria-label='Previous answer']")
    assert page.is_visible("#editing")


def test_tools_that_are_none_are_refused_with_the_reason(page: Any) -> None:
    page.fill("#sampling-tools", '[{"name": ')
    assert page.get_attribute("#sampling-tools", "aria-invalid") == "true"
    send(page, "Hello")
    assert "tools" in page.inner_text(".theirs .failure")
    page.fill("#sampling-tools", '{"name": "now", "parameters": {"not": {}}}')
    page.click("text=Try again")
    page.wait_for_selector(".failure:has-text('tools cannot be followed')")
