"""Counters in the words of Prometheus: this front end's requests, and the engine's work.

Each of several front ends counts its own requests, told apart by `front_end`; the engine's figures
are the same at all of them.
"""

import asyncio
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

from serving.engine.messages import Histogram, Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PROCESS = Path("/proc/self")  # of Linux
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


class Metrics:
    """What a front end counts of its requests."""

    def __init__(self) -> None:
        self.open = 0
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._durations = [0] * (len(DURATIONS_S) + 1)
        self._seconds = 0.0

    def count(self, method: str, path: str, status: int, seconds: float) -> None:
        """Note the end of a request; status 0 is a client that left before the answer."""
        self._requests[method if method in ("GET", "POST") else "other", path, status] += 1
        self._durations[bisect_left(DURATIONS_S, seconds)] += 1
        self._seconds += seconds

    def render(self, engine: Stats | None) -> str:
        """Return everything counted; without an engine that answers, `nanogpt_engine_up` is 0."""
        me = {"front_end": str(os.getpid())}
        lines = _head("http_requests_total", "counter", "requests answered")
        for (method, path, status), n in sorted(self._requests.items()):
            labels = {"method": method, "path": path, "status": str(status), **me}
            lines.append(_line("http_requests_total", n, labels))
        lines += _head("http_requests_open", "gauge", "requests being answered")
        lines.append(_line("http_requests_open", self.open, me))
        durations = Histogram(list(DURATIONS_S), self._durations, self._seconds)
        lines += _histogram(
            "http_request_seconds", "arrival to the end of the answer", durations, me
        )
        lines += _of_process(me)
        lines += _head("engine_up", "gauge", "whether the engine answers")
        lines.append(_line("engine_up", int(engine is not None)))
        return "\n".join([*lines, *(_of_engine(engine) if engine else []), ""])


def _of_process(me: Mapping[str, str]) -> list[str]:
    """Return what this process holds, where the system tells, by Prometheus's own names."""
    lines = _head("front_end_tasks", "gauge", "tasks of the event loop")
    with suppress(RuntimeError):  # no loop runs
        lines.append(_line("front_end_tasks", len(asyncio.all_tasks()), me))
    if PROCESS.is_dir():
        pages = int((PROCESS / "statm").read_text().split()[1])
        n_bytes = pages * os.sysconf("SC_PAGE_SIZE")
        n_open = len(list((PROCESS / "fd").iterdir()))
        for name, value, text in (
            ("resident_memory_bytes", n_bytes, "resident memory of the front end"),
            ("open_fds", n_open, "open file descriptors of the front end"),
        ):
            lines += _head(name, "gauge", text, prefix="process")
            lines.append(_line(name, value, me, prefix="process"))
    return lines


def _of_engine(stats: Stats) -> list[str]:
    lines: list[str] = []
    for field, text in COUNTERS.items():
        lines += _head(f"engine_{field}_total", "counter", text)
        lines.append(_line(f"engine_{field}_total", getattr(stats, field)))
    for field, text in GAUGES.items():
        lines += _head(f"engine_{field}", "gauge", text)
        lines.append(_line(f"engine_{field}", getattr(stats, field)))
    for field, (name, text) in HISTOGRAMS.items():
        lines += _histogram(name, text, getattr(stats, field), {})
    return lines


def _histogram(name: str, text: str, data: Histogram, labels: Mapping[str, str]) -> list[str]:
    bounds = [*(f"{bound:g}" for bound in data.bounds), "+Inf"]
    cumulative: Sequence[int] = list(accumulate(data.counts))
    buckets = [
        _line(f"{name}_bucket", n, {**labels, "le": bound})
        for bound, n in zip(bounds, cumulative, strict=True)
    ]
    n = cumulative[-1]
    ends = [_line(f"{name}_sum", data.total, labels), _line(f"{name}_count", n, labels)]
    return [*_head(name, "histogram", text), *buckets, *ends]


def _head(name: str, kind: str, text: str, prefix: str = "nanogpt") -> list[str]:
    return [f"# HELP {prefix}_{name} {text}", f"# TYPE {prefix}_{name} {kind}"]


def _line(
    name: str, value: float, labels: Mapping[str, str] | None = None, prefix: str = "nanogpt"
) -> str:
    inside = ",".join(f'{key}="{_escaped(value)}"' for key, value in (labels or {}).items())
    return f"{prefix}_{name}{{{inside}}} {value}" if inside else f"{prefix}_{name} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
