"""The page of the runs in a real browser."""

import json
from pathlib import Path
from typing import Any

import pytest

from nanogpt.report.report import write_report
from serving.api.settings import ApiSettings
from tests.fake_engine import FakeEngine
from tests.front_end import serve
from tests.page import opened
from tests.test_classify import summary
from tests.test_runs import HEADER, KEY, write_run


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    rows = [f"{step},{8 * step},{4 - step / 40},{4 - step / 50},9" for step in range(1, 40)]
    done = {"stage": "pretrain", "steps": 39, "val_loss": 3.22, "name": "tiny"}
    write_report(write_run(tmp_path / "runs" / "tiny", *rows, summary=done))
    write_run(tmp_path / "runs" / "growing", "1,8,4.5,,9", "2,16,4.0,,9")
    return tmp_path / "runs"


def test_each_run_has_a_card_with_its_curves_report_and_model(
    browser: Any, url: str, runs_dir: Path
) -> None:
    with opened(browser, url, path="/runs") as page:
        card = page.locator(".run", has_text="tiny")
        card.wait_for()
        assert card.locator(".badge").inner_text() == "finished"
        assert card.locator("svg.curve path").count() == 2
        assert "validation loss 3.22" in card.locator("svg.curve").get_attribute("aria-label")
        growing = page.locator(".run", has_text="growing")
        assert "training" in growing.inner_text()
        assert "step 2 of 20" in growing.inner_text()
        text = "\n".join([HEADER, "1,8,4.5,,9", "3,24,3.5,,9", ""])
        (runs_dir / "growing" / "metrics.csv").write_text(text)
        page.wait_for_selector("text=step 3 of 20")  # drawn anew
        page.click("[aria-label='Report: tiny']")
        frame = page.frame_locator("#report iframe")
        assert frame.locator("h1").inner_text() == "tiny"
        assert page.get_attribute("#report iframe", "sandbox") == ""
        page.keyboard.press("Escape")
        page.wait_for_selector("#report", state="hidden")
        page.set_viewport_size({"width": 360, "height": 640})  # of a phone
        wide = "document.querySelector('.scroller').scrollWidth - innerWidth"
        assert page.evaluate(wide) <= 0
        page.click("text=Try it")
        page.wait_for_selector("body[data-model='tiny']", state="attached")


def test_a_report_s_scripts_do_not_run(browser: Any, url: str, runs_dir: Path) -> None:
    attack = "<script>document.title='ran'</script><img src=x onerror='document.title=`ran`'>"
    (runs_dir / "tiny" / "report.html").write_text(f"<title>still</title>{attack}")
    with browser.new_page() as page:
        page.goto(f"{url}/runs/tiny/report.html")
        page.wait_for_timeout(200)
        assert page.title() == "still"


def test_with_a_key_the_runs_and_their_reports_are_shown(
    browser: Any, engine: FakeEngine, runs_dir: Path
) -> None:
    settings = ApiSettings(runs_dir=str(runs_dir), api_keys=(KEY,))
    with serve(engine, settings) as url, opened(browser, url, path="/runs") as page:
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.click("[aria-label='Report: tiny']")
        assert page.frame_locator("#report iframe").locator("h1").inner_text() == "tiny"


def test_tables_of_a_report_scroll_on_a_phone(browser: Any, tmp_path: Path) -> None:
    mistakes = [{"label": "ham", "predicted": "spam", "probability": 0.9, "text": "word " * 30}]
    path = write_report(write_run(tmp_path / "run", summary=summary(steps=1, mistakes=mistakes)))
    with browser.new_page(viewport={"width": 360, "height": 640}) as page:
        page.goto(path.as_uri())
        page.click("summary:has-text('mistakes')")
        widths = "(e) => [e.scrollWidth > e.clientWidth, getComputedStyle(e).overflowX]"
        assert page.locator(".card:has(.wide)").last.evaluate(widths) == [True, "auto"]
        assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_a_damaged_run_has_a_card_with_the_reason(browser: Any, url: str, runs_dir: Path) -> None:
    (runs_dir / "growing" / "summary.json").write_text("[]")
    with opened(browser, url, path="/runs", locale="zh-CN") as page:
        card = page.locator(".run", has_text="growing")
        card.wait_for()
        assert card.locator(".badge").inner_text() == "已损坏"
        assert "summary.json cannot be read ([] should be a mapping)" in card.inner_text()
        assert page.locator(".run", has_text="tiny").locator(".badge").inner_text() == "已完成"


@pytest.mark.parametrize("first", [12.0, 5000.0])
def test_no_value_of_a_curve_is_cut(browser: Any, url: str, runs_dir: Path, first: float) -> None:
    text = "\n".join(
        [HEADER, f"1,8,{first},,9", *(f"{i},8,{2 + 1 / i},,9" for i in range(2, 99)), ""]
    )
    (runs_dir / "growing" / "metrics.csv").write_text(text)
    with opened(browser, url, path="/runs") as page:
        path = page.locator(".run", has_text="growing").locator("svg.curve path")
        points = [place.split() for place in path.get_attribute("d")[1:].split("L")]
        heights = [float(y) for _, y in points]
        assert 8 < heights[0] < 20
        assert heights[0] < heights[1]
        assert max(heights) < 104


def test_before_the_runs_are_known_their_place_is_marked(browser: Any, url: str) -> None:
    with browser.new_page() as page:
        page.route("**/v1/runs", lambda route: None)
        page.goto(f"{url}/runs")
        page.evaluate("document.querySelector('#runs').replaceChildren()")
        height = "parseFloat(getComputedStyle(document.querySelector('#runs'), '::before').height)"
        assert page.evaluate(height) > 100
        page.unroute("**/v1/runs")


def test_without_runs_it_shows_how_to_train_one(
    browser: Any, engine: FakeEngine, tmp_path: Path
) -> None:
    with (
        serve(engine, ApiSettings(runs_dir=str(tmp_path / "none"))) as url,
        opened(browser, url, path="/runs") as page,
    ):
        page.wait_for_selector("text=python train.py")


def test_a_sweep_has_a_leaderboard(browser: Any, url: str, runs_dir: Path) -> None:
    write_run(runs_dir / "sweep-1" / "a", "1,8,4.5,,9", summary={"stage": "pretrain", "steps": 1})
    base = {"bits_per_byte": 1.5, "tokens_per_s": 2000.0, "wall_s": 61.0}
    worse = {"bits_per_byte": 1.75, "bits_per_byte_stderr": 0.01, "difference": 0.25}
    worse |= {"difference_low": 0.2, "difference_high": 0.3}
    rows = [
        {"checkpoint": f"lr={i}", "task": "compare", "results": results, "about": {"seeds": [1]}}
        for i, results in enumerate((base, worse))
    ]
    (runs_dir / "sweep-1" / "leaderboard.json").write_text(json.dumps(rows))
    with opened(browser, url, path="/runs") as page:
        page.locator(".board td").first.wait_for()
        assert page.locator(".board h2").inner_text() == "sweep-1"
        lines = [row.inner_text().split("\t") for row in page.locator(".board tbody tr").all()]
        assert lines[0] == ["1", "lr=0", "1", "1.5000", "", "", "2,000", "61"]
        assert lines[1] == [
            "2",
            "lr=1",
            "1",
            "1.7500 ± 0.0100",
            "+0.2500",
            "+0.2000 … +0.3000",
            "",
            "",
        ]
