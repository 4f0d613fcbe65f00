"""Runs as their files tell them: how far each came, its figures, its curves.

A run may be half written, or torn by a kill: what cannot be read is left out.
"""

import csv
import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

MOST_RUNS = 200
MOST_POINTS = 160  # of a curve
FRESH_S = 120  # a run whose files changed so lately is still training
CURVES = ("train/loss", "val/loss", "val/accuracy")
FIGURES = ("tokens_per_s", "val/bits_per_byte")

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """What is known of a run; `name` is its path below the directory of runs."""

    name: str
    state: str  # finished, training, stopped
    stage: str | None
    step: int
    max_steps: int | None
    updated: int  # seconds since 1970
    summary: dict[str, Any]
    curves: dict[str, Points]
    report_path: Path | None

    def describe(self) -> dict[str, Any]:
        """Return the run as `/v1/runs` lists it."""
        shown = ("stage", "state", "step", "max_steps", "updated", "summary", "curves")
        return {"id": self.name, "object": "run", **{key: getattr(self, key) for key in shown}}


def find_runs(runs_dir: Path) -> list[Run]:
    """Return the runs under a directory, the newest first, at most 200."""
    found = []
    for directory, _, files in os.walk(runs_dir):  # passes over what vanishes meanwhile
        if "metrics.csv" in files:
            path = Path(directory) / "metrics.csv"
            with suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, path.parent))
    newest = sorted(found, key=lambda pair: pair[0], reverse=True)[:MOST_RUNS]
    return [_run(run_dir, runs_dir, updated) for updated, run_dir in newest]


def _run(run_dir: Path, runs_dir: Path, updated: float) -> Run:
    name = run_dir.resolve().name
    if run_dir != runs_dir:
        name = run_dir.relative_to(runs_dir).as_posix()
    metrics = _read(_metrics, run_dir / "metrics.csv") or {}
    summary = _read(_summary, run_dir / "summary.json") or {}
    config = _read(_config, run_dir / "config.yaml") or {}
    reached = max((points[-1][0] for points in metrics.values()), default=0)
    last = {key: metrics[key][-1][1] for key in (*CURVES, *FIGURES) if key in metrics}
    state = "training" if time.time() - updated < FRESH_S else "stopped"
    report_path = run_dir / "report.html"
    return Run(
        name=name,
        state="finished" if summary else state,
        stage=summary.get("stage") or config.get("stage"),
        step=summary.get("steps") or reached,
        max_steps=config.get("max_steps"),
        updated=int(updated),
        summary={key.replace("/", "_"): value for key, value in last.items()} | summary,
        curves={key: thin(metrics[key]) for key in CURVES if key in metrics},
        # A link out of the run would show any file of this machine.
        report_path=report_path if report_path.is_file() and not report_path.is_symlink() else None,
    )


def thin(points: Points) -> Points:
    """Return at most about MOST_POINTS points, of every stretch its least and greatest."""
    if len(points) <= MOST_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / MOST_POINTS)
    kept: Points = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=_value), max(part, key=_value)})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _value(point: tuple[int, float]) -> float:
    return point[1]


def _read(reader: Any, path: Path) -> dict[str, Any] | None:
    """Return what a reader makes of a file, once for each state of it; None for what is broken."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        status = path.stat()
        content: dict[str, Any] = reader(path, status.st_mtime_ns, status.st_size)
        return content
    return None


@lru_cache(MOST_RUNS)
def _metrics(path: Path, mtime_ns: int, size: int) -> dict[str, Points]:
    """Return (step, value) pairs by column, of the columns that are shown."""
    curves: dict[str, Points] = {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        columns = [(header.index(name), name) for name in (*CURVES, *FIGURES) if name in header]
        for row in rows:
            for index, name in columns:
                point = _point(row, index)
                if point:
                    curves.setdefault(name, []).append(point)
    return curves


def _point(row: Sequence[str], index: int) -> tuple[int, float] | None:
    """Return a row's step and figure, or None where there is none, or a torn or infinite one."""
    with suppress(ValueError, IndexError):
        value = float(row[index])
        if math.isfinite(value):
            return int(row[0]), value
    return None


@lru_cache(MOST_RUNS)
def _summary(path: Path, mtime_ns: int, size: int) -> dict[str, Any]:
    """Return the figures of the summary, which say how a run did, and not where or with what."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {
        key: value
        for key, value in content.items()
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    }


@lru_cache(MOST_RUNS)
def _config(path: Path, mtime_ns: int, size: int) -> dict[str, Any]:
    """Return the stage and the budget that a configuration names."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a mapping")
    known = (("stage", str), ("max_steps", int))
    return {key: content[key] for key, kind in known if isinstance(content.get(key), kind)}
