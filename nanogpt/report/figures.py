"""Figures as SVG in the fonts and colours of the page around them: curves and scores."""

import html
import io
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from nanogpt.evaluation.results import Line, Row, format_metric
from nanogpt.runs.log import visible
from nanogpt.text import format_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

Points = list[tuple[int, float]]  # (step, value)

STYLESHEET = Path(__file__).parent / "style.css"
WIDTH = 400  # of the view box: text stays legible in a phone's narrow column
CURVE_HEIGHT = 208
MANY_POINTS = 600  # of a curve, whose line is then thin
N_SERIES = 6  # colours
MAX_NAME_CHARS = 44  # of a checkpoint

# colours that matplotlib draws with, for CSS variables of the page, which replace them
VARIABLES = ["ink", "muted", "grid", "reference", "accent", "card"]
VARIABLES += [f"series-{i}" for i in range(N_SERIES)]
_COLOURS = {name: f"#0000{i:02x}" for i, name in enumerate(VARIABLES, start=1)}
_STYLE = {
    "svg.fonttype": "none",
    "path.simplify_threshold": 0.5,  # of a point: the curves of long runs stay small
    "text.parse_math": False,
    "font.size": 10.5,
    "axes.edgecolor": _COLOURS["grid"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.ymargin": 0.07,
    "grid.color": _COLOURS["grid"],
    "grid.linewidth": 1,
    "text.color": _COLOURS["ink"],
    **{f"{axis}tick.color": _COLOURS["muted"] for axis in "xy"},
    **{f"{axis}tick.{which}.size": 0 for axis in "xy" for which in ("major", "minor")},
    **{f"{axis}tick.major.pad": 5 for axis in "xy"},
}

# titles of metrics, in the order of their panels; other metrics follow, under their own names,
# where they have a standard error
METRICS = {
    "acc": "accuracy",
    "acc_norm": "accuracy, normalised by length",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "loss": "loss, nats per token",
    "bits_per_byte": "bits per byte",
    "terminated": "replies that end by themselves",
}


@dataclass(frozen=True)
class Series:
    """A curve in the page's colour 0 or 1; a noisy one lies faintly below its moving average."""

    label: str
    points: Points
    colour: int = 0
    noisy: bool = False

    @property
    def curve(self) -> Points:
        return smooth(self.points) if self.noisy else self.points


@dataclass(frozen=True)
class Chart:
    """Curves over optimizer steps in one frame; `reference` is a labelled horizontal line."""

    title: str
    note: str
    series: Sequence[Series]
    format: Callable[[float], str] = "{:.4f}".format
    reference: tuple[str, float] | None = None
    from_zero: bool = False
    percent: bool = False

    @property
    def legend(self) -> list[tuple[Series, str]]:
        """The curves, each with its last value."""
        return [(series, self.format(series.curve[-1][1])) for series in self.series]

    @property
    def alt(self) -> str:
        """The curves in words."""
        text = f"{self.title} over optimizer steps."
        for series, last in self.legend:
            first_step, first = series.points[0]
            ends = f"from {self.format(first)} at step {first_step:,} to {last}"
            text += f" {f'{series.label} {ends}'.strip().capitalize()}"
            text += f" at step {series.points[-1][0]:,}."
        return text


def draw_curves(chart: Chart, last_step: int) -> str:
    """Return a chart from step 0 to `last_step` as an `<svg>`.

    The vertical axis holds every value; it is logarithmic where the greatest is more than 30 times
    the median.
    """
    return _draw(CURVE_HEIGHT, chart.alt, partial(_paint_curves, chart, last_step))


def draw_scores(lines: Sequence[Line], metrics: Sequence[str]) -> str:
    """Return a panel for each metric as an `<svg>`, with a row for each line that has it.

    A checkpoint is a dot with a bar of one standard error, a baseline or a published score a ring.
    """
    panels = {name: [line for line in lines if name in line.metrics] for name in metrics}
    alt = "; ".join(
        f"{metric_title(name)}: "
        + ", ".join(f"{line.who} {format_metric(*line.metrics[name])}" for line in panel)
        for name, panel in panels.items()
    )
    height = sum(34 + 34 * len(panel) for panel in panels.values())
    return _draw(height, alt, partial(_paint_scores, panels))


def draw_comparison(curves: Mapping[str, np.ndarray], rows: Sequence[Row]) -> str:
    """Return curves (N, 3) of tokens, seconds and bits per byte, and differences, as an `<svg>`.

    The curves are by label, at most as many as there are colours; `rows` are those of a comparison.
    """
    title = "difference in bits per byte, interval of 95 %"
    lines = [Line(rows[0]["checkpoint"], "", {title: (0.0, None)}, is_baseline=True)]
    for row in rows[1:]:
        value = row["results"]["difference"]
        half = value - row["results"].get("difference_low", value)
        lines.append(Line(row["checkpoint"], "", {title: (value, half)}))

    def paint(figure: "Figure") -> None:
        ratios = [CURVE_HEIGHT, CURVE_HEIGHT, height - 2 * CURVE_HEIGHT]
        frames: Any = figure.subfigures(3, 1, height_ratios=ratios)
        for i, name in enumerate(("tokens", "seconds")):
            drawn = enumerate(list(curves.items())[:N_SERIES])
            series = [Series(k, c[:, [i, 2]].tolist(), n) for n, (k, c) in drawn]
            last = max(float(curve[-1, i]) for curve in curves.values())
            _paint_curves(Chart(f"bits per byte over {name}", "", series), last, frames[i])
            frames[i].text(0, 0.99, f"bits per byte over {name}", va="top", weight="semibold")
            frames[i].axes[0].legend(frameon=False, fontsize=9)
        _paint_scores({title: lines}, frames[2])

    height = 2 * CURVE_HEIGHT + 34 + 34 * len(lines)
    alt = f"Bits per byte over tokens and seconds of {', '.join(curves)}; {title}: "
    alt += ", ".join(f"{line.who} {format_metric(*line.metrics[title])}" for line in lines)
    return _draw(height, alt, paint)


def draw_frontier(x: Any, y: Any, spans: Any, curves: Sequence[Any], end: Sequence[float]) -> str:
    """Return the losses (R,) of runs over FLOPs as an `<svg>`, with curves (P,), the lowest last.

    The prediction `end` is a loss and its interval, at the last of the FLOPs of the curves.
    """
    value, low, high = end
    alt = f"Losses of {len(x)} runs over FLOPs, and {value:.4f} predicted at {spans[-1]:.3g} FLOPs."

    def paint(figure: "Figure") -> None:
        frame = (46 / WIDTH, 34 / CURVE_HEIGHT, 1 - 58 / WIDTH, 1 - 44 / CURVE_HEIGHT)
        axes = figure.add_axes(
            frame, xscale="log", xlabel="FLOPs", ylim=(low * 0.95, max(y) * 1.05)
        )
        axes.plot(spans, np.transpose(curves[:-1]), color=_COLOURS["reference"], linewidth=0.8)
        axes.plot(spans, curves[-1], color=_COLOURS["series-0"], linewidth=1.7)
        axes.plot(x, y, "o", color=_COLOURS["series-0"], markersize=4)
        interval = [[value - low], [high - value]]
        axes.errorbar(spans[-1], value, interval, fmt="o", color=_COLOURS["series-1"])
        axes.xaxis.set_major_formatter(lambda flops, _: f"{flops:.0e}")
        axes.grid(axis="y")

    return _draw(CURVE_HEIGHT, alt, paint)


def drawn_metrics(lines: Sequence[Line]) -> list[str]:
    """Return the metrics that are drawn: the known ones, then others with a standard error."""
    found = [(name, error) for line in lines for name, (_, error) in line.metrics.items()]
    names = {name for name, _ in found}
    uncertain = [name for name, error in found if error is not None]
    return list(dict.fromkeys([*(name for name in METRICS if name in names), *uncertain]))


def metric_title(name: str) -> str:
    """Return the title of a metric's panel."""
    return METRICS.get(name, name.replace("_", " "))


def standalone(svg: str) -> str:
    """Return an `<svg>` as a document of its own, with the stylesheet of the page."""
    style = f"<style>{STYLESHEET.read_text(encoding='utf-8')}</style>"
    return svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1).replace(
        ">", f">{style}", 1
    )


def smooth(points: Points) -> Points:
    """Return the centred moving average, taken twice, over about a thirtieth of the points."""
    values = np.array([value for _, value in points])
    window = np.ones(1 + 2 * min(-(-len(points) // 60), (len(points) - 1) // 2))
    for _ in range(2):
        sums = np.convolve(values, window, "same")
        values = sums / np.convolve(np.ones(len(points)), window, "same")
    return [(step, float(value)) for (step, _), value in zip(points, values, strict=True)]


def _paint_curves(chart: Chart, last_step: float, figure: "Figure | SubFigure") -> None:
    axes = figure.add_axes(
        (46 / WIDTH, 24 / CURVE_HEIGHT, 1 - 58 / WIDTH, 1 - 34 / CURVE_HEIGHT),
        xlim=(0, max(last_step, 1) * 1.01),
    )
    if chart.reference is not None:
        label, value = chart.reference
        axes.axhline(value, color=_COLOURS["reference"], linewidth=1.2, dashes=(4, 3))
        where: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right"}
        axes.text(1, value, label, **where, va="bottom", color=_COLOURS["reference"])
    for series in chart.series:
        colour, is_long = _COLOURS[f"series-{series.colour}"], len(series.points) > MANY_POINTS
        if series.noisy:
            axes.plot(*zip(*series.points, strict=True), color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(
            *zip(*series.curve, strict=True),
            color=colour,
            label=series.label,
            linewidth=1.0 if is_long and not series.noisy else 1.7,
            marker="o" if len(series.points) <= 40 and not series.noisy else "",
            markersize=3.4,
        )
    values = [value for series in chart.series for _, value in series.points]
    axes.locator_params("y", nbins=5)
    if min(values) > 0 and max(values) > 30 * median(values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
    elif chart.from_zero and min(values) >= 0:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.locator_params("x", nbins=6, integer=True)
    axes.xaxis.set_major_formatter(lambda x, _: format_number(x, 4))
    axes.yaxis.set_major_formatter(
        lambda y, _: f"{100 * y:.4g} %" if chart.percent else format_number(y, 4)
    )


def _paint_scores(panels: dict[str, list[Line]], figure: "Figure | SubFigure") -> None:
    top = height = sum(1 + len(panel) for panel in panels.values())
    for name, panel in panels.items():
        top -= 1 + len(panel)
        frame = (0, top / height, 1, (1 + len(panel)) / height)
        axes = figure.add_axes(frame, xticks=[], yticks=[], ylim=(-len(panel), 1), xmargin=0.06)
        axes.spines["bottom"].set_visible(False)
        row: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
        axes.text(0, 0.7, metric_title(name), **row, weight="semibold")
        for i, line in enumerate(panel):
            value, error = line.metrics[name]
            colours = (
                ("muted", "muted", "card") if line.is_baseline else ("ink", "accent", "accent")
            )
            ink, edge, face = (_COLOURS[colour] for colour in colours)
            who = visible(line.who)
            if len(who) > MAX_NAME_CHARS:  # checkpoints differ at the end
                who = f"…{who[1 - MAX_NAME_CHARS :]}"
            axes.text(0, 0.1 - i, who, **row, color=ink)
            axes.text(1, 0.1 - i, format_metric(value, error), **row, color=ink, ha="right")
            axes.axhline(-0.4 - i, color=_COLOURS["grid"], linewidth=1)
            dot: dict[str, Any] = {"markersize": 6, "markeredgewidth": 1.5, "markerfacecolor": face}
            axes.errorbar(value, -0.4 - i, xerr=error or None, fmt="o", color=edge, **dot)


def _draw(height: int, alt: str, paint: Callable[["Figure"], None]) -> str:
    """Return what `paint` draws as an `<svg>` that `alt` describes in words."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no line on font caches
    import matplotlib.style
    from matplotlib.figure import Figure

    svg = io.StringIO()
    style: list[Any] = ["default", {**_STYLE, "svg.hashsalt": alt}]
    with matplotlib.style.context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on glyphs that the page's fonts have
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        paint(figure)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=metadata)
    return _inline(svg.getvalue(), alt, f"0 0 {WIDTH} {height}")


def _inline(svg: str, alt: str, view_box: str) -> str:
    """Return matplotlib's document as an element of an HTML page, coloured by its variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    label = html.escape(visible(alt))
    head = f'<svg viewBox="{view_box}" role="img" aria-label="{label}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for name, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\s*\n\s*", " ", svg).strip()
