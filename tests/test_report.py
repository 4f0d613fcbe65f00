import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nanogpt.report.report import RunFiles, render, write_report
from nanogpt.runs.metrics import MetricsFile

SUMMARY = {
    "stage": "pretrain",
    "name": "tiny",
    "steps": 300,
    "tokens": 307_200,
    "wall_s": 80.0,
    "train_s": 62.0,
    "tokens_per_s": 5412.4,
    "mfu": 0.384,
    "val_loss": 2.25,
    "val_bits_per_byte": 1.536,
    "gzip_bits_per_byte": 1.92,
    "n_params": 4_213_248,
    "device": "cpu",
    "precision": "bf16-mixed",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run: 300 steps, logged every tenth, validated every hundredth."""
    metrics = MetricsFile(tmp_path / "metrics.csv")
    for step in range(10, 301, 10):
        loss = 2 + 500 / step**2
        metrics.append(step, {"tokens": 1024 * step, "train/loss": loss, "learning_rate": 1e-3})
        metrics.append(step, {"train/grad_norm": 0.5, "tokens_per_s": 5400.0, "mfu": 0.38})
        if step % 100 == 0:
            metrics.append(step, {"val/loss": loss + 0.25, "val/bits_per_byte": loss * 0.7})
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "config.yaml").write_text("command: python train.py seed=7\nmax_steps: 300\n")
    (tmp_path / "samples.txt").write_text(
        "".join(f"=== step {step} ===\nsampled at {step}\n" for step in (0, 100, 200, 300))
    )
    (tmp_path / "train.log").write_text("started\nfinished\n")
    return tmp_path


def html_of(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Collect (tag, attributes), and fail on tags that do not close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in {"meta"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tags(page: str) -> list[str]:
    return [tag for tag, _ in Elements(page).found]


def visible_text(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def test_headline_has_the_metrics(run_dir: Path) -> None:
    text = visible_text(html_of(run_dir))
    for value in ("2.2500", "1.5360", "20 % below gzip -9 (1.92)", "307k", "1 min 20 s"):
        assert value in text
    for value in ("5,412", "MFU 38 %", "4,213,248", "finished after 300 steps", "bf16-mixed"):
        assert value in text


def test_headline_names_why_a_run_stopped_before_its_budget(run_dir: Path) -> None:
    stopped = "EarlyStopping: val/loss did not improve"
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY | {"stopped": stopped}))
    assert f"finished after 300 steps ({stopped})" in visible_text(html_of(run_dir))


def test_every_measured_quantity_has_a_chart(run_dir: Path) -> None:
    charts = [
        attrs["aria-label"] for tag, attrs in Elements(html_of(run_dir)).found if tag == "svg"
    ]
    titles = [str(label).split(" over")[0] for label in charts]
    assert titles == [
        "Loss",
        "Bits per byte",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "MFU",
    ]


def test_unknown_mfu_is_left_out(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY | {"mfu": 0.0}))
    assert "MFU" not in visible_text(html_of(run_dir))


def test_chart_is_described_in_words(run_dir: Path) -> None:
    assert "Validation from 2.3000 at step 100 to 2.2556 at step 300." in html_of(run_dir)


def test_page_refers_to_nothing_outside(run_dir: Path) -> None:
    page = html_of(run_dir)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(tags(page))
    assert not re.search(r"https?:|url\((?!#)|@import|\bsrc=|href=\"(?!#)", page)


def test_page_forbids_loading_and_scripts(run_dir: Path) -> None:
    policy = [
        attrs["content"]
        for tag, attrs in Elements(html_of(run_dir)).found
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_ids_are_unique(run_dir: Path) -> None:
    ids = [attrs["id"] for _, attrs in Elements(html_of(run_dir)).found if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_report_depends_on_the_files_alone(run_dir: Path) -> None:
    assert html_of(run_dir) == html_of(run_dir)


def test_everything_from_the_run_is_escaped(run_dir: Path) -> None:
    evil = '<script>alert("x")</script>'
    names = {"name": evil, "stage": evil, "device": evil, evil: evil, "versions": {evil: evil}}
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY | names))
    (run_dir / "config.yaml").write_text(f"command: '{evil}'\n")
    (run_dir / "samples.txt").write_text(f"=== step 1 ===\n{evil}\n")
    (run_dir / "train.log").write_text(evil)
    page = html_of(run_dir)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8


def test_control_characters_of_a_sample_are_made_visible(run_dir: Path) -> None:
    (run_dir / "samples.txt").write_bytes(b"=== step 1 ===\na\x00b\x1bc\xff\n")
    assert "a␀b␛c�" in html_of(run_dir)


def test_first_and_last_sample_stand_side_by_side(run_dir: Path) -> None:
    page = html_of(run_dir)
    pair, folded = page[page.index(">Samples") :].split("<details>", 1)
    assert "sampled at 0" in pair
    assert "sampled at 300" in pair
    assert "2 samples between" in folded
    assert "sampled at 100" in folded


def test_sample_taken_again_after_a_resume_replaces_the_earlier(run_dir: Path) -> None:
    with (run_dir / "samples.txt").open("a") as file:
        file.write("=== step 200 ===\nsampled anew\n")
    page = html_of(run_dir)
    assert "sampled anew" in page
    assert "sampled at 200" not in page


def test_command_is_the_recorded_one(run_dir: Path) -> None:
    assert "python train.py seed=7</pre>" in html_of(run_dir)


def test_command_falls_back_to_the_plain_one(run_dir: Path) -> None:
    (run_dir / "config.yaml").unlink()
    assert "python train.py</pre>" in html_of(run_dir)


def test_the_report_of_an_interrupted_run_names_its_last_step(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    (run_dir / "config.yaml").write_text("max_steps: 1500\n")
    text = visible_text(html_of(run_dir))
    assert "not finished: step 300 of 1,500" in text
    assert "2.2556" in text


@pytest.mark.parametrize(
    "missing", ["metrics.csv", "summary.json", "config.yaml", "samples.txt", "train.log"]
)
def test_missing_file_is_left_out(run_dir: Path, missing: str) -> None:
    (run_dir / missing).unlink()
    Elements(html_of(run_dir))


def test_another_process_may_write_the_report_meanwhile(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = iter([run_dir])

    def render_slowly(run: RunFiles) -> str:
        for other in others:
            write_report(other)
        return render(run)

    monkeypatch.setattr("nanogpt.report.report.render", render_slowly)
    assert write_report(run_dir).read_text().endswith("</html>\n")
    assert not list(run_dir.glob("*.tmp"))


def test_empty_run_directory_has_a_report(tmp_path: Path) -> None:
    assert f"<h1>{tmp_path.name}</h1>" in html_of(tmp_path)


def test_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_values_that_are_not_finite_leave_the_rest_drawn(run_dir: Path) -> None:
    MetricsFile(run_dir / "metrics.csv").append(310, {"train/loss": float("nan")})
    assert "svg" in tags(html_of(run_dir))


def test_run_of_one_step_is_drawn(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.csv").append(1, {"train/loss": 7.5, "learning_rate": 0.0})
    assert tags(html_of(tmp_path)).count("svg") == 2


def test_the_training_loss_of_curve_and_table_have_different_names(run_dir: Path) -> None:
    path = run_dir / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "train_loss": 2.5}))
    text = html_of(run_dir)
    assert "training, smoothed" in text
    assert "train loss, last step" in text


def test_a_task_without_standard_errors_has_its_table_alone(run_dir: Path) -> None:
    row = {"checkpoint": "a", "task": "harness", "results": {"arc_acc": 0.5}}
    (run_dir / "evaluations.json").write_text(json.dumps([row]))
    section = html_of(run_dir).partition("Evaluations")[2].partition("<section>")[0]
    assert "there is nothing to draw" in section
    assert "<svg" not in section
    assert "arc acc</th>" in section
