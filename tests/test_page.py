"""The page on the real server: the view for each model, on every screen, one origin only."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.__main__ import announce
from serving.api.pages import STATIC
from serving.api.settings import ApiSettings
from tests.engine_models import write_model
from tests.front_end import eventually
from tests.page import opened, real_server

FIELD = {"base": "#complete-text", "chat": "#chat-text", "spam": "#classify-text"}
MAX_BYTES = 106_000  # 6,000 of them for calls of tools and options of choices
FIRST_TEXTAREA = """() => [...document.querySelectorAll("textarea")]
    .find((field) => field.checkVisibility())?.id"""
NAMELESS = """() => [...document.querySelectorAll("button, a, input, select, textarea")]
    .filter((e) => e.checkVisibility())
    .filter((e) => !(e.ariaLabel || e.innerText.trim() || [...(e.labels ?? [])].length))
    .map((e) => e.outerHTML)"""
TOO_WIDE = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    runs_dir = tmp_path_factory.mktemp("runs")
    write_model(runs_dir / "base" / "last.ckpt", n_layer=1)
    write_model(runs_dir / "chat" / "last.ckpt", template="alpaca", n_layer=1)
    write_model(runs_dir / "spam" / "last.ckpt", labels=["ham", "spam"], n_layer=1)
    with real_server(runs_dir, NANOGPT_DEFAULT_MODEL="chat") as address:
        yield address


def slots_used(url: str) -> int:
    return int(httpx.get(f"{url}/v1/system_info").json()["engine"]["slots_used"])


def test_each_model_brings_its_mode_the_default_one_first(browser: Any, url: str) -> None:
    with opened(browser, url) as page:
        page.wait_for_selector("#chat-text")
        assert page.input_value("#models") == "chat"
        for name in ("spam", "base", "chat"):
            page.select_option("#models", name)
            page.wait_for_selector(FIELD[name])
            assert f"model={name}" in page.url
            page.reload()  # the address opens it, in its mode
            page.wait_for_selector(FIELD[name])
            assert page.evaluate(FIRST_TEXTAREA) == FIELD[name].removeprefix("#")


def test_a_text_is_continued_in_place(browser: Any, url: str) -> None:
    with opened(browser, url, path="/?model=base") as page:
        likeliest = '{"temperature": 0}'  # never the end of the text, of these weights
        page.evaluate(f"localStorage.setItem('nanogpt.sampling', '{likeliest}')")
        page.reload()
        page.wait_for_selector("body[data-model]", state="attached")
        page.fill("#complete-text", "def main(")
        page.press("#complete-text", "Control+Enter")
        page.wait_for_selector("#go:visible")
        text = page.input_value("#complete-text")
        assert text.startswith("def main(")
        assert len(text) > 20
        page.click("#complete-undo")
        assert page.input_value("#complete-text") == "def main("


def test_a_text_is_classified_while_it_is_written(browser: Any, url: str) -> None:
    with opened(browser, url, path="/?model=spam") as page:
        page.fill("#classify-text", "Win a prize")
        page.wait_for_selector(".label")
        body = {"model": "spam", "input": "Win a prize"}
        expected = httpx.post(f"{url}/v1/classify", json=body).json()["data"][0]
        best = page.locator(".label").first
        assert best.locator(".name").inner_text() == expected["label"]
        shown = float(best.locator(".share").inner_text().removesuffix("%")) / 100
        assert shown == pytest.approx(max(expected["probs"]), abs=0.0006)


def test_a_language_model_weighs_the_options_that_are_entered(browser: Any, url: str) -> None:
    with opened(browser, url, path="/?model=base") as page:
        page.click("[data-mode=classify]")
        page.fill("#classify-text", "The sky is")
        page.fill("#classify-options", " blue\n\n green\n red")
        page.wait_for_selector(".label")
        question = {"type": "choice", "criteria": {" blue": None, " green": None, " red": None}}
        body = {"model": "base", "state": "The sky is", "questions": {"next": question}}
        answer = httpx.post(f"{url}/v1/systemone", json=body).json()["answers"]["next"]
        expected = sorted(answer["probabilities"].items(), key=lambda item: -item[1])
        names = page.locator(".label .name").all_text_contents()
        assert names == [option for option, _ in expected]
        shown = page.locator(".label .share").all_inner_texts()
        shares = [float(share.removesuffix("%")) / 100 for share in shown]
        assert shares == pytest.approx([share for _, share in expected], abs=0.0006)
        page.fill("#classify-options", " blue")  # no choice
        page.wait_for_selector(".label", state="detached")


def test_a_phone_shows_all_of_it_the_conversations_in_a_drawer(browser: Any, url: str) -> None:
    small = {"width": 360, "height": 640}
    with opened(browser, url, path="/?model=base", viewport=small, has_touch=True) as page:
        for name in ("base", "chat"):
            page.goto(f"{url}/?model={name}")
            page.wait_for_selector(FIELD[name])
            assert page.evaluate(TOO_WIDE) is False
            page.click("#settings-button")
            assert page.evaluate(TOO_WIDE) is False
            assert page.locator("#settings").bounding_box()["x"] >= 0
        page.keyboard.press("Escape")
        assert not page.is_visible("#new-chat")
        page.click("#menu")
        page.click("#new-chat")
        page.wait_for_selector("#new-chat", state="hidden")


def test_it_follows_a_dark_system_and_a_chinese_browser_and_remembers_a_choice(
    browser: Any, url: str
) -> None:
    brightness = "parseInt(getComputedStyle(document.body).backgroundColor.slice(4))"
    with opened(browser, url, color_scheme="dark", locale="zh-CN") as page:
        assert page.evaluate(brightness) < 60
        assert page.inner_text("#new-chat") == "新对话"
        assert page.get_attribute("html", "lang") == "zh"
        page.click("#theme")  # from the system's to light
        page.click("#language")
        for _ in range(2):
            assert page.evaluate(brightness) > 200
            assert page.inner_text("#new-chat") == "New conversation"
            page.reload()


def test_everything_that_can_be_used_has_a_name(browser: Any, url: str) -> None:
    with opened(browser, url, path="/?model=chat") as page:
        page.click("#settings-button")
        assert page.evaluate(NAMELESS) == []
        page.goto(f"{url}/runs")
        assert page.evaluate(NAMELESS) == []


def test_a_chat_needs_no_mouse_stays_in_the_browser_and_leaves_no_slot_in_use(
    browser: Any, url: str
) -> None:
    with opened(browser, url) as page:
        page.keyboard.type("Hello")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector(".theirs .icon-button")
        focused = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"
        assert page.evaluate(focused) == "Message"
        page.keyboard.press("Shift+Tab")
        assert page.evaluate(focused) == "Regenerate"
        page.keyboard.press("Enter")
        page.wait_for_selector("text=2/2")
        page.reload()
        page.wait_for_selector(".theirs .icon-button")
        assert page.inner_text(".mine .bubble") == "Hello"
        names = page.evaluate("Object.keys(localStorage)")
        assert {name.partition(".chat.")[0] for name in names} <= {"nanogpt", "nanogpt.last"}
        assert page.context.cookies() == []
        page.click("#new-chat")
        page.fill("#chat-text", "Hello")
        page.press("#chat-text", "Enter")
        page.keyboard.press("Escape")  # it may have ended by then
        page.wait_for_selector(".theirs .icon-button")
        assert page.locator(".theirs .failure").count() == 0
    assert eventually(lambda: slots_used(url) == 0)


def test_it_is_small_and_nothing_in_it_is_inline(browser: Any, url: str) -> None:
    bodies: dict[str, bytes] = {}
    with browser.new_page() as page:
        page.on("response", lambda answer: bodies.setdefault(answer.url, answer.body()))
        page.goto(f"{url}/?model=chat")
        page.wait_for_selector("text=Chat with chat")
        files = {at: body for at, body in bodies.items() if "/static/" in at or "/?" in at}
    assert len(files) > 10
    assert sum(map(len, files.values())) < MAX_BYTES
    for document in ("index.html", "runs.html"):
        text = (STATIC / document).read_text(encoding="utf-8")
        assert "style=" not in text
        assert "<script>" not in text
        assert " on" not in text.replace(" one", "")


def test_its_policy_allows_its_own_files_only(url: str) -> None:
    for path in ("/", "/static/app.js", "/runs"):
        policy = httpx.get(url + path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy


def test_the_files_are_packed_for_the_way(url: str) -> None:
    answer = httpx.get(f"{url}/static/style.css", headers={"Accept-Encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.content == Path(STATIC / "style.css").read_bytes()


def test_the_address_that_is_printed_first_is_the_page_s(
    capsys: pytest.CaptureFixture[str],
) -> None:
    announce(ApiSettings(), 5001)
    first = capsys.readouterr().out.split()[0]
    assert first == "http://127.0.0.1:5001"
