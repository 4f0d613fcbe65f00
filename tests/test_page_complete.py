"""Completion in the page: what follows, how likely it was, and what else could have been there."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.engine.messages import Generate, Tokens
from tests import fake_engine
from tests.fake_engine import FakeEngine
from tests.front_end import eventually, fixed_reply, generated, serve
from tests.page import opened

LOGPROBS = {"s": math.log(0.75), "l": math.log(0.2), "o": math.log(0.02), "u": math.log(0.001)}


def likely(request: Generate, ids: list[int]) -> Tokens:
    """Return tokens with logprobs by letter, and X as the alternative of each."""
    values = [LOGPROBS.get(chr(i), -0.01) for i in ids]
    rows = [(v, [ord("X"), i], [-2.0, v]) for i, v in zip(ids, values, strict=True)]
    return Tokens(request.request_id, ids, rows)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    monkeypatch.setattr(fake_engine, "tokens", likely)
    return FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("slou"))


@pytest.fixture
def page(browser: Any, engine: FakeEngine) -> Iterator[Any]:
    with serve(engine) as url, opened(browser, url) as found:
        yield found


def go_on(page: Any) -> str:
    page.press("#complete-text", "Control+Enter")
    page.wait_for_selector("#go:visible")
    return str(page.input_value("#complete-text"))


def test_tokens_show_how_likely_they_were_up_to_a_change(page: Any) -> None:
    page.fill("#complete-text", "Once ")
    assert go_on(page) == "Once slou"
    classes = page.locator(".token").evaluate_all("found => found.map((e) => e.className)")
    assert classes == ["token sure", "token likely", "token open", "token unlikely"]
    # the likeliest tokens, under the pointer
    page.locator(".token").nth(2).hover(force=True)
    rows = page.locator(".candidate").all_inner_texts()
    assert [row.split() for row in rows] == [["X", "13.5%"], ["o", "2%"]]
    page.keyboard.press("Escape")
    assert not page.is_visible("#candidates")
    # and at the caret
    page.focus("#complete-text")
    page.keyboard.press("End")
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    assert page.locator(".candidate code").all_inner_texts() == ["s", "X"]
    page.fill("#complete-text", "Once slAu")
    assert page.locator(".token").all_inner_texts() == ["s", "l"]


def test_another_token_is_taken_and_the_text_goes_on_from_there(
    page: Any, engine: FakeEngine
) -> None:
    page.fill("#complete-text", "Once ")
    go_on(page)
    page.locator(".token").nth(1).hover(force=True)
    page.click(".candidate:has-text('X')")
    page.wait_for_selector("#go:visible")
    assert page.input_value("#complete-text") == "Once sXslou"
    assert bytes(generated(engine)[-1].prompt_ids) == b"Once sX"


def test_again_continues_the_same_text_and_undo_gives_it_back(
    page: Any, engine: FakeEngine
) -> None:
    engine.reply = fixed_reply("a😀b")
    assert go_on(page) == "a😀b"
    assert page.locator(".token").all_inner_texts() == ["a", "😀", "b"]  # in their places
    page.fill("#complete-text", "Once ")
    go_on(page)
    engine.reply = fixed_reply("more")
    page.click("#complete-again")
    page.wait_for_selector("#go:visible")
    assert page.input_value("#complete-text") == "Once more"
    page.click("#complete-undo")
    assert page.input_value("#complete-text") == "Once "


def test_stopping_keeps_the_text_so_far(page: Any, engine: FakeEngine) -> None:
    engine.reply, engine.delay_s = fixed_reply("s" * 200), 0.03
    page.press("#complete-text", "Control+Enter")
    page.wait_for_selector(".token >> nth=5")
    page.keyboard.press("Escape")
    page.wait_for_selector("#go:visible")
    assert 5 <= len(page.input_value("#complete-text")) < 200
    assert "stopped" in page.inner_text("#complete-meter")


def test_the_probabilities_of_a_text_of_one_s_own_are_shown(page: Any) -> None:
    page.fill("#complete-text", "Given")
    page.click("#score")
    page.wait_for_selector(".token")
    assert page.locator(".token").all_inner_texts() == list("iven")  # nothing is before the G
    assert page.input_value("#complete-text") == "Given"
    assert "4 tokens · 1 nats" in page.inner_text("#complete-meter")


def test_the_mirror_lies_under_the_text_to_the_pixel_and_a_reload_keeps_it(page: Any) -> None:
    page.fill("#complete-text", "A longer text of several words, " * 12 + "\n\tindented\n\n")
    sizes = page.evaluate("""() => ["mirror", "complete-text"].map((id) => {
        const { width, height } = document.getElementById(id).getBoundingClientRect();
        const { scrollHeight } = document.getElementById(id);
        return [width, height, scrollHeight];
    })""")
    assert sizes[0] == sizes[1]
    page.fill("#complete-text", "A draft")
    assert eventually(lambda: "A draft" in page.evaluate("JSON.stringify(localStorage)"))
    page.reload()
    assert page.input_value("#complete-text") == "A draft"
