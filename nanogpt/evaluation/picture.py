"""A picture of figures side by side: checkpoints, baselines and published models on one scale."""

import html
from collections.abc import Sequence

from nanogpt.evaluation.results import Line, Row, figure, lines

# how figures are called and in which order they come; then follow, under their own names, those
# that have a standard error, such as those of the harness's tasks; the rest are facts
PANELS = {
    "acc": "accuracy",
    "acc_norm": "accuracy, normalised by length",
    "harness_acc": "accuracy, harness style",
    "harness_acc_norm": "accuracy, harness style, normalised by length",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "loss": "loss, nats per token",
    "bits_per_byte": "bits per byte",
    "terminated": "replies that end by themselves",
    "score": "judge's score, 0 to 100",
}
WIDTH, NAMES, ROOM = 740, 236, 144  # of the picture; left and right of the scale
TITLE, ROW, GAP, EDGE = 30, 24, 18, 12
NAME_CHARS = 32
STYLE = """
:root { --ink: #1b1f27; --muted: #5b6472; --grid: #e1e5ea; --accent: #1f5fd0; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --muted: #9aa4b2; --grid: #2a313a; --accent: #8ab4ff; --page: #0f1216; }
}
svg { background: var(--page); font-family: system-ui, sans-serif; }
"""


def picture(rows: Sequence[Row]) -> str:
    """Return an SVG document that stands alone, light or dark as its reader's screen.

    Raises ValueError where there is nothing to draw.
    """
    drawn = draw(rows)
    if not drawn:
        raise ValueError(
            "there is nothing to draw, as no figure has a standard error; the table has them all: "
            "leave --picture out, or score more than one example"
        )
    return drawn.replace(">", f' xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>', 1)


def draw(rows: Sequence[Row]) -> str:
    """Return an `<svg>` in the colours of the page around it: a panel per figure.

    A checkpoint is a dot with a bar of one standard error, a baseline or a published figure a ring.
    Nothing is returned where there is nothing to draw.
    """
    told = lines(rows)
    names = _names(told)
    if not names:
        return ""
    parts, y = [], 6.0
    for name in names:
        of_panel = [line for line in told if name in line.figures]
        parts.append(_panel(name, of_panel, y))
        y += TITLE + ROW * len(of_panel) + GAP
    alt = "; ".join(
        f"{_title(name)}: "
        + ", ".join(
            f"{line.who} {figure(*line.figures[name])}" for line in told if name in line.figures
        )
        for name in names
    )
    width = WIDTH + 2 * EDGE
    return (
        f'<svg viewBox="{-EDGE} 0 {width} {y:g}" style="max-width: {width}px" role="img" '
        f'aria-label="{html.escape(alt)}" font-size="13">{"".join(parts)}</svg>'
    )


def _names(told: Sequence[Line]) -> list[str]:
    """Return the figures that have a panel, the known ones first."""
    errors = [(name, error) for line in told for name, (_, error) in line.figures.items()]
    names = {name for name, _ in errors}
    uncertain = dict.fromkeys(name for name, error in errors if error is not None)
    return [name for name in PANELS if name in names] + [
        name for name in uncertain if name not in PANELS
    ]


def _title(name: str) -> str:
    return PANELS.get(name, name.replace("_", " "))


def _panel(name: str, told: Sequence[Line], top: float) -> str:
    figures = [line.figures[name] for line in told]
    low = min(value - 2 * (error or 0) for value, error in figures)
    high = max(value + 2 * (error or 0) for value, error in figures)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin

    def x_of(value: float) -> float:
        return NAMES + (WIDTH - NAMES - ROOM) * (value - low) / (high - low)

    parts = [_text(0, top + 12, _title(name), "var(--ink)", weight=600)]
    for i, line in enumerate(told):
        y = top + TITLE + ROW * i + ROW / 2
        value, error = line.figures[name]
        colour = "var(--muted)" if line.is_baseline else "var(--accent)"
        parts.append(
            _text(0, y, _short(line.who), "var(--muted)" if line.is_baseline else "var(--ink)")
        )
        parts.append(
            f'<path d="M{NAMES} {y:g}H{WIDTH - ROOM}" stroke="var(--grid)" stroke-width="1"/>'
        )
        x = x_of(value)
        if error:
            ends = f"M{x_of(value - error):.1f} {y:g}H{x_of(value + error):.1f}"
            parts.append(f'<path d="{ends}" stroke="{colour}" stroke-width="3" opacity="0.45"/>')
        look = f'fill="var(--page)" stroke="{colour}"' if line.is_baseline else f'fill="{colour}"'
        parts.append(f'<circle cx="{x:.1f}" cy="{y:g}" r="4.5" stroke-width="2" {look}/>')
        parts.append(_text(WIDTH - ROOM + 12, y, figure(value, error), "var(--ink)"))
    return "".join(parts)


def _short(name: str) -> str:
    """Return a name's end, which tells checkpoints apart, where all of it is too long."""
    return name if len(name) <= NAME_CHARS else f"…{name[-NAME_CHARS + 1 :]}"


def _text(x: float, y: float, text: str, colour: str, weight: int = 400) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-weight="{weight}" '
        f'dominant-baseline="central">{html.escape(text)}</text>'
    )
