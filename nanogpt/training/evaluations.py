"""What a report tells of a run's evaluations: a picture and a table for every task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanogpt.evaluation.picture import draw
from nanogpt.evaluation.results import Row, figure, lines
from nanogpt.training.page import details, escape, section

UNDRAWN = "<p>No figure has a standard error: there is nothing to draw.</p>"


def evaluations_section(rows: Sequence[Row]) -> str:
    """Return the section of a run's rows, nothing where there are none."""
    told = [_named(row) for row in rows]
    tasks = dict.fromkeys(row["task"] for row in told)
    body = "".join(_task([row for row in told if row["task"] == task]) for task in tasks)
    return (
        section("Evaluations", body, "dots: this run · rings: baselines and published")
        if body
        else ""
    )


def _task(rows: Sequence[Row]) -> str:
    picture = f"<figure><figcaption><strong>{escape(rows[0]['task'])}</strong></figcaption>"
    picture += f"{draw(rows) or UNDRAWN}</figure>"
    return picture + details(f"{rows[0]['task']} in numbers", _table(rows))


def _table(rows: Sequence[Row]) -> str:
    told = lines(rows)
    names = list(dict.fromkeys(name for line in told for name in line.figures))
    head = "".join(f'<th scope="col">{escape(name.replace("_", " "))}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{escape(line.who)}</th>'
        + "".join(f"<td>{_cell(line.figures, name)}</td>" for name in names)
        + "</tr>"
        for line in told
    )
    return f'<div class="card"><table class="numbers"><tr><th></th>{head}</tr>{body}</table></div>'


def _cell(figures: dict[str, tuple[float, float | None]], name: str) -> str:
    return escape(figure(*figures[name])) if name in figures else ""


def _named(row: Row) -> Row:
    """Return a row that says at which step, and on what, it was measured."""
    about: dict[str, Any] = row.get("about") or {}
    parts = [f"step {about['step']:,}"] if isinstance(about.get("step"), int) else []
    if about.get("data"):
        parts.append(Path(str(about["data"])).stem)
    if about.get("limit"):
        parts.append(f"first {about['limit']}")
    said = ("step", "data", "limit")
    parts += [f"{key.replace('_', ' ')} {about[key]}" for key in about if key not in said]
    return {**row, "checkpoint": ", ".join(parts) or row["checkpoint"]}
