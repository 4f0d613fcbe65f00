"""How the server is: alive, ready, busy with what."""

import platform
import time
from contextlib import suppress

from fastapi import APIRouter, Request, Response
from msgspec.structs import asdict

import nanogpt
from serving.api.errors import ApiError
from serving.api.front_end import front_end, json_response
from serving.engine.client import STALLED, EngineError
from serving.engine.messages import Histogram, Stats

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """Say that this front end lives, and whether the engine does (it is restarted if not)."""
    client = front_end(request).client
    engine = "stalled" if client.stalled else "up" if client.connected else "down"
    return json_response({"status": "ok", "engine": engine})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Say whether requests are welcome: 503 while the engine starts and while the server ends."""
    front = front_end(request)
    if front.draining:
        raise ApiError(503, "The server is ending.", code="unavailable")
    if not front.client.connected:
        why = STALLED if front.client.stalled else "The engine is starting."
        raise ApiError(503, why, code="unavailable")
    return json_response({"status": "ready", "models": len(front.client.models())})


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Return the counters for Prometheus."""
    content = front_end(request).metrics.render(await _stats(request))
    return Response(content, media_type=PROMETHEUS)


@router.get("/v1/system_info")
@router.get("/system_info", include_in_schema=False)
async def system_info(request: Request) -> Response:
    """Describe the server and what it is doing."""
    front = front_end(request)
    stats = await _stats(request)
    settings = front.settings
    return json_response(
        {
            "name": "nanogpt",
            "version": nanogpt.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "uptime_s": round(time.time() - front.began, 1),
            "models": [model.id for model in front.client.models()] if stats else [],
            "engine": _plain(stats) if stats else None,
            "limits": {
                "max_n": settings.max_n,
                "max_prompts": settings.max_prompts,
                "max_body_bytes": settings.max_body_bytes,
                "max_open": settings.max_open,
            },
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


async def _stats(request: Request) -> Stats | None:
    with suppress(EngineError):
        return await front_end(request).client.stats()
    return None


def _plain(stats: Stats) -> dict[str, object]:
    return {k: asdict(v) if isinstance(v, Histogram) else v for k, v in asdict(stats).items()}
