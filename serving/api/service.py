"""The state of the server: health, readiness, metrics, routes."""

import platform
import time

from fastapi import APIRouter, Request, Response
from msgspec import structs, to_builtins

import nanogpt
from serving.api.call import json_response
from serving.api.errors import ApiError
from serving.engine.client import STALLED

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
LIMITS = ("max_n", "max_prompts", "max_body_bytes", "max_open")

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """Return whether this front end lives, and whether the engine does (it is restarted if not)."""
    client = request.app.state.client
    engine = "stalled" if client.stalled else "up" if client.connected else "down"
    return json_response({"status": "ok", "engine": engine})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Return whether requests are answered; raises ApiError while the server starts or ends."""
    client = request.app.state.client
    if request.app.state.draining:
        raise ApiError(503, "The server is ending.", code="unavailable")
    if not client.connected:
        why = STALLED if client.stalled else "The engine is starting."
        raise ApiError(503, why, code="unavailable")
    return json_response({"status": "ready", "models": len(client.models())})


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Return the metrics for Prometheus."""
    content = request.app.state.metrics.render(request.app.state.client.stats)
    return Response(content, media_type=PROMETHEUS)


@router.get("/v1/system_info")
@router.get("/system_info", include_in_schema=False)
async def system_info(request: Request) -> Response:
    """Describe the server and its load."""
    state, stats = request.app.state, request.app.state.client.stats
    return json_response(
        {
            "name": "nanogpt",
            "version": nanogpt.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "uptime_s": round(time.time() - state.started, 1),
            "models": [model.id for model in state.client.models()] if stats else [],
            "engine": to_builtins(structs.asdict(stats)) if stats else None,
            "limits": {name: getattr(state.settings, name) for name in LIMITS},
        }
    )


@router.get("/v1")
async def index(request: Request) -> Response:
    """List the routes."""
    listed = [
        {"path": path, "methods": [method.upper() for method in methods]}
        for path, methods in request.app.openapi()["paths"].items()
    ]
    return json_response({"object": "list", "data": listed})
