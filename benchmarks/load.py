"""Load an OpenAI-compatible server with streams, and time what comes back.

    python benchmarks/load.py http://127.0.0.1:5001/v1 --concurrency 32 --requests 128
    python benchmarks/load.py http://127.0.0.1:5001/v1 --burst 1000
    python benchmarks/load.py http://127.0.0.1:5001/v1 --disconnects 1000

Each of `--concurrency` clients sends a request, reads its stream to the end, and sends the next.
With `--burst` all requests are sent at one moment, and `/health` is polled meanwhile. With
`--disconnects` each client leaves at a random moment, and `/metrics` of a nanogpt server shows the
requests, slots and memory that are still in use.

Prompts are random words, all different, so that no cache answers them. It speaks HTTP itself: a
client library would take longer than the server. It shares the machine, so its own delay is
reported (`loop_lag_s`), and times count from when a request is sent.
"""

import argparse
import asyncio
import http.client
import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WORDS = ("one", "two", "three", "four", "five", "red", "green", "blue", "day", "night", "sea")
PROBE_S = 0.01  # between two requests of /health
SETTLE_S = 10.0  # for a server to tidy up after clients that left
LEAVE_S = 1.0  # the longest that one of --disconnects stays
LEFT_BEHIND = {
    "http_requests_open": "nanogpt_http_requests_open",
    "slots_used": "nanogpt_engine_slots_used",
    "queued": "nanogpt_engine_queued",
    "tasks": "nanogpt_front_end_tasks",
    "file_descriptors": "process_open_fds",
    "memory_bytes": "process_resident_memory_bytes",
}


@dataclass
class Outcome:
    """What became of one request; times in seconds."""

    status: int = 0  # none came
    first_s: float | None = None  # arrival of the first text
    total_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # between pieces of text
    pieces: int = 0  # of text
    tokens: int = 0  # of the usage, or else the pieces
    complete: bool = False  # a stream's end came, and no error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load and print its metrics; return 1 where a request was not answered well."""
    options = parser().parse_args(arguments)
    mode, expected = load, {"200"}
    if options.burst:
        mode, expected = burst, {"200", "429", "503"}
    elif options.disconnects:
        mode, expected = disconnects, {"0", "200"}
    report = run(mode(options))
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return int(not set(report["statuses"]) <= expected or report.get("broken", 0) > 0)


async def load(options: argparse.Namespace) -> dict[str, Any]:
    """Send `options.requests` requests, `options.concurrency` at a time; return the metrics."""
    waiting = requests(options, options.requests)
    outcomes: list[Outcome] = []

    async def client() -> None:
        while waiting:
            outcomes.append(await send(options.url, waiting.pop()))

    lags: list[float] = []
    measuring = asyncio.create_task(_measure_lag(lags))
    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(options.concurrency)))
    seconds = time.perf_counter() - began
    measuring.cancel()
    return summarize(outcomes, seconds, lags, options)


async def burst(options: argparse.Namespace) -> dict[str, Any]:
    """Send `options.burst` requests at once; return the metrics with those of /health."""
    options.requests = options.concurrency = options.burst
    with _Health(options.url) as health:
        report = await load(options)
    return {**report, "health_s": _spread(health.times_s)}


async def disconnects(options: argparse.Namespace) -> dict[str, Any]:
    """Leave `options.disconnects` times, and return what was there before and is there after."""
    chance = random.Random(options.seed)
    waiting = requests(options, options.disconnects)
    outcomes: list[Outcome] = []
    rounds = [_metrics(options)]

    async def client() -> None:
        while waiting:
            request = waiting.pop()
            part = chance.randrange(len(request)) if chance.random() < 0.2 else len(request)
            stay_s = chance.random() ** 3 * LEAVE_S
            outcomes.append(await send(options.url, request[:part], stay_s))

    for left in (options.disconnects // 2, 0):  # memory is flat where the second half adds none
        ended = [asyncio.create_task(client()) for _ in range(options.concurrency)]
        while len(waiting) > left:
            await asyncio.sleep(0.05)
        later, waiting[:] = waiting[:left], []
        await asyncio.gather(*ended)
        rounds.append(await _settled(options, rounds[0]))
        waiting[:] = later
    names = ("before", "after_half", "after")
    statuses = {str(status): n for status, n in Counter(o.status for o in outcomes).items()}
    return {"statuses": statuses, **dict(zip(names, rounds, strict=True))}


def summarize(
    outcomes: list[Outcome], seconds: float, lags: list[float], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the metrics of the outcomes."""
    answered = [o for o in outcomes if o.status == 200]
    tokens = sum(o.tokens for o in answered)
    return {
        "url": options.url,
        "concurrency": options.concurrency,
        "requests": options.requests,
        "prompt_words": options.prompt_words,
        "max_tokens": options.max_tokens,
        "statuses": {str(k): n for k, n in Counter(o.status for o in outcomes).items()},
        "broken": sum(not o.complete for o in answered),
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "pieces": sum(o.pieces for o in answered),
        "tokens_per_s": round(tokens / seconds, 1),
        "first_token_s": _spread([o.first_s for o in answered if o.first_s is not None]),
        "between_pieces_s": _spread([gap for o in answered for gap in o.gaps_s]),
        "request_s": _spread([o.total_s for o in answered]),
        "refused_s": _spread([o.total_s for o in outcomes if o.status != 200]),
        "loop_lag_s": _spread(lags),
    }


async def send(url: str, request: bytes, stay_s: float | None = None) -> Outcome:
    """Send one request and read its answer, to the end or for `stay_s` seconds."""
    place = urlsplit(url)
    loop, outcome = asyncio.get_running_loop(), Outcome()
    ended: asyncio.Future[None] = loop.create_future()
    secure = place.scheme == "https"
    port = place.port or (443 if secure else 80)
    try:
        transport, _ = await loop.create_connection(
            lambda: _Exchange(request, outcome, ended),
            place.hostname or "",
            port,
            ssl=secure or None,
        )
    except OSError:
        return outcome
    await asyncio.wait([ended], timeout=stay_s)
    transport.abort()
    return outcome


def requests(options: argparse.Namespace, n: int) -> list[bytes]:
    """Return requests that are the same for the same seed."""
    chance = random.Random(options.seed)
    return [_request(options, chance) for _ in range(n)]


def content_of(request: bytes) -> Any:
    """Return the parsed body of a request."""
    return json.loads(request.partition(b"\r\n\r\n")[2])


def run(work: Any) -> Any:
    """Run on the faster event loop where that is installed, as the server does."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    loop = uvloop.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


class _Exchange(asyncio.Protocol):
    """One request, and the outcome read from the lines of its answer."""

    def __init__(self, request: bytes, outcome: Outcome, ended: "asyncio.Future[None]") -> None:
        self.request, self.outcome, self.ended = request, outcome, ended
        self.rest = b""
        self.failed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.began = self.last = time.perf_counter()
        transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self.outcome.total_s = now - self.began
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                self._event(line, now)
            elif line.startswith(b"data: [DONE]"):
                self.outcome.complete = not self.failed
            elif not self.outcome.status and line.startswith(b"HTTP/1.1 "):
                self.outcome.status = int(line[9:12])

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def _event(self, line: bytes, now: float) -> None:
        outcome = self.outcome
        line = line.replace(b'": ', b'":')  # as some servers space it
        self.failed = self.failed or line.startswith(b'data: {"error"')
        if b'"finish_reason":"' in line:
            outcome.complete = not self.failed  # some servers send no [DONE]
        if b'"usage":{' in line:
            outcome.tokens = json.loads(line[6:])["usage"]["completion_tokens"]
        elif b'"content":"' in line or (b'"text":"' in line and b'"text":""' not in line):
            outcome.pieces += 1
            outcome.tokens += 1
            if outcome.first_s is None:
                outcome.first_s = now - self.began
            else:
                outcome.gaps_s.append(now - self.last)
            self.last = now


class _Health:
    """A process that polls /health, and the time of each answer."""

    def __init__(self, url: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._ready, self._over = context.Event(), context.Event()
        self._times, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_probe, args=(url, self._ready, self._over, theirs))
        self.times_s: list[float] = []

    def __enter__(self) -> "_Health":
        self._process.start()
        self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.times_s = self._times.recv()
        self._process.join()


def _probe(url: str, ready: Event, over: Event, times: Any) -> None:
    place = urlsplit(url)
    found: list[float] = []
    while not over.wait(PROBE_S):
        began = time.perf_counter()
        connection = http.client.HTTPConnection(place.hostname or "", place.port or 80, timeout=30)
        connection.request("GET", "/health")
        connection.getresponse().read()
        connection.close()
        found.append(time.perf_counter() - began)
        ready.set()
    times.send(found)


def _request(options: argparse.Namespace, chance: random.Random) -> bytes:
    text = " ".join(chance.choices(WORDS, k=options.prompt_words))
    prompt: dict[str, Any] = {"prompt": text}
    if options.route == "/chat/completions":
        prompt = {"messages": [{"role": "user", "content": text}]}
    content = {
        "model": options.model,
        **prompt,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if options.ignore_eos else {}),
        **({"guided_json": json.loads(options.schema)} if options.schema else {}),
    }
    body = json.dumps(content)
    place = urlsplit(options.url)
    return (
        f"POST {place.path.rstrip('/')}{options.route} HTTP/1.1\r\nHost: {place.netloc}\r\n"
        f"Content-Type: application/json\r\nAuthorization: Bearer {options.key}\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def _metrics(options: argparse.Namespace) -> dict[str, float]:
    """Return what a nanogpt server holds now; this request included."""
    place = urlsplit(options.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port or 80, timeout=30)
    connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {options.key}"})
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    samples = [line for line in lines if line and not line.startswith("#")]
    values = {line.split("{")[0].split(" ")[0]: float(line.split()[-1]) for line in samples}
    return {name: values[metric] for name, metric in LEFT_BEHIND.items() if metric in values}


async def _settled(options: argparse.Namespace, before: dict[str, float]) -> dict[str, float]:
    """Return what the server holds once that is as little as before, or after a while."""
    for _ in range(int(SETTLE_S / 0.1)):
        await asyncio.sleep(0.1)
        now = await asyncio.to_thread(_metrics, options)
        if all(now[name] <= before[name] for name in now if name != "memory_bytes"):
            break
    return now


async def _measure_lag(lags: list[float]) -> None:
    while True:
        began = time.perf_counter()
        await asyncio.sleep(0.01)
        lags.append(time.perf_counter() - began - 0.01)


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 5)

    return {"p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "max": round(ordered[-1], 5)}


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description="Load an OpenAI-compatible server with streams.")
    parser.add_argument("url", help="the base URL, with /v1")
    parser.add_argument("--concurrency", type=int, default=32, help="streams at a time")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--burst", type=int, default=0, help="so many requests at one moment")
    parser.add_argument("--disconnects", type=int, default=0, help="so many clients that leave")
    parser.add_argument("--prompt-words", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--route", default="/completions", help="or /chat/completions")
    parser.add_argument("--model", default="")
    parser.add_argument("--key", default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ignore-eos", action="store_true", help="where the server knows it")
    parser.add_argument("--schema", help="of JSON, that answers follow, where the server can")
    parser.add_argument("--json", help="also write the metrics there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
