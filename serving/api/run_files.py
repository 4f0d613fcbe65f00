"""The runs under a directory, read from their files: state, metrics, curves.

A file that cannot be read spoils its own run only, which is listed as damaged with the reason.
"""

import csv
import io
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml

from nanogpt.disk import display_name, find_files, open_regular

MAX_RUNS = 200
MAX_POINTS = 160  # of a curve
MAX_TEXT = 500  # characters of a value of the summary
MAX_NUMBER = 2**53  # integers below it are exact in JavaScript
MAX_BYTES = {"metrics.csv": 64 * 2**20, "summary.json": 16 * 2**20, "config.yaml": 2**18}
FRESH_S = 120  # a run whose metrics changed this recently is still training
CURVES = ("train/loss", "val/loss", "val/accuracy")
FIGURES = ("tokens_per_s", "val/bits_per_byte")
LAST_SECOND = 253_402_300_799  # of the year 9999: dates beyond it cannot be formatted

Points = list[tuple[int, float]]
Reader = Callable[[BinaryIO, dict[str, Any]], None]  # adds to the content
T = TypeVar("T")

log = logging.getLogger("nanogpt.server")


@dataclass(frozen=True)
class Run:
    """A run; `name` is its path below the directory of runs, `error` the reason of damage."""

    name: str
    state: str  # finished, training, stopped, damaged
    error: str | None
    stage: str | None
    step: int
    max_steps: int | None
    updated: int  # seconds since 1970
    summary: dict[str, Any]
    curves: dict[str, Points]
    report_path: Path | None

    def describe(self) -> dict[str, Any]:
        """Return the run as `/v1/runs` lists it."""
        shown = ("stage", "state", "error", "step", "max_steps", "updated", "summary", "curves")
        return {"id": self.name, "object": "run", **{key: getattr(self, key) for key in shown}}


def find_runs(runs_dir: Path) -> list[Run]:
    """Return the runs under a directory, the newest first, at most MAX_RUNS."""
    found = []
    for path in find_files(runs_dir, "metrics.csv"):
        with suppress(OSError):  # removed meanwhile
            found.append((os.lstat(path).st_mtime, path.parent))
    newest = sorted(found, key=lambda pair: pair[0], reverse=True)[:MAX_RUNS]
    return [_run(run_dir, runs_dir, updated) for updated, run_dir in newest]


def _run(run_dir: Path, runs_dir: Path, updated: float) -> Run:
    below = run_dir.relative_to(runs_dir)
    read = [_read(reader, run_dir / name) for name, reader in READERS.items()]
    metrics, summary, config = (content for content, _ in read)
    reasons = [reason for _, reason in read if reason]
    age = abs(time.time() - updated)  # another machine's clock may be ahead
    state = "finished" if summary else "training" if age < FRESH_S else "stopped"
    report_path = run_dir / "report.html"
    # A link out of the run would show any file of this machine.
    has_report = os.path.isfile(report_path) and not os.path.islink(report_path)
    return Run(
        name=display_name(below if below.parts else Path(Path(os.path.realpath(run_dir)).name)),
        state="damaged" if reasons else state,
        error="; ".join(reasons) or None,
        stage=_typed(summary, "stage", str) or config.get("stage"),
        step=_typed(summary, "steps", int) or _reached(metrics),
        max_steps=config.get("max_steps"),
        updated=int(min(max(updated, 0), LAST_SECOND)),
        summary={key.replace("/", "_"): points[-1][1] for key, points in metrics.items()} | summary,
        curves={key: metrics[key] for key in CURVES if key in metrics},
        report_path=report_path if has_report else None,
    )


def thin(points: Points) -> Points:
    """Return at most about MAX_POINTS points, of every stretch its least and greatest."""
    if len(points) <= MAX_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / MAX_POINTS)
    kept: Points = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=_value), max(part, key=_value)})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _value(point: tuple[int, float]) -> float:
    return point[1]


def _reached(metrics: Mapping[str, Points]) -> int:
    return max((points[-1][0] for points in metrics.values()), default=0)


def _typed(content: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    value = content.get(key)
    return value if isinstance(value, kind) else None


def _read(reader: Reader, path: Path) -> tuple[dict[str, Any], str | None]:
    """Return a file's content and None, or nothing and the reason why it cannot be read."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return {}, f"{path.name} is a dangling link" if os.path.islink(path) else None
    except OSError as error:
        return {}, f"{path.name} cannot be read ({error.strerror})"
    return _read_once(reader, path, status.st_mtime_ns, status.st_ctime_ns, status.st_size)


@lru_cache(4 * MAX_RUNS)
def _read_once(reader: Reader, path: Path, *version: int) -> tuple[dict[str, Any], str | None]:
    """Read a version of a file; an error is logged, once for each version."""
    content: dict[str, Any] = {}
    try:
        with open_regular(path, MAX_BYTES[path.name]) as file:
            reader(file, content)
        return content, None
    except RecursionError:
        why = "nested too deeply"
    except Exception as error:  # whatever a file can do to its reader
        why = " ".join(str(getattr(error, "strerror", None) or error).split())[:MAX_TEXT]
    reason = f"{path.name} cannot be read ({why})"
    log.warning("damaged run %s: %s", display_name(path.parent), reason)
    return content, reason


def _read_metrics(file: BinaryIO, content: dict[str, Any]) -> None:
    """Add (step, value) pairs by column, of the columns that are shown, thinned.

    Rows up to an error are added.
    """
    curves: dict[str, Points] = {}
    with io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="") as text:
        rows = csv.reader(_without_nul(text))
        header = next(rows, [])
        columns = [(header.index(name), name) for name in (*CURVES, *FIGURES) if name in header]
        try:
            for row in rows:
                for index, name in columns:
                    if point := _point(row, index):
                        curves.setdefault(name, []).append(point)
        finally:
            content.update((name, thin(points)) for name, points in curves.items())


def _without_nul(lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:  # a power cut leaves NULs where data never reached the disk
            raise ValueError(f"NUL bytes in line {number}")
        yield line


def _point(row: Sequence[str], index: int) -> tuple[int, float] | None:
    """Return a row's step and value, or None where either is missing, torn or infinite."""
    with suppress(ValueError, IndexError):
        step, value = int(row[0]), float(row[index])
        if math.isfinite(value) and 0 <= step < MAX_NUMBER:
            return step, value
    return None


def _read_summary(file: BinaryIO, content: dict[str, Any]) -> None:
    """Add the plain values of the summary, which say how a run did, not where or with what."""
    summary = json.load(file)
    if not isinstance(summary, dict):
        raise ValueError(f"a {type(summary).__name__}, not an object")
    for key, value in summary.items():
        if isinstance(value, str):
            content[key] = value[:MAX_TEXT]
        elif isinstance(value, int | float) and abs(value) < MAX_NUMBER:
            content[key] = value


def _read_config(file: BinaryIO, content: dict[str, Any]) -> None:
    """Add the stage and the budget of a configuration.

    Only these are constructed: merge keys (`<<`) can make a small file of YAML exponentially large.
    """
    root = yaml.compose(file, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("not a mapping")
    known = {"stage": str, "max_steps": int}
    for key, node in root.value:
        kind = known.get(str(key.value))
        if kind and isinstance(node, yaml.ScalarNode):
            value = yaml.safe_load(node.value)
            if isinstance(value, kind):
                content[key.value] = value


READERS: dict[str, Reader] = {
    "metrics.csv": _read_metrics,
    "summary.json": _read_summary,
    "config.yaml": _read_config,
}
