"""Metrics for Prometheus: the requests of this front end, and the work of the engine.

Each of several front ends counts its own requests, with its process id as `front_end`; the metrics
of the engine are the same at all of them.
"""

import asyncio
import os
from collections.abc import Iterator
from itertools import accumulate

import prometheus_client as prometheus
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from serving.engine.messages import Stats

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
        name, text = "nanogpt_engine_up", "whether the engine answers"
        yield GaugeMetricFamily(name, text, value=self._engine is not None)
        if self._engine is not None:
            yield from _engine_metrics(self._engine)


def _engine_metrics(stats: Stats) -> Iterator[Metric]:
    for field, text in COUNTERS.items():
        name, value = f"nanogpt_engine_{field}", getattr(stats, field)
        yield CounterMetricFamily(name, text, value=value)
    for field, text in GAUGES.items():
        name, value = f"nanogpt_engine_{field}", getattr(stats, field)
        yield GaugeMetricFamily(name, text, value=value)
    for field, (name, text) in HISTOGRAMS.items():
        data = getattr(stats, field)
        bounds = [*map(str, data.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(data.counts), strict=True))
        yield HistogramMetricFamily(f"nanogpt_{name}", text, buckets, data.total)
