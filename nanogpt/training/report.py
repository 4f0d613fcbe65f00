"""The run's `report.html`: curves, samples, environment and command, from the run's files alone.

A section is a function from `RunFiles` to HTML, "" where the run has nothing for it.
"""

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from nanogpt.disk import write_atomically
from nanogpt.evaluation.hellaswag import PUBLISHED
from nanogpt.evaluation.results import Row, read_kept
from nanogpt.runs.directory import read_config, read_summary
from nanogpt.runs.metrics import read_metrics
from nanogpt.training.charts import Chart, Points, Series, draw
from nanogpt.training.classes import TOLD_OF_CLASSES, classes_section, share
from nanogpt.training.evaluations import evaluations_section
from nanogpt.training.page import details, document, escape, pre, section
from nanogpt.training.progress import duration, percent

MOST_SAMPLES = 24
MOST_TABLE_ROWS = 40
MOST_LOG_LINES = 200

VALIDATION_COLUMNS = ("tokens", "val/loss", "val/bits_per_byte", "val/accuracy")

# keys of the summary that the headline tells
TOLD = {"name", "stage", "steps", "tokens", "wall_s", "train_s", "tokens_per_s", "mfu", "n_params"}
TOLD |= {"val_loss", "val_bits_per_byte", "gzip_bits_per_byte", "stopped"}
TOLD |= TOLD_OF_CLASSES

LABELS = {"train_loss": "train loss, last step"}  # the curve's is smoothed

T = TypeVar("T")

logger = logging.getLogger("nanogpt")


@dataclass(frozen=True)
class RunFiles:
    """What a run directory holds; what is missing there is empty here."""

    name: str
    config_text: str
    config: dict[str, Any]
    metrics: dict[str, Points]
    samples: list[tuple[int, str]]
    summary: dict[str, Any]
    log: list[str]
    evaluations: list[Row] = field(default_factory=list)

    @classmethod
    def read(cls, run_dir: Path) -> "RunFiles":
        config = _read(read_config, run_dir / "config.yaml")
        summary = _read(read_summary, run_dir / "summary.json")
        metrics = _read(read_metrics, run_dir / "metrics.csv")
        return cls(
            name=str(summary.get("name", run_dir.resolve().name)),
            config_text=_text(run_dir / "config.yaml"),
            config=config,
            metrics={name: _finite(points) for name, points in metrics.items()},
            samples=_samples(_text(run_dir / "samples.txt")),
            summary=summary,
            log=_text(run_dir / "train.log").splitlines(),
            evaluations=read_kept(run_dir),
        )

    def figure(self, key: str, column: str | None = None) -> float | None:
        """Return a figure of the summary or, while there is none, the last of a metrics column."""
        value = self.summary.get(key)
        if value is None and self.metrics.get(column or key):
            value = self.metrics[column or key][-1][1]
        return value

    @property
    def reached(self) -> int:
        """The last step of which a figure is known."""
        return max((points[-1][0] for points in self.metrics.values() if points), default=0)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory from the files there, and return its path."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is not a directory; a report needs a run directory")
    path = run_dir / "report.html"
    run = RunFiles.read(run_dir)
    body = "\n".join(filter(None, (part(run) for part in SECTIONS)))
    write_atomically(path, document(f"{run.name} · training report", body).encode())
    return path


def is_whole(path: Path) -> bool:
    """Return whether a report is there to its end, as it was written."""
    text = _text(path)
    return text.startswith("<!doctype html>") and text.endswith("</html>\n") and "\0" not in text


def headline(run: RunFiles) -> str:
    """Tell name, stage, how far the run came, and the figures one asks for first."""
    stage = run.summary.get("stage")
    facts = [stage, _how_far(run), run.summary.get("device"), run.summary.get("precision")]
    tiles = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd>"
        + (f'<dd class="note">{escape(note)}</dd>' if note else "")
        + "</div>"
        for label, value, note in _headline_figures(run)
    )
    return f"""<header>
<h1>{escape(run.name)}</h1>
<p class="facts">{" · ".join(escape(fact) for fact in facts if fact)}</p>
<dl class="tiles">{tiles}</dl>
</header>"""


def curves(run: RunFiles) -> str:
    """Draw the curves over optimizer steps, and the validation figures as a table."""
    gzip = run.summary.get("gzip_bits_per_byte")
    reference = None if gzip is None else (f"gzip -9: {gzip:.2f}", float(gzip))

    def curve(column: str, label: str = "", **look: Any) -> Series:
        return Series(label, run.metrics.get(column, []), **look)

    loss = [
        curve("train/loss", "training, smoothed", noisy=True),
        curve("val/loss", "validation", colour=1),
    ]
    bits = [curve("val/bits_per_byte", "validation", colour=1)]
    accuracy = [curve("val/accuracy", "validation", colour=1)]
    endings = [curve("hellaswag/acc", "acc"), curve("hellaswag/acc_norm", "acc_norm", colour=1)]
    gpt2 = PUBLISHED["gpt2_124M"]["acc_norm"]
    rate, norm = [curve("learning_rate")], [curve("train/grad_norm")]
    speed = [curve("tokens_per_s")]
    mfu = [curve("mfu")] if run.figure("mfu") else []  # 0 where the device's peak is unknown
    charts = [
        Chart("Loss", "nats" if "val/accuracy" in run.metrics else "nats per token", loss),
        Chart("Bits per byte", "of validation text", bits, reference=reference),
        Chart("Accuracy", "of validation examples", accuracy, share, percent=True),
        Chart(
            "HellaSwag",
            "of the items",
            endings,
            share,
            reference=(f"GPT-2 124M, published: acc_norm {share(gpt2)}", gpt2),
            percent=True,
        ),
        Chart("Learning rate", "", rate, "{:.3g}".format, from_zero=True),
        Chart("Gradient norm", "before clipping", norm, "{:.3g}".format),
        Chart("Throughput", "tokens per second", speed, "{:,.0f}".format, from_zero=True),
        Chart("MFU", "of the device's peak", mfu, percent, from_zero=True, percent=True),
    ]
    drawn = "\n".join(filter(None, (_figure(chart, run.reached) for chart in charts)))
    if not drawn:
        return ""
    return section(
        "Curves", f'<div class="pair">{drawn}</div>{_table(run)}', "over optimizer steps"
    )


def classes(run: RunFiles) -> str:
    """Tell how a classifier does on the test examples."""
    return classes_section(run.summary)


def evaluations(run: RunFiles) -> str:
    """Show what `python -m nanogpt.evaluate` found of the run's checkpoints."""
    return evaluations_section(run.evaluations)


def samples(run: RunFiles) -> str:
    """Show what the model wrote first and last side by side, and the times between on demand."""
    if not run.samples:
        return ""
    first, between, last = run.samples[0], run.samples[1:-1], run.samples[-1]
    shown = [first, last] if len(run.samples) > 1 else [first]
    body = f'<div class="pair">{"".join(map(_sample, shown))}</div>'
    if between:
        kept = _spread(between, MOST_SAMPLES)
        title = f"{len(kept)} samples between"
        if len(kept) < len(between):
            title += f" (of {len(between)}; all are in samples.txt)"
        body += details(title, "".join(map(_sample, kept)))
    return section("Samples", body)


def reproduce(run: RunFiles) -> str:
    """Give the command that repeats this run."""
    command = str(run.config.get("command") or "python train.py")
    return section("Reproduce", pre(command, "Command"))


def environment(run: RunFiles) -> str:
    """List everything in the summary that the headline has not told."""
    rows = "".join(
        f'<tr><th scope="row">{escape(LABELS.get(key, key.replace("_", " ")))}</th>'
        f"<td>{escape(_plain(value))}</td></tr>"
        for key, value in run.summary.items()
        if key not in TOLD and value is not None
    )
    return rows and section("Environment", f'<div class="card"><table>{rows}</table></div>')


def config(run: RunFiles) -> str:
    """Fold in the resolved configuration."""
    return run.config_text and details(
        "config.yaml, resolved", pre(run.config_text, "Configuration")
    )


def log(run: RunFiles) -> str:
    """Fold in the end of the log."""
    shown = run.log[-MOST_LOG_LINES:]
    title = f"train.log, {len(run.log):,} lines"
    if len(shown) < len(run.log):
        title = f"train.log, the last {len(shown)} of {len(run.log):,} lines"
    return details(title, pre("\n".join(shown), "Log")) if shown else ""


SECTIONS: tuple[Callable[[RunFiles], str], ...] = (
    headline,
    classes,
    curves,
    evaluations,
    samples,
    reproduce,
    environment,
    config,
    log,
)


def _how_far(run: RunFiles) -> str:
    if run.summary:
        stopped = run.summary.get("stopped")
        return f"finished after {_steps(run):,} steps" + (f" ({stopped})" if stopped else "")
    total = run.config.get("max_steps")
    return f"not finished: step {run.reached:,}" + (
        f" of {total:,}" if isinstance(total, int) else ""
    )


def _steps(run: RunFiles) -> int:
    return int(run.summary.get("steps") or run.reached)


def _headline_figures(run: RunFiles) -> list[tuple[str, str, str]]:
    """Return (label, value, note) of what is known."""
    figures: list[tuple[str, str, str]] = []
    if (accuracy := run.summary.get("test_accuracy")) is not None:
        note = f"macro-F1 {share(run.summary['test_macro_f1'])}"
        figures.append(("Test accuracy", share(accuracy), note))
    if (loss := run.figure("val_loss", "val/loss")) is not None:
        figures.append(("Validation loss", f"{loss:.4f}", _best(run.metrics.get("val/loss", []))))
    if (bits := run.figure("val_bits_per_byte", "val/bits_per_byte")) is not None:
        gzip = run.summary.get("gzip_bits_per_byte")
        note = "" if gzip is None else _against(bits, float(gzip))
        figures.append(("Bits per byte", f"{bits:.4f}", note))
    if (tokens := run.figure("tokens")) is not None:
        steps = _steps(run)
        note = f"{steps:,} steps of {tokens / steps:,.0f}" if steps else ""
        figures.append(("Tokens", _count(tokens), note))
    if (wall_s := run.figure("wall_s")) is not None:
        train_s = run.summary.get("train_s")
        note = "" if train_s is None else f"{duration(train_s)} training"
        figures.append(("Time", duration(wall_s), note))
    if (speed := run.figure("tokens_per_s")) is not None:
        mfu = run.figure("mfu")
        note = f"MFU {percent(mfu)}" if mfu else ""
        figures.append(("Tokens per second", f"{speed:,.0f}", note))
    if (n_params := run.summary.get("n_params")) is not None:
        figures.append(("Parameters", _count(n_params), f"{n_params:,}"))
    return figures


def _best(points: Points) -> str:
    if not points:
        return ""
    step, value = min(points, key=lambda point: point[1])
    return "" if step == points[-1][0] else f"best {value:.4f} at step {step:,}"


def _against(bits: float, gzip: float) -> str:
    side = "below" if bits < gzip else "above"
    return f"{percent(abs(1 - bits / gzip))} {side} gzip -9 ({gzip:.2f})"


def _figure(chart: Chart, last_step: int) -> str:
    """Return a chart under its title and the last value of each curve."""
    chart = replace(chart, series=[series for series in chart.series if series.points])
    if not chart.series:
        return ""
    legend, alt = "", f"{chart.title} over optimizer steps."
    for series in chart.series:
        (first_step, first), (end_step, _) = series.points[0], series.points[-1]
        last = chart.tell(series.curve[-1][1])
        swatch = f'<i class="series-{series.colour}"></i>{series.label}' if series.label else "last"
        legend += f"<span>{swatch} <b>{last}</b></span>"
        told = f"{series.label} from {chart.tell(first)} at step {first_step:,}"
        alt += f" {told.strip().capitalize()} to {last} at step {end_step:,}."
    return f"""<figure>
<figcaption><span><strong>{chart.title}</strong> <small>{chart.note}</small></span>
<span class="legend">{legend}</span></figcaption>
{draw(chart, last_step, alt)}
</figure>"""


def _table(run: RunFiles) -> str:
    """Return the validation figures by step, for those who read numbers or cannot see curves."""
    columns = [name for name in VALIDATION_COLUMNS if name in run.metrics]
    rows = _spread(run.metrics.get("val/loss", []), MOST_TABLE_ROWS)
    if not rows:
        return ""
    values = {name: dict(run.metrics[name]) for name in columns}
    forms = {"tokens": "{:,.0f}"}
    head = "".join(
        f'<th scope="col">{re.sub("[/_]", " ", name)}</th>' for name in ("step", *columns)
    )
    body = ""
    for step, _ in rows:
        cells = [
            forms.get(name, "{:.4f}").format(values[name][step]) if step in values[name] else ""
            for name in columns
        ]
        body += f"<tr><td>{step:,}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    table = f'<div class="card"><table class="numbers"><tr>{head}</tr>{body}</table></div>'
    return details("Validation in numbers", table)


def _sample(sample: tuple[int, str]) -> str:
    step, text = sample
    title = f"Step {step:,}" if step else "Before the first step"
    return f'<div class="card"><h3>{title}</h3>{pre(text, f"Sample of step {step}")}</div>'


def _samples(text: str) -> list[tuple[int, str]]:
    """Return (step, text) by step; of a step sampled again after a resume, the later text."""
    parts = re.split(r"^=== step ([0-9]{1,18}) ===\n", text, flags=re.MULTILINE)
    by_step = dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))
    return [(step, by_step[step].strip("\n")) for step in sorted(by_step)]


def _spread(items: Sequence[T], most: int) -> list[T]:
    """Return at most so many items, evenly over the sequence, its ends included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return " · ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _finite(points: Points) -> Points:
    return [point for point in points if math.isfinite(point[1])]


def _count(number: float) -> str:
    """Return e.g. `124.4 M`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def _read(reader: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    """Return what a file of the run holds, nothing where it is missing or damaged."""
    try:
        return reader(path) if path.is_file() else {}
    except ValueError as error:
        logger.warning("the report leaves out %s: %s", path, error)
        return {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
