"""Take a picture of every state of the page, and measure what it costs to open.

    python -m tests.page_screenshots /tmp/pictures [--url http://127.0.0.1:5001]

The pictures show an engine with the replies of this module; `--url` adds some of a running server.
Needs Playwright and Chromium, as the tests of the page do.
"""

import argparse
import math
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from nanogpt.report.report import write_report
from serving.api.settings import ApiSettings
from serving.engine.messages import Generate, Tokens
from tests import fake_engine
from tests.fake_engine import FakeEngine
from tests.front_end import fixed_reply, hang_up, serve
from tests.test_runs import write_run

ANSWER = """Here is **what I know** about it:

1. A *checkpoint* holds weights, tokenizer and template.
2. The server needs `nothing else`:
   - no network
   - no account

```python
from nanogpt import load_checkpoint

checkpoint = load_checkpoint("runs/quickstart-nano-python_stdlib")
print(checkpoint.tokenizer.encode("Grüße, 世界"))
```

| model | parameters |
|---|---|
| nano | 2.2 M |
| gpt2_small | 124 M |

> Quoted, and [a link](https://example.org). שלום עולם!
"""
STORY = "Once upon a time, there was a model that was small enough to be read in one evening."
ATTACK = "<script>alert(1)</script> ![x](https://evil.example/x.png) [y](javascript:alert(1)) "
LONG = ATTACK + "Donaudampfschifffahrtsgesellschaft" * 12
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 720}
CHAT: dict[str, Any] = {"template": "alpaca", "stage": "instruct", "step": 4}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("-dark", {"color_scheme": "dark"}),
    ("-phone", {"viewport": {"width": 390, "height": 760}}),
    ("-phone-dark", {"viewport": {"width": 390, "height": 760}, "color_scheme": "dark"}),
]


class Pictures:
    """A browser, and the directory that its pictures go to."""

    def __init__(self, browser: Any, out: Path) -> None:
        self.browser, self.out = browser, out
        self.work = Path(tempfile.mkdtemp())
        self.count = 0

    def take(self, page: Any, name: str) -> None:
        self.count += 1
        page.wait_for_timeout(250)  # transitions
        page.screenshot(path=self.out / f"{self.count:02d}-{name}.png")

    @contextmanager
    def page(
        self, settings: ApiSettings | None = None, path: str = "/", **options: Any
    ) -> Iterator[tuple[Any, FakeEngine]]:
        """Give the page before an engine of its own; options are the engine's and the browser's."""
        look = {"viewport": options.pop("viewport", DESK), "locale": options.pop("locale", "en-US")}
        look["color_scheme"] = options.pop("color_scheme", "light")
        engine = FakeEngine(f"unix:{self.work}/{self.count}-{len(options)}", **options)
        with serve(engine, settings) as url, self.browser.new_page(**look) as page:
            page.goto(url + path)
            if path == "/" and not (settings and settings.api_keys) and engine.models:
                page.wait_for_selector("body[data-model]", state="attached")
            yield page, engine


def send(page: Any, text: str, *, wait: bool = True) -> None:
    page.fill("#chat-text", text)
    page.press("#chat-text", "Enter")
    if wait:
        page.wait_for_selector("#send:visible")


def chat(pictures: Pictures) -> None:
    """An empty chat, an answer on its way and complete, settings, editing, versions."""
    with pictures.page(reply=fixed_reply(ANSWER), delay_s=0.01, **CHAT) as (page, _):
        pictures.take(page, "chat-empty")
        page.click("#settings-button")
        page.fill("#sampling-max_tokens", "2000")
        page.fill("#system-prompt", "Be brief.")
        pictures.take(page, "chat-settings")
        page.keyboard.press("Escape")
        send(page, "What is in a checkpoint?", wait=False)
        page.wait_for_selector(".theirs ol")
        pictures.take(page, "chat-streaming")
        page.keyboard.press("Escape")
        page.wait_for_selector("#send:visible")
        pictures.take(page, "chat-stopped")
        page.click("[aria-label='Regenerate']")
        page.wait_for_selector("#send:visible", timeout=60_000)
        pictures.take(page, "chat-answer")
        page.locator(".mine").hover()
        page.click("[aria-label='Edit and send again']")
        pictures.take(page, "chat-editing")


def looks(pictures: Pictures) -> None:
    """The same on a phone, in the dark, in Chinese, and with text that attacks or overflows."""
    variants: list[tuple[str, dict[str, Any]]] = [
        ("dark", {"color_scheme": "dark"}),
        ("chinese", {"locale": "zh-CN"}),
        ("phone", {"viewport": PHONE}),
        ("phone-dark-chinese", {"viewport": PHONE, "color_scheme": "dark", "locale": "zh-CN"}),
    ]
    for name, options in variants:
        with pictures.page(reply=fixed_reply(ANSWER), **CHAT, **options) as (page, _):
            page.evaluate("localStorage.setItem('nanogpt.sampling', '{\"max_tokens\": 2000}')")
            page.reload()
            page.wait_for_selector("body[data-model]", state="attached")
            send(page, "What is in a checkpoint? 检查点里有什么？")
            pictures.take(page, f"chat-{name}")
            if "viewport" in options:
                page.click("#menu")
                pictures.take(page, f"menu-{name}")
                page.click("#menu")
                page.click("#settings-button")
                pictures.take(page, f"settings-{name}")
    for name, view in (("attack", DESK), ("attack-phone", PHONE)):
        with pictures.page(reply=fixed_reply(LONG), viewport=view, **CHAT) as (page, _):
            page.evaluate("localStorage.setItem('nanogpt.sampling', '{\"max_tokens\": 2000}')")
            page.reload()
            page.wait_for_selector("body[data-model]", state="attached")
            send(page, LONG)
            pictures.take(page, name)


def failures(pictures: Pictures) -> None:
    """Failures, and states in which something is not yet known."""
    for name, view in (("", DESK), ("-phone", PHONE)):
        with pictures.page(path="/?model=gone", viewport=view) as (page, _):
            page.wait_for_selector("#banner:visible")
            pictures.take(page, f"unknown-model{name}")
        with pictures.page(path="/?loading", viewport=view, color_scheme="dark") as (page, _):
            page.route("**/v1/models", lambda route: None)
            page.reload()
            pictures.take(page, f"loading{name}")
            page.unroute("**/v1/models")
    with pictures.page(ApiSettings(api_keys=("k",)), **CHAT) as (page, _):
        page.wait_for_selector("#key-dialog[open]")
        pictures.take(page, "key")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-wrong")
        pictures.take(page, "key-wrong")
    with pictures.page(failure=("overloaded", "The queue is full."), **CHAT) as (page, _):
        send(page, "Hello")
        pictures.take(page, "busy")
    with pictures.page(reply=fixed_reply(STORY), block_size=256, **CHAT) as (page, _):
        for text in ("Write a story.", "Another one, please, and a longer one this time."):
            send(page, text)
        pictures.take(page, "context-full")
        page.click("text=Continue without")
        page.wait_for_selector("#send:visible")
        pictures.take(page, "context-forgotten")
    with pictures.page(reply=fixed_reply("abc " * 90), delay_s=0.02, **CHAT) as (page, engine):
        send(page, "Hello", wait=False)
        page.wait_for_selector(".theirs :text('abc')")
        hang_up(engine)
        page.wait_for_selector(".theirs .failure")
        pictures.take(page, "engine-died")
        page.context.set_offline(True)
        send(page, "Are you there?")
        page.evaluate("dispatchEvent(new Event('online'))")
        page.wait_for_selector("#banner:visible")
        pictures.take(page, "server-gone")
        page.context.set_offline(False)
        page.wait_for_selector("#notice:visible")
        pictures.take(page, "server-back")


def complete(pictures: Pictures) -> None:
    """A text that is continued, its probabilities, another token."""
    for name, options in VARIANTS:
        with pictures.page(reply=fixed_reply(STORY[5:]), **options) as (page, _):
            pictures.take(page, f"complete-empty{name}")
            page.fill("#complete-text", STORY[:5])
            page.click("#go")
            page.wait_for_selector("#go:visible")
            pictures.take(page, f"complete{name}")
            page.locator(".token").nth(30).hover(force=True)
            pictures.take(page, f"complete-candidates{name}")


def classify(pictures: Pictures) -> None:
    """Labels with bars."""
    labels = ["ham", "spam", "调查", "a rather long label of a class"]
    for name, view in (("", DESK), ("-phone", PHONE)):
        with pictures.page(labels=labels, stage="classify", viewport=view) as (page, _):
            pictures.take(page, f"classify-empty{name}")
            page.click("[data-mode=chat]", force=True)
            page.wait_for_selector("#notice:visible")
            pictures.take(page, f"classify-reason{name}")
            page.fill("#classify-text", "WINNER!! You have won a free prize.")
            page.wait_for_selector(".label")
            pictures.take(page, f"classify{name}")


def choice(pictures: Pictures) -> None:
    """The options of a language model with their probabilities."""
    for name, options in VARIANTS:
        with pictures.page(**options) as (page, _):
            page.click("[data-mode=classify]")
            pictures.take(page, f"choice-empty{name}")
            page.click(".examples:visible button >> nth=0")
            page.fill("#classify-options", " blue\n green\nred\n a rather long option of a model")
            page.wait_for_selector(".label >> nth=3")
            pictures.take(page, f"choice{name}")


def tools(pictures: Pictures) -> None:
    """A call as it streams, the field for its result, and the answer after that."""
    for name, options in VARIANTS:
        with pictures.page(reply=called, delay_s=0.05, **CHAT, **options) as (page, _):
            page.click("#settings-button")
            pictures.take(page, f"tools-empty{name}")
            page.click("text=Insert an example")
            pictures.take(page, f"tools{name}")
            page.click("#settings-button")
            send(page, "What is the weather in Oslo?", wait=False)
            page.wait_for_selector(".theirs .code:has-text('Oslo')")
            pictures.take(page, f"call-streaming{name}")
            page.wait_for_selector("#send:visible")
            pictures.take(page, f"call{name}")
            page.click("#edit-cancel")
            pictures.take(page, f"call-message{name}")
            page.click("#edit-cancel")
            page.fill("#chat-text", '{"sky": "clear", "celsius": -3}')
            pictures.take(page, f"call-result{name}")
            page.press("#chat-text", "Enter")
            page.wait_for_selector("#send:visible")
            pictures.take(page, f"call-answered{name}")


def runs(pictures: Pictures) -> None:
    """The runs and a report."""
    runs_dir = pictures.work / "runs"
    rows = [
        f"{step},{8 * step},{3 + 4 / step + 0.3 * math.sin(step * 7)},"
        f"{3.1 + 4 / step if step % 20 == 0 else ''},9000"
        for step in range(1, 400)
    ]
    done = {"stage": "pretrain", "steps": 399, "val_loss": 3.11, "name": "tiny"}
    write_report(write_run(runs_dir / "tiny", *rows, summary={**done, "val_bits_per_byte": 1.46}))
    write_run(runs_dir / "sweep/learning_rate=1e-3", *rows[:12])
    (write_run(runs_dir / "damaged", *rows[:50]) / "summary.json").write_text("[]")
    settings = ApiSettings(runs_dir=str(runs_dir))
    for name, options in (("", {}), ("-phone-dark", {"viewport": PHONE, "color_scheme": "dark"})):
        with pictures.page(settings, path="/runs", **options) as (page, _):
            page.wait_for_selector(".run")
            pictures.take(page, f"runs{name}")
            page.click("[aria-label='Report: tiny']")
            page.frame_locator("#report iframe").locator("h1").wait_for()
            pictures.take(page, f"report{name}")


def of_server(pictures: Pictures, url: str) -> None:
    """What a running server's own models do in it."""
    with pictures.browser.new_page(viewport=DESK, locale="en-US") as page:
        page.goto(url)
        page.wait_for_selector("body[data-model]", state="attached")
        for name in page.locator("#models option").all_inner_texts():
            page.select_option("#models", name)
            page.wait_for_selector(f"body[data-model='{name}']", state="attached")
            if page.is_visible("#chat-text"):
                send(page, "Name three primary colors.")
            elif page.is_visible("#complete-text"):
                page.fill("#complete-text", "def main(")
                page.click("#go")
                page.wait_for_selector("#go:visible")
            else:
                page.fill("#classify-text", "WINNER!! Call 09061701461 to claim your prize.")
                page.wait_for_selector(".label")
            pictures.take(page, f"own-{name}")


def costs(pictures: Pictures, rounds: int = 7) -> None:
    """Print what the page weighs, and how long it takes until something is seen."""
    paint = """() => Object.fromEntries(performance.getEntriesByType("paint")
        .map((entry) => [entry.name, entry.startTime]))"""
    sizes = """() => performance.getEntriesByType("resource")
        .concat(performance.getEntriesByType("navigation"))
        .filter((e) => !e.name.includes("/v1/") && !e.name.includes("/health"))
        .map((e) => [e.decodedBodySize, e.transferSize])"""
    first: list[float] = []
    with serve(FakeEngine(f"unix:{pictures.work}/cost", **CHAT)) as url:
        for _ in range(rounds):
            with pictures.browser.new_page() as page:
                page.goto(url)
                page.wait_for_selector("body[data-model]", state="attached")
                page.wait_for_timeout(100)
                first.append(page.evaluate(paint)["first-contentful-paint"])
                weights = page.evaluate(sizes)
    whole, sent = (sum(column) for column in zip(*weights, strict=True))
    print(f"the page: {len(weights)} files, {whole:,} bytes, {sent:,} over the wire")
    print(f"first paint: median {statistics.median(first):.0f} ms, worst {max(first):.0f} ms")


def called(request: Generate) -> list[int]:
    """Answer with a call where one is forced, else with a text."""
    place = '{"place": {"city": "Oslo", "country": "Norway"}, "days": [1, 2, 3], "unit": "celsius"}'
    call = f'{{"name": "get_weather", "arguments": {place}'
    return list((call if request.params.grammar else "It is clear and **-3 °C**.").encode())


def likely(request: Generate, ids: list[int]) -> Tokens:
    """Return tokens of varied probabilities, with others that could stand in their places."""
    values = [-0.05 - 5 * abs(math.sin(7 * i)) ** 3 for i in ids]
    others = [ord("a"), ord("e"), ord(" "), ord("\n"), 0xE2]
    ranked = [-1.5, -2.2, -3.0, -3.5, -4.5]
    rows = zip(ids, values, strict=True)
    return Tokens(request.request_id, ids, [(v, [i, *others], [v, *ranked]) for i, v in rows])


STATES: list[Callable[[Pictures], None]] = [
    *(chat, looks, failures, complete, classify, choice, tools, runs, costs),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--url", help="of a running server without keys")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    fake_engine.tokens = likely
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        pictures = Pictures(chromium, arguments.out)
        for state in STATES:
            state(pictures)
        if arguments.url:
            of_server(pictures, arguments.url)
        chromium.close()
    print(f"{pictures.count} pictures in {arguments.out}")


if __name__ == "__main__":
    main()
