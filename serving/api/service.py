"""The state of the server: health, readiness, routes, and metrics for Prometheus.

Each of several front ends counts its own requests, with its process id as `front_end`; the metrics
of the engine are the same at all of them.
"""

import asyncio
import os
import platform
import time
from collections.abc import Iterator
from itertools import accumulate

import prometheus_client as prometheus
from fastapi import APIRouter, Request, Response
from msgspec import structs, to_builtins
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

import nanogpt
from serving.api.call import json_response
from serving.api.errors import ApiError
from serving.engine.client import STALLED
from serving.engine.messages import Stats

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
LIMITS = ("max_n", "max_prompts", "max_body_bytes", "max_open")
DURATIONS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
COUNTERS = {
    "requests": "requests received",
    "finished": "answers computed to their end",
    "failed": "requests failed",
    "cancelled": "requests whose client left",
    "prompt_tokens": "tokens of prompts",
    "cached_tokens": "tokens of prompts that were not computed again",
    "completion_tokens": "tokens generated",
    "steps": "steps of the model",
}
GAUGES = {
    "slots": "sequences that can be computed at a time",
    "slots_used": "sequences being computed",
    "queued": "requests waiting for a slot",
}
HISTOGRAMS = {
    "queue_s": ("queue_seconds", "wait for a slot"),
    "first_token_s": ("time_to_first_token_seconds", "arrival to first token"),
    "inter_token_s": ("inter_token_seconds", "time between two tokens of an answer"),
}

router = APIRouter()
prometheus.disable_created_metrics()  # when each counter began: as many series again


class Metrics(Collector):
    """The metrics of a front end, each with its process id, and of the engine at a scrape."""

    def __init__(self) -> None:
        own = self._own = prometheus.CollectorRegistry()
        name, labels = "nanogpt_http_requests", ("method", "path", "status")
        self._requests = prometheus.Counter(name, "requests answered", labels, registry=own)
        self.open = prometheus.Gauge(f"{name}_open", "requests being answered", registry=own)
        name, text = "nanogpt_http_request_seconds", "arrival to the end of the answer"
        self._seconds = prometheus.Histogram(name, text, buckets=DURATIONS_S, registry=own)
        name, text = "nanogpt_front_end_tasks", "tasks of the event loop"
        tasks = prometheus.Gauge(name, text, registry=own)
        tasks.set_function(lambda: len(asyncio.all_tasks()))
        prometheus.ProcessCollector(registry=own)
        self._engine: Stats | None = None

    def count(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count the end of a request; status 0 is a client that left before the answer."""
        known = method if method in ("GET", "POST") else "other"
        self._requests.labels(known, path, str(status)).inc()
        self._seconds.observe(seconds)

    def render(self, engine: Stats | None) -> bytes:
        """Return all metrics; without an engine that answers, `nanogpt_engine_up` is 0."""
        self._engine = engine
        return prometheus.generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        front_end = {"front_end": str(os.getpid())}
        for metric in self._own.collect():
            samples = metric.samples
            metric.samples = [s._replace(labels={**s.labels, **front_end}) for s in samples]
            yield metric
        stats, name, text = self._engine, "nanogpt_engine_up", "whether the engine answers"
        yield GaugeMetricFamily(name, text, stats is not None)
        if stats is None:
            return
        for family, fields in ((CounterMetricFamily, COUNTERS), (GaugeMetricFamily, GAUGES)):
            for field, text in fields.items():
                yield family(f"nanogpt_engine_{field}", text, value=getattr(stats, field))
        for field, (name, text) in HISTOGRAMS.items():
            data = getattr(stats, field)
            bounds = [*map(str, data.bounds), "+Inf"]
            buckets = list(zip(bounds, accumulate(data.counts), strict=True))
            yield HistogramMetricFamily(f"nanogpt_{name}", text, buckets, data.total)


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
