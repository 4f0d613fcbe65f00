"""The runs under a directory, as /v1/runs lists them: state, metrics, curves.

A file that cannot be read spoils its own run only, which is listed as damaged with the reason.
"""

import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml

from nanogpt.disk import display_name, open_regular
from nanogpt.runs import directory
from nanogpt.runs.directory import RunDirectory, read_summary
from nanogpt.runs.metrics import read_metrics

MAX_RUNS = 200
MAX_POINTS = 160  # of a curve
MAX_TEXT = 500  # characters of a value of the summary
MAX_NUMBER = 2**53  # integers below it are exact in JavaScript
MAX_METRICS_BYTES, MAX_CONFIG_BYTES = 64 * 2**20, 2**18
FRESH_S = 120  # a run whose metrics changed this recently is still training
CURVES = ("train/loss", "val/loss", "val/accuracy")
LAST_VALUES = (*CURVES, "tokens_per_s", "val/bits_per_byte")
LAST_SECOND = 253_402_300_799  # of the year 9999: dates beyond it cannot be formatted

Points = list[tuple[int, float]]
Reader = Callable[[Path], dict[str, Any]]

log = logging.getLogger("nanogpt.server")


def find_runs(runs_dir: Path) -> list[dict[str, Any]]:
    """Return the runs under a directory, the newest first, at most MAX_RUNS.

    Each is as `/v1/runs` lists it; `report` is the path of its report, None without one.
    """
    found = []
    for run in directory.find_runs(runs_dir)[:MAX_RUNS]:
        with suppress(FileNotFoundError):  # removed meanwhile
            found.append(_describe(run, runs_dir))
    return found


def _describe(run: RunDirectory, runs_dir: Path) -> dict[str, Any]:
    below = run.path.relative_to(runs_dir)
    metrics, no_metrics = _read(_read_curves, run.metrics_path)
    summary, no_summary = _read(_read_values, run.summary_path)
    config, no_config = _read(_read_budget, run.config_path)
    error = "; ".join(filter(None, (no_metrics, no_summary, no_config))) or None
    updated = os.lstat(run.metrics_path).st_mtime
    age = abs(time.time() - updated)  # another machine's clock may be ahead
    state = "finished" if summary else "training" if age < FRESH_S else "stopped"
    last = {name: points[-1] for name, points in metrics.items()}
    # A link out of the run would show any file of this machine.
    has_report = os.path.isfile(run.report_path) and not os.path.islink(run.report_path)
    return {
        "id": display_name(below if below.parts else Path(run.path.resolve().name)),
        "object": "run",
        "stage": summary.get("stage") or config.get("stage"),
        "state": "damaged" if error else state,
        "error": error,
        "step": summary.get("steps") or max((step for step, _ in last.values()), default=0),
        "max_steps": config.get("max_steps"),
        "updated": int(min(max(updated, 0), LAST_SECOND)),
        "summary": {name.replace("/", "_"): value for name, (_, value) in last.items()} | summary,
        "curves": {name: metrics[name] for name in CURVES if name in metrics},
        "report": run.report_path if has_report else None,
    }


def thin(points: Points) -> Points:
    """Return at most about MAX_POINTS points, the smallest and largest of every stretch."""
    if len(points) <= MAX_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / MAX_POINTS)
    thinned: Points = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        thinned += sorted({min(part, key=itemgetter(1)), max(part, key=itemgetter(1))})
    return thinned if thinned[-1] == points[-1] else [*thinned, points[-1]]


def _read(reader: Reader, path: Path) -> tuple[dict[str, Any], str | None]:
    """Return a file's content, nothing for no file, or the reason why it cannot be read."""
    if not os.path.lexists(path):
        return {}, None
    version = (0, 0, 0)
    with suppress(OSError):  # which the reader raises again
        status = path.stat()
        version = (status.st_mtime_ns, status.st_ctime_ns, status.st_size)
    return _read_once(reader, path, version)


@lru_cache(4 * MAX_RUNS)
def _read_once(
    reader: Reader, path: Path, version: tuple[int, ...]
) -> tuple[dict[str, Any], str | None]:
    """Read a version of a file; an error is logged, once for each version."""
    try:
        return reader(path), None
    except Exception as error:  # whatever a file can do to its reader
        why = str(getattr(error, "strerror", None) or error).removeprefix(f"{path} is damaged ")
        reason = f"{path.name} cannot be read ({' '.join(why.strip('()').split())[:MAX_TEXT]})"
    log.warning("damaged run %s: %s", display_name(path.parent), reason)
    return {}, reason


def _read_curves(path: Path) -> dict[str, Any]:
    """Return (step, value) pairs by column, of the columns that are shown, thinned."""
    with open_regular(path, MAX_METRICS_BYTES):
        metrics = read_metrics(path)
    shown = {name: metrics[name] for name in LAST_VALUES if name in metrics}
    finite = {
        name: [(n, value) for n, value in points if math.isfinite(value) and n < MAX_NUMBER]
        for name, points in shown.items()
    }
    return {name: thin(points) for name, points in finite.items() if points}


def _read_values(path: Path) -> dict[str, Any]:
    """Return the plain values of the summary: the results of a run, not its paths or inputs."""
    return {
        key: value[:MAX_TEXT] if isinstance(value, str) else value
        for key, value in read_summary(path).items()
        if isinstance(value, str) or (isinstance(value, int | float) and abs(value) < MAX_NUMBER)
    }


def _read_budget(path: Path) -> dict[str, Any]:
    """Return the stage and the budget of a configuration.

    Merge keys (`<<`), which can make a small file of YAML exponentially large, stay as they are.
    """
    with open_regular(path, MAX_CONFIG_BYTES) as file:
        config = yaml.load(file, yaml.BaseLoader)  # all scalars are text
    if not isinstance(config, dict):
        raise ValueError("not a mapping")
    max_steps = str(config.get("max_steps"))
    return {
        "stage": config.get("stage"),
        "max_steps": int(max_steps) if max_steps.isdecimal() else None,
    }
