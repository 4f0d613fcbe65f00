"""What was trained: the runs with their curves, each with its report.

Runs tell paths and samples of private text, so other rules hold than for the API: without keys
only this machine itself is answered, not through a proxy, and not for a page of another origin.
"""

import asyncio
import html
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, HTMLResponse
from starlette.datastructures import Headers
from starlette.types import Scope

from serving.api import run_files
from serving.api.auth import check_local
from serving.api.errors import ApiError
from serving.api.front_end import front_end, json_response
from serving.api.pages import HEADERS, STATIC
from serving.api.run_files import Run
from serving.engine.messages import ModelInfo

# A report brings its own style and pictures, and nothing in it runs or is sent anywhere.
REPORT_HEADERS = {
    **HEADERS,
    "Content-Security-Policy": (
        "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        "frame-ancestors 'self'"
    ),
}
PLACE = "<!-- the runs -->"  # in runs.html

router = APIRouter()


@router.get("/runs", include_in_schema=False)
async def page(request: Request) -> Response:
    """Return the page of the runs: plain links to their reports, of which its script makes more."""
    check_asker(request)
    found = await _runs(request)
    # Relative, as a proxy may serve this page below a path of its own.
    urls = ((_report_url(request, run) or "#").removeprefix("/") for run in found)
    links = "".join(
        f'<li><a href="{html.escape(url)}">{html.escape(run.name)}</a>'
        for url, run in zip(urls, found, strict=True)
    )
    return _document(f"<ul>{links}</ul>" if found else "", 200)


@router.get("/v1/runs")
async def runs(request: Request) -> Response:
    """List the runs, the newest first, with their figures and curves."""
    check_asker(request)
    client = front_end(request).client
    models = client.models() if client.connected else []
    listed = [
        {
            **run.describe(),
            "model": _served_as(run.name, models),
            "report": _report_url(request, run),
        }
        for run in await _runs(request)
    ]
    return json_response({"object": "list", "data": listed})


@router.get("/runs/{name:path}/report.html", include_in_schema=False)
async def report(request: Request, name: str) -> Response:
    """Return a run's report, as a document without any rights."""
    check_asker(request)
    found = next((run for run in await _runs(request) if run.name == name), None)
    if found is None or found.report_path is None:
        raise ApiError(404, f"There is no run {name!r} with a report.", code="not_found")
    return FileResponse(found.report_path, headers=REPORT_HEADERS)


def check_asker(request: Request) -> None:
    """Raise ApiError for a request without a key that is not of this machine and origin.

    Holds with `insecure=true` too.
    """
    if request.app.state.api_keys:
        return  # Auth has checked one
    check_local(request.scope, front_end(request).settings)
    origin = request.headers.get("origin")
    if origin and origin.partition("://")[2] != request.headers["host"]:
        message = "The runs are not shown to pages of other origins."
        raise ApiError(403, message, code="origin_not_allowed")


def key_page(scope: Scope, status: int) -> Response | None:
    """Return the empty page of the runs, which asks for a key, for a browser that lacks one."""
    is_page = (scope["method"], scope["path"]) == ("GET", "/runs")
    if status not in (401, 403) or not is_page:
        return None
    accepted = Headers(scope=scope).get("accept", "")
    return _document("", status) if "text/html" in accepted else None


async def _runs(request: Request) -> list[Run]:
    runs_dir = Path(front_end(request).settings.runs_dir)
    return await asyncio.to_thread(run_files.find_runs, runs_dir)


def _report_url(request: Request, run: Run) -> str | None:
    """Return where a run's report is; what a browser opens has no headers, so a ticket is in it."""
    if run.report_path is None:
        return None
    path = f"/runs/{run.name}/report.html"
    keys = request.app.state.api_keys
    return quote(path) + (f"?ticket={keys.ticket(path)}" if keys else "")


def _served_as(name: str, models: Sequence[ModelInfo]) -> str | None:
    """Return the id by which a run's model can be asked."""
    return next((model.id for model in models if name in (model.id, *model.aliases)), None)


def _document(listed: str, status: int) -> HTMLResponse:
    content = (STATIC / "runs.html").read_text(encoding="utf-8").replace(PLACE, listed)
    return HTMLResponse(content, status, {**HEADERS, "Cache-Control": "no-store"})
