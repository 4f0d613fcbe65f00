"""The web pages: chat, runs and reports, with the list of the runs.

Page and files contain no data and need no key. Runs contain paths and samples of private text, so
stricter rules hold than for the API: without keys only this machine itself is answered, not through
a proxy, nor a page of another origin.
"""

import asyncio
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers
from starlette.types import Scope

from serving.api import run_files
from serving.api.auth import check_local
from serving.api.call import json_response
from serving.api.errors import ApiError

STATIC = Path(__file__).parent.parent / "static"
# Nothing from elsewhere, no script or style but the files'; reports are shown in frames.
POLICY = "; ".join(
    [
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect", "frame")),
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
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
LIST_MARK = "<!-- the runs -->"  # in runs.html

router = APIRouter()


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
async def runs_page(request: Request) -> Response:
    """Return the page of the runs: plain links to their reports, of which its script makes more."""
    # Relative, as a proxy may serve this page below a path of its own.
    links = [
        f'<li><a href="{escape((run["report"] or "#").removeprefix("/"))}">{escape(run["id"])}</a>'
        for run in await _runs(request)
    ]
    return _runs_document(f"<ul>{''.join(links)}</ul>" if links else "", 200)


@router.get("/v1/runs")
async def runs(request: Request) -> Response:
    """List the runs, the newest first, with their metrics and curves."""
    client = request.app.state.client
    models = client.models() if client.connected else []
    served = {name: model.id for model in models for name in (model.id, *model.aliases)}
    listed = [{**run, "model": served.get(run["id"])} for run in await _runs(request)]
    return json_response({"object": "list", "data": listed})


@router.get("/runs/{name:path}/report.html", include_in_schema=False)
async def report(request: Request, name: str) -> Response:
    """Return a run's report, as a document without rights; raises ApiError for an unknown run."""
    paths = {run["id"]: run["report"] for run in await _find_runs(request)}
    if paths.get(name) is None:
        raise ApiError(404, f"There is no run {name!r} with a report.", code="not_found")
    return FileResponse(paths[name], headers=REPORT_HEADERS)


def key_page(scope: Scope, status: int) -> Response | None:
    """Return the empty page of the runs, with a field for the key, for a browser without one."""
    is_page = (scope["method"], scope["path"]) == ("GET", "/runs")
    if status not in (401, 403) or not is_page:
        return None
    accepted = Headers(scope=scope).get("accept", "")
    return _runs_document("", status) if "text/html" in accepted else None


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
    return await asyncio.to_thread(run_files.find_runs, Path(settings.runs_dir))


async def _runs(request: Request) -> list[dict[str, Any]]:
    """Return the runs; a report is its URL, with a ticket: a browser opens it without headers."""
    runs, keys = await _find_runs(request), request.app.state.api_keys
    for run in runs:
        if run["report"]:
            path = f"/runs/{run['id']}/report.html"
            run["report"] = quote(path) + (f"?ticket={keys.ticket(path)}" if keys else "")
    return runs


def _runs_document(listed: str, status: int) -> HTMLResponse:
    content = (STATIC / "runs.html").read_text(encoding="utf-8").replace(LIST_MARK, listed)
    return HTMLResponse(content, status, {**HEADERS, "Cache-Control": "no-store"})
