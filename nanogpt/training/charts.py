"""Line charts as inline SVG in the fonts and colours of the page around them."""

import html
import io
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[int, float]]

WIDTH, HEIGHT = 400, 208  # of the view box: text stays legible in a phone's narrow column
MOST_POINTS = 600
# colours that matplotlib draws with, and the page's CSS variables that take their places
_INK, _GRID, _REFERENCE = "#000001", "#000002", "#000003"
_SERIES = ("#000011", "#000012")
_VARIABLES = {_INK: "--muted", _GRID: "--grid", _REFERENCE: "--reference"}
_VARIABLES |= {colour: f"--series-{i}" for i, colour in enumerate(_SERIES)}


@dataclass(frozen=True)
class Series:
    """One curve in the page's colour 0 or 1; a noisy one lies faintly below its moving average."""

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
    tell: Callable[[float], str] = "{:.4f}".format  # a figure, in words and legend
    reference: tuple[str, float] | None = None
    from_zero: bool = False
    percent: bool = False


def draw(chart: Chart, last_step: int, alt: str) -> str:
    """Return a chart from step 0 to `last_step` as an `<svg>`; `alt` tells it in words.

    The vertical axis holds every value; it is logarithmic where the greatest is more than 30 times
    the median.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where font caches lie is no news
    import matplotlib.style
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": alt, "font.size": 10.5}
    with matplotlib.style.context(["default", style]):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes((46 / WIDTH, 24 / HEIGHT, 1 - 58 / WIDTH, 1 - 34 / HEIGHT))
        _scale(axes, chart, last_step)
        if chart.reference is not None:
            _refer(axes, *chart.reference)
        for series in chart.series:
            _plot(axes, series)
        svg = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
    return _inline(svg.getvalue(), alt)


def smooth(points: Points) -> Points:
    """Return the centred moving average, taken twice, over about a thirtieth of the points."""
    values = np.array([value for _, value in points])
    half = len(points) // 60
    index = np.arange(len(points))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(points))
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[last] - sums[first]) / (last - first)
    return [(step, float(value)) for (step, _), value in zip(points, values, strict=True)]


def _scale(axes: "Axes", chart: Chart, last_step: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    low, high, logarithmic = _limits(chart)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_ylim(low, high)
    axes.set_xlim(0, max(last_step, 1) * 1.01)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f"{100 * y:.4g} %" if chart.percent else _short(y))
    )
    axes.tick_params(colors=_INK, length=0, pad=5, which="both")
    axes.grid(axis="y", color=_GRID, linewidth=1)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_GRID)


def _limits(chart: Chart) -> tuple[float, float, bool]:
    """Return the vertical limits and whether a logarithmic axis suits them."""
    values = [value for series in chart.series for _, value in series.points]
    if chart.reference is not None:
        values.append(chart.reference[1])
    low, high = min(values), max(values)
    if low > 0 and high > 30 * median(values):
        return low / 1.3, high * 1.3, True
    margin = 0.07 * (high - low) or 0.07 * abs(high) or 1.0
    if chart.from_zero and low >= 0:
        return 0.0, (high or 1.0) * 1.07, False
    return low - margin, high + margin, False


def _refer(axes: "Axes", label: str, value: float) -> None:
    axes.axhline(value, color=_REFERENCE, linewidth=1.2, dashes=(4, 3))
    axes.annotate(
        label,
        (1, value),
        (0, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        color=_REFERENCE,
    )


def _plot(axes: "Axes", series: Series) -> None:
    colour = _SERIES[series.colour]
    if series.noisy:
        axes.plot(*_columns(_thin(series.points)), color=colour, linewidth=0.8, alpha=0.35)
    dense = len(series.points) > MOST_POINTS and not series.noisy
    axes.plot(
        *_columns(_thin(series.curve)),
        color=colour,
        linewidth=1.0 if dense else 1.7,
        marker="o" if len(series.points) <= 40 and not series.noisy else "",
        markersize=3.4,
    )


def _thin(points: Points) -> Points:
    """Keep the least and the greatest of every stretch of steps: a spike is seen at any length."""
    if len(points) <= MOST_POINTS:
        return points
    kept: Points = []
    for stretch in np.array_split(np.arange(len(points)), MOST_POINTS // 2):
        extremes = {key(stretch, key=lambda i: points[i][1]) for key in (min, max)}
        kept += [points[i] for i in sorted(extremes)]
    return kept


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _short(value: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    text = f"{value:.4g}"
    if len(text) <= 6 and not 0 < abs(value) < 1e-3:  # fits beside the axis
        return text
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _inline(svg: str, alt: str) -> str:
    """Turn matplotlib's SVG document into an element of an HTML page, coloured by its variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(
        r"<svg[^>]*>",
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(alt)}">',
        svg,
    )
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"\s*\n\s*", " ", svg).strip()
