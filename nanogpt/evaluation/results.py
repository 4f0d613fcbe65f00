"""What tasks found: rows for people, for programs, and for the run that the checkpoint is of.

A row is `{"checkpoint", "task", "results"}`. Results are figures by name: `<figure>_stderr` is the
standard error of `<figure>`, and `baseline_<who>_<figure>` is what somebody or something else
reaches; `who` begins with `published_` where it was not measured here. What begins with
`confusion_`, the texts of each class that were taken for another, stays out of the table.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.disk import write_atomically

log = logging.getLogger("nanogpt")

Results = dict[str, float]
Row = dict[str, Any]  # {"checkpoint", "task", "results"}, as in the JSON file

STDERR, BASELINE, PUBLISHED, CONFUSION = "_stderr", "baseline_", "published_", "confusion_"
KEPT = "evaluations.json"  # in a run's directory


def mean_and_error(name: str, values: np.ndarray) -> Results:
    """Return the mean of independent values and its standard error, under a name.

    >>> mean_and_error("acc", np.array([True, False, True, True]))
    {'acc': 0.75, 'acc_stderr': 0.25}
    """
    values = np.asarray(values, dtype=np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {name: float(values.mean()), f"{name}{STDERR}": float(error)}


def with_published(results: Results, published: Mapping[str, Results]) -> Results:
    """Return results with what others have published beside them."""
    beside = {
        f"{BASELINE}{PUBLISHED}{who}_{name}": value
        for who, figures in published.items()
        for name, value in figures.items()
    }
    return {**results, **beside}


@dataclass(frozen=True)
class Line:
    """Figures of a checkpoint, or of what it is compared with, each with its standard error."""

    who: str
    task: str
    figures: dict[str, tuple[float, float | None]]
    is_baseline: bool = False


def lines(rows: Sequence[Row]) -> list[Line]:
    """Return a line for every row, and then one for everything that they are compared with."""
    ours = [Line(row["checkpoint"], row["task"], _own(row["results"])) for row in rows]
    beside: dict[tuple[str, str], dict[str, tuple[float, float | None]]] = {}
    for row in rows:
        for who, name, value in _baselines(row["results"]):
            beside.setdefault((row["task"], who), {})[name] = (value, None)
    return ours + [
        Line(_said(who), task, figures, is_baseline=True) for (task, who), figures in beside.items()
    ]


def _own(results: Results) -> dict[str, tuple[float, float | None]]:
    return {
        name: (value, results.get(f"{name}{STDERR}"))
        for name, value in results.items()
        if not name.endswith(STDERR) and not name.startswith((BASELINE, CONFUSION))
    }


def _baselines(results: Results) -> Iterator[tuple[str, str, float]]:
    """Yield who reached it, the figure's name and the figure."""
    names = sorted(_own(results), key=len, reverse=True)
    for key, value in results.items():
        if key.startswith(BASELINE):
            rest = key.removeprefix(BASELINE)
            name = next((n for n in names if rest.endswith(f"_{n}")), rest.rpartition("_")[2])
            yield rest.removesuffix(f"_{name}"), name, value


def _said(who: str) -> str:
    """Return e.g. `gpt2 124M (published)`."""
    if who.startswith(PUBLISHED):
        return f"{who.removeprefix(PUBLISHED).replace('_', ' ')} (published)"
    return f"{who.replace('_', ' ')} (baseline)"


def table(rows: Sequence[Row]) -> str:
    """Return the figures as text, with standard errors, a line per checkpoint or baseline."""
    told = lines(rows)
    names = list(dict.fromkeys(name for line in told for name in line.figures))
    cells = [["checkpoint", "task", *names]]
    for line in told:
        figures = [figure(*line.figures.get(name, (None, None))) for name in names]
        cells.append([line.who, line.task, *figures])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def figure(value: float | None, error: float | None = None) -> str:
    """Return e.g. `0.2955 ± 0.0046`."""
    if value is None:
        return ""
    if value > 1 and float(value).is_integer() and error is None:
        return f"{value:.0f}"
    digits = 4 if abs(value) < 1000 else 0
    told = f"{value:.{digits}f}"
    return told if error is None else f"{told} ± {error:.{digits}f}"


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON, the file as a whole."""
    write_atomically(path, (json.dumps(rows, indent=2) + "\n").encode())


def run_dir_of(checkpoint_path: Path) -> Path | None:
    """Return the run that a checkpoint file lies in, None where it lies elsewhere."""
    run_dir = checkpoint_path.resolve().parent.parent
    is_run = checkpoint_path.parent.name == "checkpoints" and (run_dir / "config.yaml").is_file()
    return run_dir if is_run else None


def keep(run_dir: Path, row: Row, about: Mapping[str, Any]) -> None:
    """Add a row to those of a run, in place of one about the same.

    `about` says what was measured: the step, the data and how much of it, and what the task reads.
    A damaged file is moved aside, to `evaluations.json.damaged`.
    """
    path, new = run_dir / KEPT, {**row, "about": dict(about)}
    rows, is_damaged = _read_rows(path)
    if is_damaged:
        path.replace(path.with_name(f"{KEPT}.damaged"))
    write_rows(path, [*(old for old in rows if not _same(old, new)), new])


def read_kept(run_dir: Path) -> list[Row]:
    """Return the rows that were measured of a run, without those that are damaged."""
    return _read_rows(run_dir / KEPT)[0]


def _read_rows(path: Path) -> tuple[list[Row], bool]:
    """Return the rows of a run's evaluations.json, and whether anything there is damaged."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else []
    except (ValueError, RecursionError):
        found = None
    rows = [row for row in found if _is_row(row)] if isinstance(found, list) else []
    is_damaged = found != rows
    if is_damaged:
        log.warning("%s is damaged: %s rows of it can be read", path, len(rows))
    return rows, is_damaged


def _is_row(row: object) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("checkpoint"), str)
        and isinstance(row.get("about", {}), dict)
        and isinstance(row.get("task"), str)
        and isinstance(row.get("results"), dict)
        and all(isinstance(value, int | float) for value in row["results"].values())
    )


def _same(a: Row, b: Row) -> bool:
    return (a["task"], a.get("about")) == (b["task"], b.get("about"))
