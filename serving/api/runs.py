"""The runs with their curves and reports.

They contain paths and samples of private text, so stricter rules hold than for the API: without
keys only this machine itself is answered, not through a proxy, nor a page of another origin.
"""

import asyncio
import html
from pathlib import Path
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, HTMLResponse
from starlette.datastructures import Headers
from starlette.types import Scope

from serving.api import run_files
from serving.api.auth import check_local
from serving.api.call import json_response
from serving.api.errors import ApiError
from serving.api.pages import HEADERS, STATIC
from serving.api.run_files import Run

# A report brings its own style and pictures, and nothing in it runs or is sent anywhere.
REPORT_HEADERS = {
    **HEADERS,
    "Content-Security-Policy": (
        "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        "frame-ancestors 'self'"
    ),
}
LIST_MARK = "<!-- the runs -->"  # in runs.html

router = APIRouter()


@router.get("/runs", include_in_schema=False)
async def page(request: Request) -> Response:
    """Return the page of the runs: plain links to their reports, of which its script makes more."""
    found = await _runs(request)
    # Relative, as a proxy may serve this page below a path of its own.
    links = "".join(
        f'<li><a href="{html.escape((url or "#").removeprefix("/"))}">{html.escape(run.name)}</a>'
        for url, run in ((_report_url(request, run), run) for run in found)
    )
    return _document(f"<ul>{links}</ul>" if found else "", 200)


@router.get("/v1/runs")
async def runs(request: Request) -> Response:
    """List the runs, the newest first, with their metrics and curves."""
    client = request.app.state.client
    models = client.models() if client.connected else []
    served = {name: model.id for model in models for name in (model.id, *model.aliases)}
    listed = [
        {
            **run.describe(),
            "model": served.get(run.name),
            "report": _report_url(request, run),
        }
        for run in await _runs(request)
    ]
    return json_response({"object": "list", "data": listed})


@router.get("/runs/{name:path}/report.html", include_in_schema=False)
async def report(request: Request, name: str) -> Response:
    """Return a run's report, as a document without rights; raises ApiError for an unknown run."""
    found = next((run for run in await _runs(request) if run.name == name), None)
    if found is None or found.report_path is None:
        raise ApiError(404, f"There is no run {name!r} with a report.", code="not_found")
    return FileResponse(found.report_path, headers=REPORT_HEADERS)


def key_page(scope: Scope, status: int) -> Response | None:
    """Return the empty page of the runs, with a field for the key, for a browser without one."""
    is_page = (scope["method"], scope["path"]) == ("GET", "/runs")
    if status not in (401, 403) or not is_page:
        return None
    accepted = Headers(scope=scope).get("accept", "")
    return _document("", status) if "text/html" in accepted else None


async def _runs(request: Request) -> list[Run]:
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
    return await asyncio.to_thread(run_files.find_runs, Path(settings.runs_dir))


def _report_url(request: Request, run: Run) -> str | None:
    """Return where a run's report is, with a ticket: a browser opens it without headers."""
    if run.report_path is None:
        return None
    path = f"/runs/{run.name}/report.html"
    keys = request.app.state.api_keys
    return quote(path) + (f"?ticket={keys.ticket(path)}" if keys else "")


def _document(listed: str, status: int) -> HTMLResponse:
    content = (STATIC / "runs.html").read_text(encoding="utf-8").replace(LIST_MARK, listed)
    return HTMLResponse(content, status, {**HEADERS, "Cache-Control": "no-store"})
