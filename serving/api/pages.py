"""The web pages: chat, runs and reports, with the list of the runs.

Page and files contain no data and need no key. Runs contain paths and samples of private text, so
stricter rules hold than for the API: without keys only this machine itself is answered, not through
a proxy, nor a page of another origin. A file that cannot be read spoils its own run only, which is
listed as damaged with the reason.
"""

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from nanogpt.disk import display_name, open_regular
from nanogpt.evaluation.results import STORED_ROWS
from nanogpt.runs import directory
from nanogpt.runs.directory import RunDirectory, read_summary
from nanogpt.runs.metrics import read_metrics
from serving.api.auth import check_local, ticket
from serving.api.call import json_response
from serving.api.errors import ApiError

STATIC = Path(__file__).parent.parent / "static"
# Nothing from elsewhere, no script or style but the files'; reports are shown in frames.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
HEADERS = {
    "Cache-Control": "no-cache",  # validated each time: a new version is seen at once
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# A report brings its own style and pictures, and nothing in it runs or is sent anywhere.
REPORT_HEADERS = {
    **HEADERS,
    "Content-Security-Policy": (
        "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        "frame-ancestors 'self'"
    ),
}
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

router = APIRouter()
log = logging.getLogger("nanogpt.server")


class PageFiles(StaticFiles):
    """The page's files, with the page's headers."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """Return the page to chat with models."""
    return FileResponse(STATIC / "index.html", headers=HEADERS)


@router.get("/runs", include_in_schema=False)
async def runs_page() -> Response:
    """Return the page that shows the runs."""
    return FileResponse(STATIC / "runs.html", headers=HEADERS)


@router.get("/v1/runs")
async def runs(request: Request) -> Response:
    """List the runs, the newest first, with their metrics and curves."""
    client, settings = request.app.state.client, request.app.state.settings
    models = client.models() if client.connected else []
    served = {name: model.id for model in models for name in (model.id, *model.aliases)}
    found = await _find_runs(request)
    for run in found:
        run["model"] = served.get(run["id"])
        if run["report"]:  # as its URL, with a ticket: a browser opens it without headers
            path = f"/runs/{run['id']}/report.html"
            opens = f"?ticket={ticket(path, settings)}" if settings.api_keys else ""
            run["report"] = quote(path) + opens
    folders = dict.fromkeys(run["id"].rpartition("/")[0] for run in found)
    boards = await asyncio.to_thread(leaderboards, Path(settings.runs_dir), folders)
    return json_response({"object": "list", "data": found, "leaderboards": boards})


@router.get("/runs/{name:path}/report.html", include_in_schema=False)
async def report(request: Request, name: str) -> Response:
    """Return a run's report, as a document without rights; raises ApiError for an unknown run."""
    paths = {run["id"]: run["report"] for run in await _find_runs(request)}
    if paths.get(name) is None:
        raise ApiError(404, f"There is no run {name!r} with a report.", code="not_found")
    return FileResponse(paths[name], headers=REPORT_HEADERS)


async def _find_runs(request: Request) -> list[dict[str, Any]]:
    """Return the runs.

    Raises ApiError for a request without a key that is not of this machine and origin, with
    `insecure=true` too.
    """
    settings, origin = request.app.state.settings, request.headers.get("origin")
    if not settings.api_keys:  # else Admission has checked the key
        check_local(request.scope, settings)
        if origin and origin.partition("://")[2] != request.headers["host"]:
            message = "The runs are not shown to pages of other origins."
            raise ApiError(403, message, code="origin_not_allowed")
    return await asyncio.to_thread(find_runs, Path(settings.runs_dir))


def find_runs(runs_dir: Path) -> list[dict[str, Any]]:
    """Return the runs under a directory, the newest first, at most MAX_RUNS.

    Each is as `/v1/runs` lists it; `report` is the path of its report, None without one.
    """
    found = []
    for run in directory.find_runs(runs_dir)[:MAX_RUNS]:
        with suppress(FileNotFoundError):  # removed meanwhile
            found.append(_describe(run, runs_dir))
    return found


def leaderboards(runs_dir: Path, folders: Iterable[str]) -> dict[str, Any]:
    """Return the rows of the leaderboards of sweeps, by their folder."""
    paths = {folder: runs_dir / folder / "leaderboard.json" for folder in folders if folder}
    found = {folder: _read(_read_leaderboard, path)[0] for folder, path in paths.items()}
    return {folder: content["rows"] for folder, content in found.items() if content}


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


def _read_leaderboard(path: Path) -> dict[str, Any]:
    """Return the rows of a sweep's comparison: labels, counts of seeds, and finite results."""
    with open_regular(path, MAX_CONFIG_BYTES) as file:
        rows = STORED_ROWS.validate_json(file.read())
    shown = []
    for row in rows[:MAX_RUNS]:
        about = {"label": row["checkpoint"][:MAX_TEXT], "seeds": len(row["about"]["seeds"])}
        shown.append(about | {k: v for k, v in row["results"].items() if abs(v) < MAX_NUMBER})
    return {"rows": shown}


def _read_values(path: Path) -> dict[str, Any]:
    """Return the plain values of the summary: the results of a run, not its paths or inputs."""
    return {
        key: value[:MAX_TEXT] if isinstance(value, str) else value
        for key, value in read_summary(path).items()
        if isinstance(value, str) or (isinstance(value, int | float) and abs(value) < MAX_NUMBER)
    }


def _read_budget(path: Path) -> dict[str, Any]:
    """Return the stage and the budget of a configuration.

    Merge keys (`<<`) and anchors can make a small file of YAML exponentially large: the former stay
    as they are, and lists and mappings, which hold the latter, are not shown.
    """
    with open_regular(path, MAX_CONFIG_BYTES) as file:
        config = yaml.load(file, yaml.BaseLoader)  # all scalars are text
    if not isinstance(config, dict):
        raise ValueError("not a mapping")
    stage, max_steps = (
        value if isinstance(value := config.get(key), str) else "" for key in ("stage", "max_steps")
    )
    return {"stage": stage or None, "max_steps": int(max_steps) if max_steps.isdecimal() else None}
