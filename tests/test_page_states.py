"""States of the page that need no answer: input methods, unknown models, tabs, examples, legend."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.fake_engine import FakeEngine
from tests.front_end import eventually, fixed_reply, generated, serve
from tests.page import answers, opened, send

# A key of an input method as browsers send it; Safari ends its composition before the last one.
PRESS = """([selector, key, init]) => document.querySelector(selector).dispatchEvent(
    new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...init }))"""
INPUT_METHODS: list[dict[str, Any]] = [{"isComposing": True}, {"keyCode": 229}]
LOOKS = """all => all.map((e) => getComputedStyle(e))
    .map((style) => [style.backgroundColor, style.textDecoration])"""
CONTRAST = """(element) => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const light = (colour) => {
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
            .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    const style = getComputedStyle(element);
    const behind = getComputedStyle(element.parentElement).backgroundColor;
    const [one, other] = [light(style.color), light(behind)];
    return (style.opacity * Math.max(one, other)) / Math.min(one, other);
}"""


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(
        f"unix:{tmp_path}/e", reply=fixed_reply("Fine."), template="alpaca", stage="instruct"
    )


@pytest.fixture
def classifier(tmp_path: Path) -> Iterator[str]:
    with serve(FakeEngine(f"unix:{tmp_path}/c", labels=["ham", "spam"])) as address:
        yield address


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    with opened(browser, url) as found:
        yield found


def press(page: Any, selector: str, key: str, init: dict[str, Any]) -> None:
    page.evaluate(PRESS, [selector, key, init])


def test_keys_of_an_input_method_send_and_close_nothing(page: Any, engine: FakeEngine) -> None:
    page.fill("#chat-text", "ni hao")
    for init in INPUT_METHODS:
        press(page, "#chat-text", "Enter", init)
    assert page.locator("article").count() == 0
    page.press("#chat-text", "Shift+Enter")
    assert page.input_value("#chat-text") == "ni hao\n"
    page.click("[data-mode=complete]")
    page.fill("#complete-text", "ni hao")
    for init in INPUT_METHODS:
        press(page, "#complete-text", "Enter", {"ctrlKey": True, **init})
    page.wait_for_timeout(100)
    assert generated(engine) == []
    press(page, "#complete-text", "Enter", {"ctrlKey": True})
    page.wait_for_selector(".token")


def test_keys_of_an_input_method_leave_renaming_and_editing_open_and_stop_no_answer(
    page: Any, engine: FakeEngine
) -> None:
    send(page, "Hello")
    page.click("[aria-label='Edit and send again']")
    for init in INPUT_METHODS:
        press(page, "#chat-text", "Escape", init)
        press(page, "#chat-text", "Enter", init)
    assert page.is_visible("#editing")
    press(page, "#chat-text", "Escape", {})
    assert not page.is_visible("#editing")
    page.click("[aria-label='Rename']")
    page.fill("#conversation-list input", "新")
    for init in INPUT_METHODS:
        for key in ("Enter", "Escape"):
            press(page, "#conversation-list input", key, init)
    assert page.is_visible("#conversation-list input")
    press(page, "#conversation-list input", "Enter", {})
    assert page.inner_text("#conversation-list .name") == "新"
    page.click("#new-chat")
    engine.reply, engine.delay_s = fixed_reply("x" * 60), 0.02
    page.click("#settings-button")
    page.fill("#chat-text", "Hello")
    page.press("#chat-text", "Enter")
    page.wait_for_selector(".theirs :text('xx')")
    for init in INPUT_METHODS:
        press(page, "#system-prompt", "Escape", init)
    assert page.is_visible("#settings")
    page.wait_for_selector("#send:visible")
    assert answers(page) == ["x" * 60]


def test_an_unknown_model_in_the_address_is_an_error(browser: Any, url: str) -> None:
    with opened(browser, url, path="/#") as page:
        for name in ("<img src=x>", "中文"):
            page.goto(f"{url}/?model={name}")
            page.wait_for_selector("#banner:visible")
            assert f"does not exist. {name} was requested" in page.inner_text("#banner")
            assert page.input_value("#models") == ""
            page.select_option("#models", "tiny")
            page.wait_for_selector("body[data-model='tiny']", state="attached")
            page.wait_for_selector("#banner", state="hidden")


def test_a_newer_default_does_not_replace_the_model_that_is_open(
    browser: Any, engine: FakeEngine, url: str
) -> None:
    with opened(browser, url) as page:
        page.clock.install()
        page.reload()
        page.wait_for_selector("body[data-model]", state="attached")
        newer = replace(engine.models[0], id="newer", aliases=[])
        engine.models[:] = [newer, replace(engine.models[0], default_for=[])]
        engine.hang_up()

        def both_are_listed() -> bool:
            page.clock.fast_forward(10_000)
            return bool(page.locator("#models option").count() == 2)

        assert eventually(both_are_listed)
        assert page.input_value("#models") == "tiny"


def test_models_are_listed_by_the_names_of_their_runs(browser: Any, engine: FakeEngine) -> None:
    engine.models[0] = replace(engine.models[0], name="扫描/lr=1e-3")
    with serve(engine) as url, opened(browser, url) as page:
        assert page.inner_text("#models option") == "扫描/lr=1e-3"
        assert page.input_value("#models") == "tiny"
        assert page.inner_text(".welcome h1") == "Chat with 扫描/lr=1e-3"


def test_a_tab_that_the_model_lacks_can_be_read_and_gives_the_reason(
    browser: Any, classifier: str
) -> None:
    with opened(browser, classifier) as page:
        tab = page.locator("[data-mode=chat]")
        assert tab.get_attribute("aria-disabled") == "true"
        for look in ("light", "dark"):
            page.emulate_media(color_scheme=look)
            assert tab.evaluate(CONTRAST) >= 4.5
        tab.click(force=True)  # Playwright takes it for disabled
        assert page.inner_text("#notice") == "tiny is a classifier and cannot generate text."
        assert page.is_visible("#classify-text")


def test_a_classifier_only_classifies_in_either_language(browser: Any, classifier: str) -> None:
    with opened(browser, classifier, locale="zh-CN") as page:
        page.wait_for_selector("#classify-text")
        assert page.get_attribute("[data-mode=chat]", "title") == "tiny 是分类模型，不能生成文本。"
        page.click("#language")
        title = "tiny is a classifier and cannot generate text."
        assert page.get_attribute("[data-mode=complete]", "title") == title
        page.click("text=Are we still meeting")  # an example
        page.wait_for_selector(".label")


def test_examples_begin_a_chat_and_a_text_whose_colours_have_a_legend(page: Any) -> None:
    page.click("text=What is a neural network?")
    page.wait_for_selector(".theirs .actions .icon-button")
    assert answers(page) == ["Fine."]
    page.click("[data-mode=complete]")
    assert page.locator(".swatch").count() == 0
    page.click("text=Once upon a time")
    page.wait_for_selector("#go:visible")
    assert page.input_value("#complete-text") == "Once upon a time,Fine."
    assert page.locator(".examples:visible").count() == 0
    page.wait_for_selector(".token")
    looks = page.locator(".swatch").evaluate_all(LOOKS)
    assert len({colour for colour, _ in looks}) == 4
    lines = [line.partition(" ")[0] for _, line in looks]
    assert lines == ["none", "none", "underline", "underline"]
    assert "dotted" in looks[2][1]
    assert "dotted" not in looks[3][1]


def test_while_a_model_loads_the_page_is_not_blank(browser: Any, url: str) -> None:
    with browser.new_page() as page:
        page.route("**/v1/models", lambda route: None)
        page.goto(url)
        height = "parseFloat(getComputedStyle(document.querySelector('main'), '::before').height)"
        assert page.evaluate(height) > 100
        page.unroute("**/v1/models")
