"""Results of tasks: their table, and the `evaluations.json` of the run that a checkpoint is of.

A row is `{"checkpoint", "task", "results"}`, in files also `"about"`. Results are metrics by name:
`<metric>_stderr` is the standard error of `<metric>`; `baseline_<who>_<metric>` is the score of
something else, whose `<who>` begins with `published_` where it was not measured here. What begins
with `confusion_`, counts of a class predicted as another, stays out of the table.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict

from nanogpt.disk import wait_for_lock, write_json
from nanogpt.runs.directory import RunDirectory
from nanogpt.text import first_line

log = logging.getLogger("nanogpt")

Results = dict[str, float]
Row = dict[str, Any]

STDERR, BASELINE, PUBLISHED, CONFUSION = "_stderr", "baseline_", "published_", "confusion_"


class _StoredRow(TypedDict):
    checkpoint: str
    task: str
    results: dict[str, int | float]
    about: NotRequired[dict[str, Any]]


STORED_ROWS = TypeAdapter(list[_StoredRow])


def mean_and_error(name: str, values: np.ndarray) -> Results:
    """Return the mean of independent values (N,) and its standard error, under a name.

    >>> mean_and_error("acc", np.array([True, False, True, True]))
    {'acc': 0.75, 'acc_stderr': 0.25}
    """
    values = np.asarray(values, dtype=np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {name: float(values.mean()), f"{name}{STDERR}": float(error)}


def ratio_and_error(name: str, amounts: np.ndarray, sizes: np.ndarray) -> Results:
    """Return sum(amounts) / sum(sizes), both (N,), and its standard error, under a name.

    The error is that of a ratio estimator (Cochran 1977, section 6.4).
    """
    ratio, n, error = amounts.sum() / sizes.sum(), len(amounts), 0.0
    if n > 1:
        residuals = amounts - ratio * sizes
        error = math.sqrt(n / (n - 1) * np.square(residuals).sum()) / sizes.sum()
    return {name: float(ratio), f"{name}{STDERR}": float(error)}


def perplexity_of(loss: Results) -> Results:
    """Return the perplexity of a `loss` in nats, with its standard error to first order."""
    perplexity = math.exp(min(loss["loss"], 700.0))  # within float64
    return {"perplexity": perplexity, "perplexity_stderr": perplexity * loss["loss_stderr"]}


@dataclass(frozen=True)
class Line:
    """The metrics of a checkpoint or a baseline in a task: a value and a standard error each."""

    who: str
    task: str
    metrics: dict[str, tuple[float, float | None]]
    is_baseline: bool = False


def lines(rows: Sequence[Row]) -> list[Line]:
    """Return a line for every row, then one for each baseline of a task."""
    own: list[Line] = []
    baselines: dict[tuple[str, str], Line] = {}
    for row in rows:
        task, results = row["task"], row["results"]
        names = [name for name in results if not name.startswith((BASELINE, CONFUSION))]
        names = [name for name in names if not name.endswith(STDERR)]
        metrics = {name: (results[name], results.get(f"{name}{STDERR}")) for name in names}
        own.append(Line(row["checkpoint"], task, metrics))
        for key in results:
            if key.startswith(BASELINE):
                rest = key.removeprefix(BASELINE)
                ends = [name for name in names if rest.endswith(f"_{name}")]
                name = max(ends, key=len, default=rest.rpartition("_")[2])
                who = rest.removesuffix(f"_{name}")
                kind = "published" if who.startswith(PUBLISHED) else "baseline"
                title = f"{who.removeprefix(PUBLISHED).replace('_', ' ')} ({kind})"
                line = baselines.setdefault((task, who), Line(title, task, {}, is_baseline=True))
                line.metrics[name] = (results[key], None)
    return [*own, *baselines.values()]


def cells(of: Sequence[Line]) -> list[list[str]]:
    """Return lines as a table: a header, whose first cell is empty, and a row for each line."""
    names = list(dict.fromkeys(name for line in of for name in line.metrics))
    rows = [{n: format_metric(*found) for n, found in line.metrics.items()} for line in of]
    own = ([row.get(name, "") for name in names] for row in rows)
    return [["", *names], *([line.who, *row] for line, row in zip(of, own, strict=True))]


def table(rows: Sequence[Row]) -> str:
    """Return rows as text, a line per checkpoint or baseline."""
    of = lines(rows)
    header, *body = cells(of)
    with_task = [[row[0], line.task, *row[1:]] for line, row in zip(of, body, strict=True)]
    return align([["checkpoint", "task", *header[1:]], *with_task], n_left=2)


def align(cells: Sequence[Sequence[str]], n_left: int = 0) -> str:
    """Return rows of cells as text in columns, the first `n_left` aligned on the left."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < n_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def format_metric(value: float, error: float | None = None) -> str:
    """Return a value with its standard error, e.g. `0.2955 ± 0.0046`."""
    if value > 1 and float(value).is_integer() and error is None:
        return f"{value:.0f}"
    digits = 4 if abs(value) < 1000 else 0
    text = f"{value:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def reduced_confusion(
    labels: Sequence[str], confusion: np.ndarray, max_classes: int = 20
) -> tuple[list[str], np.ndarray]:
    """Return a confusion matrix (K, K) of at most so many classes, and their labels.

    Of more classes those with the most mistakes, as truth or as prediction, stay in their order;
    all others become the last one.
    """
    if len(labels) <= max_classes:
        return list(labels), confusion
    mistakes = confusion.sum(0) + confusion.sum(1) - 2 * np.diag(confusion)
    shown = np.sort(np.argsort(-mistakes, kind="stable")[: max_classes - 1])
    index = np.full(len(labels), len(shown))
    index[shown] = np.arange(len(shown))
    of_class = np.eye(len(shown) + 1, dtype=confusion.dtype)[index]  # (K, shown + 1)
    others = f"{len(labels) - len(shown)} others"
    return [*(labels[i] for i in shown), others], of_class.T @ confusion @ of_class


def run_dir_of(checkpoint_path: Path) -> Path | None:
    """Return the run directory that a checkpoint file lies in, None where it lies elsewhere."""
    run_dir = checkpoint_path.resolve().parent.parent
    is_run = checkpoint_path.parent.name == "checkpoints" and (run_dir / "config.yaml").is_file()
    return run_dir if is_run else None


def add_evaluation(run_dir: Path, row: Row, about: Mapping[str, Any]) -> None:
    """Add a row to a run's evaluations.json, in place of one of the same task and `about`.

    `about` has the step, the data and their limit, and the task's own options. A damaged file is
    renamed to `evaluations.json.damaged`. Several processes may add rows at once.
    """
    path, new = RunDirectory(run_dir).evaluations_path, {**row, "about": dict(about)}
    subject = (new["task"], new["about"])
    with wait_for_lock(path.with_name(f".{path.name}.lock"), f"adds to {path}"):
        rows = read_evaluations(run_dir)
        if not rows and path.exists():
            path.replace(path.with_name(f"{path.name}.damaged"))
        others = (old for old in rows if (old["task"], old.get("about")) != subject)
        write_json(path, [*others, new])


def read_evaluations(run_dir: Path) -> list[Row]:
    """Return the rows of a run's evaluations.json, none where it is missing or damaged."""
    path = RunDirectory(run_dir).evaluations_path
    try:
        return [dict(row) for row in STORED_ROWS.validate_json(path.read_bytes())]
    except FileNotFoundError:
        return []
    except ValueError as error:
        log.warning("%s is damaged: %s", path, first_line(error))
        return []
