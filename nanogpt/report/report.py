"""The run's `report.html`, from the run's files alone.

Functions here return the values that `template.html` lays out; it escapes all of them.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nanogpt.disk import replacing
from nanogpt.evaluation.results import Row, cells, lines, read_evaluations, reduced_confusion
from nanogpt.report import figures
from nanogpt.report.figures import Chart, Points, Series
from nanogpt.runs.directory import RunDirectory, read_config, read_samples, read_summary
from nanogpt.runs.log import visible
from nanogpt.runs.metrics import read_metrics
from nanogpt.text import format_duration, format_number, format_percent

MAX_SAMPLES = 24
MAX_LOG_LINES = 200

METHODS = {
    "": "this model",
    "baseline_bag_of_words_": "bag of words",
    "baseline_majority_": "majority",
}
TESTS = {"test": "test", "imbalanced": "imbalanced test"}
SCORES = {"accuracy": "accuracy", "macro_f1": "macro-F1"}

# keys of the summary that the tiles, the curves and the section on classes show
SHOWN_KEYS = {"name", "stage", "steps", "tokens", "wall_s", "train_s", "tokens_per_s", "mfu"}
SHOWN_KEYS |= {"n_params", "val_loss", "val_bits_per_byte", "gzip_bits_per_byte", "stopped"}
SHOWN_KEYS |= {"labels", "confusion", "mistakes"}
SHOWN_KEYS |= {f"{m}{test}_{score}" for m in METHODS for test in TESTS for score in SCORES}
ENVIRONMENT_KEYS = ("device", "n_ranks", "precision", "weights_sha256", "git", "versions")
LABELS = {"train_loss": "train loss, last step"}  # the curve's is smoothed

T = TypeVar("T")

log = logging.getLogger("nanogpt")


class RunFiles:
    """The contents of a run directory, empty for missing and damaged files."""

    def __init__(self, run_dir: Path) -> None:
        files = RunDirectory(run_dir)
        self.summary: dict[str, Any] = _read(read_summary, files.summary_path, {})
        self.name = str(self.summary.get("name", run_dir.resolve().name))
        self.config_text = _read(_text, files.config_path, "")
        self.config: dict[str, Any] = _read(read_config, files.config_path, {})
        metrics: dict[str, Points] = _read(read_metrics, files.metrics_path, {})
        self.metrics = {
            name: [point for point in points if math.isfinite(point[1])]
            for name, points in metrics.items()
        }
        self.samples: list[tuple[int, str]] = _read(read_samples, files.samples_path, [])
        self.log = _read(_text, files.log_path, "").splitlines()
        self.evaluations = read_evaluations(run_dir)

    def value(self, name: str) -> float | None:
        """Return a metric of the summary or, for an unfinished run, its last one."""
        value = self.summary.get(name.replace("/", "_"))
        return self.metrics[name][-1][1] if value is None and self.metrics.get(name) else value

    @property
    def last_step(self) -> int:
        """The last step of any metric."""
        return max((points[-1][0] for points in self.metrics.values() if points), default=0)

    @property
    def steps(self) -> int:
        """The steps of a finished run, else the last logged one."""
        return int(self.summary.get("steps") or self.last_step)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory from the files there, and return its path.

    Raises OSError where it cannot be written.
    """
    path, content = RunDirectory(run_dir).report_path, render(RunFiles(run_dir))
    with replacing(path, "w") as file:
        file.write(content)
    return path


def render(run: RunFiles) -> str:
    """Return the report as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if hasattr(value, "__html__") else visible(str(value)),
    )
    summary, ends = run.summary, sorted({0, len(run.samples) - 1})
    facts = [summary.get("stage"), progress(run), summary.get("device"), summary.get("precision")]
    others = {k: v for k, v in summary.items() if k not in SHOWN_KEYS and v is not None}
    return environment.get_template("template.html").render(
        run=run,
        style=figures.STYLESHEET.read_text(encoding="utf-8"),
        facts=" · ".join(str(fact) for fact in facts if fact),
        tiles=tiles(run),
        classes=classes(summary),
        charts=[(chart, figures.draw_curves(chart, run.last_step)) for chart in curves(run)],
        tasks=tasks(run.evaluations),
        ends=[run.samples[i] for i in ends if run.samples],
        between=spread(run.samples[1:-1], MAX_SAMPLES),
        results=[(_label(k), _plain(v)) for k, v in others.items() if k not in ENVIRONMENT_KEYS],
        environment=[(_label(k), _plain(others[k])) for k in ENVIRONMENT_KEYS if k in others],
        log=run.log[-MAX_LOG_LINES:],
    )


def progress(run: RunFiles) -> str:
    """Return how many steps were taken, and why a run stopped before its budget."""
    if run.summary:
        stopped = run.summary.get("stopped")
        return f"finished after {run.steps:,} steps" + (f" ({stopped})" if stopped else "")
    total = run.config.get("max_steps")
    of_total = f" of {total:,}" if isinstance(total, int) else ""
    return f"not finished: step {run.last_step:,}{of_total}"


def tiles(run: RunFiles) -> list[tuple[str, str, str]]:
    """Return label, value and note of the main results."""

    def shown(name: str, form: Callable[[float], str], text: str = "{}") -> str:
        value = run.value(name)
        return "" if value is None else text.format(form(value))

    decimals, whole = "{:.4f}".format, "{:,.0f}".format
    bits, gzip = run.value("val/bits_per_byte"), run.value("gzip_bits_per_byte")
    best = against_gzip = per_step = ""
    if points := run.metrics.get("val/loss"):
        step, least = min(points, key=lambda point: point[1])
        best = f"best {least:.4f} at step {step:,}" if step != points[-1][0] else ""
    if bits is not None and gzip is not None:
        side = "below" if bits < gzip else "above"
        against_gzip = f"{format_percent(abs(1 - bits / gzip))} {side} gzip -9 ({gzip:.2f})"
    if run.steps:
        per_step = shown("tokens", lambda n: f"{run.steps:,} steps of {n / run.steps:,.0f}")
    mfu = shown("mfu", format_percent, "MFU {}") if run.value("mfu") else ""
    macro_f1 = shown("test_macro_f1", _percent, "macro-F1 {}")
    training = shown("train_s", format_duration, "{} training")
    found = [
        ("Test accuracy", shown("test_accuracy", _percent), macro_f1),
        ("Validation loss", shown("val/loss", decimals), best),
        ("Bits per byte", shown("val/bits_per_byte", decimals), against_gzip),
        ("Tokens", shown("tokens", format_number), per_step),
        ("Time", shown("wall_s", format_duration), training),
        ("Tokens per second", shown("tokens_per_s", whole), mfu),
        ("Parameters", shown("n_params", format_number), shown("n_params", whole)),
    ]
    return [tile for tile in found if tile[1]]


def curves(run: RunFiles) -> list[Chart]:
    """Return the charts that the run has points for."""

    def curve(column: str, label: str = "", **look: Any) -> list[Series]:
        points = run.metrics.get(column)
        return [Series(label, points, **look)] if points else []

    train = curve("train/loss", "training, smoothed", noisy=True)
    val = curve("val/loss", "validation", colour=1)
    accuracy = curve("val/accuracy", "validation", colour=1)
    endings = curve("hellaswag/acc", "acc") + curve("hellaswag/acc_norm", "acc_norm", colour=1)
    bits = curve("val/bits_per_byte", "validation", colour=1)
    rate, norm, speed = map(curve, ("learning_rate", "train/grad_norm", "tokens_per_s"))
    mfu = curve("mfu") if run.value("mfu") else []  # 0 for an unknown device
    losses = [Chart("Loss", "nats per token", train + val)]
    if accuracy:  # what a classifier is trained on is another quantity
        losses = [
            Chart("Training loss", "of classes and next tokens", train),
            Chart("Validation loss", "nats per example", val),
        ]
    gzip, against_gpt2 = run.summary.get("gzip_bits_per_byte"), None
    against_gzip = None if gzip is None else (f"gzip -9: {gzip:.2f}", float(gzip))
    if endings:
        from nanogpt.evaluation.hellaswag import PUBLISHED  # with torch

        gpt2 = PUBLISHED["gpt2_124M"]["acc_norm"]
        against_gpt2 = (f"GPT-2 124M, published: acc_norm {_percent(gpt2)}", gpt2)
    charts = [
        *losses,
        Chart("Bits per byte", "of validation text", bits, reference=against_gzip),
        Chart("Accuracy", "of validation examples", accuracy, _percent, percent=True),
        Chart("HellaSwag", "of the items", endings, _percent, against_gpt2, percent=True),
        Chart("Learning rate", "", rate, "{:.3g}".format, from_zero=True),
        Chart("Gradient norm", "before clipping", norm, "{:.3g}".format),
        Chart("Throughput", "tokens per second", speed, "{:,.0f}".format, from_zero=True),
        Chart("MFU", "of the device's peak", mfu, format_percent, from_zero=True, percent=True),
    ]
    return [chart for chart in charts if chart.series]


def classes(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a classifier's scores, confusion and mistakes, None for a language model."""
    if "confusion" not in summary:
        return None
    labels, confusion = reduced_confusion(summary["labels"], np.array(summary["confusion"]))
    shares = confusion / confusion.sum(1, keepdims=True).clip(1)
    scores = [
        [f"{title} {name}", *(_percent(summary[f"{m}{test}_{score}"]) for m in METHODS)]
        for test, title in TESTS.items()
        if f"{test}_accuracy" in summary
        for score, name in SCORES.items()
    ]
    return {
        "n_examples": f"{confusion.sum():,}",
        "scores": [["", *METHODS.values()], *scores],
        "labels": labels,
        "confusion": list(zip(labels, confusion.tolist(), shares.tolist(), strict=True)),
        "mistakes": [
            [m["label"], m["predicted"], _percent(m["probability"]), m["text"]]
            for m in summary["mistakes"]
        ],
    }


def tasks(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return each evaluated task with its figures and its table, the header first."""
    found = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = lines([{**r, "checkpoint": _subject(r)} for r in rows if r["task"] == task])
        svgs = [figures.draw_scores(of_task, [name]) for name in figures.drawn_metrics(of_task)]
        header, *table = cells(of_task)
        found.append((task, svgs, [[name.replace("_", " ") for name in header], *table]))
    return found


def _subject(row: Row) -> str:
    """Return at which step, and on what, a row was measured."""
    about = dict(row.get("about") or {})
    step, data, limit = (about.pop(key, None) for key in ("step", "data", "limit"))
    parts = [f"step {step:,}" if isinstance(step, int) else "", Path(str(data or "")).stem]
    parts += [f"first {limit}" if limit else ""]
    parts += [f"{key.replace('_', ' ')} {value}" for key, value in about.items()]
    return ", ".join(filter(None, parts)) or str(row["checkpoint"])


def spread(items: Sequence[T], most: int) -> list[T]:
    """Return at most so many items, evenly over the sequence, its ends included."""
    n = min(most, len(items))
    return [items[round(i * (len(items) - 1) / max(n - 1, 1))] for i in range(n)]


def _label(key: str) -> str:
    return LABELS.get(key, key.replace("_", " "))


def _percent(share: float) -> str:
    """Return e.g. `97.5 %`: classifiers differ in that decimal."""
    return f"{100 * share:.1f} %"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return " · ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _read(reader: Callable[[Path], T], path: Path, default: T) -> T:
    """Return a file's content, the default where it is missing or damaged."""
    try:
        return reader(path) if path.is_file() else default
    except ValueError as error:
        log.warning("the report leaves out %s: %s", path, error)
        return default


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
