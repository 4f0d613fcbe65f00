"""Load an OpenAI-compatible server with streams, and time what comes back.

    python benchmarks/load.py http://127.0.0.1:5001/v1 --concurrency 32 --requests 128

Each of `--concurrency` clients asks, reads its stream to the end, and asks again. Prompts are
random words, all different, so that no cache answers them. It speaks HTTP itself: a client library
would take longer than the server. It shares the machine, so its own delay is told (`loop_lag_s`).
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WORDS = ("one", "two", "three", "four", "five", "red", "green", "blue", "day", "night", "sea")


@dataclass
class Outcome:
    """What became of one request; times in seconds."""

    status: int
    first_s: float | None = None  # arrival of the first text
    total_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # between pieces of text
    pieces: int = 0  # of text
    tokens: int = 0  # as the usage says, or else the pieces


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load and print its figures; return 1 where a request was not answered with 200."""
    options = parser().parse_args(arguments)
    report = asyncio.run(load(options))
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return int(set(report["statuses"]) != {"200"})


async def load(options: argparse.Namespace) -> dict[str, Any]:
    """Ask `options.requests` times, `options.concurrency` at a time, and return the figures."""
    chance = random.Random(options.seed)
    waiting = [_body(options, chance) for _ in range(options.requests)]
    outcomes: list[Outcome] = []
    lags: list[float] = []

    async def client() -> None:
        while waiting:
            outcomes.append(await ask(options.url, options.route, waiting.pop(), options.key))

    measuring = asyncio.create_task(_measure_lag(lags))
    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(options.concurrency)))
    seconds = time.perf_counter() - began
    measuring.cancel()
    return figures(outcomes, seconds, lags, options)


def figures(
    outcomes: list[Outcome], seconds: float, lags: list[float], options: argparse.Namespace
) -> dict[str, Any]:
    """Return what the outcomes amount to."""
    answered = [o for o in outcomes if o.status == 200]
    tokens = sum(o.tokens for o in answered)
    return {
        "url": options.url,
        "concurrency": options.concurrency,
        "requests": options.requests,
        "prompt_words": options.prompt_words,
        "max_tokens": options.max_tokens,
        "statuses": {str(k): n for k, n in Counter(o.status for o in outcomes).items()},
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


async def ask(url: str, route: str, body: bytes, key: str) -> Outcome:
    """Send one request and read its stream to the end."""
    place = urlsplit(url)
    began = time.perf_counter()
    secure = place.scheme == "https"
    port = place.port or (443 if secure else 80)
    try:
        reader, writer = await asyncio.open_connection(place.hostname, port, ssl=secure or None)
    except OSError:
        return Outcome(0, total_s=time.perf_counter() - began)
    path = place.path.rstrip("/") + route
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    try:
        status = (await reader.readline()).split(b" ")
        outcome = Outcome(int(status[1]) if len(status) > 1 else 0)
        await _read(reader, outcome, began)
    except OSError:
        outcome = Outcome(0)
    writer.close()
    outcome.total_s = time.perf_counter() - began
    return outcome


async def _read(reader: asyncio.StreamReader, outcome: Outcome, began: float) -> None:
    last = began
    usage = 0
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue  # headers, the sizes of chunks, blank lines, pings
        now = time.perf_counter()
        if b'"usage":{' in line:
            usage = json.loads(line[6:])["usage"]["completion_tokens"]
        if b'"content":"' in line or (b'"text":"' in line and b'"text":""' not in line):
            outcome.pieces += 1
            if outcome.first_s is None:
                outcome.first_s = now - began
            else:
                outcome.gaps_s.append(now - last)
            last = now
    outcome.tokens = usage or outcome.pieces


def _body(options: argparse.Namespace, chance: random.Random) -> bytes:
    text = " ".join(chance.choices(WORDS, k=options.prompt_words))
    prompt: dict[str, Any] = {"prompt": text}
    if options.route == "/chat/completions":
        prompt = {"messages": [{"role": "user", "content": text}]}
    asked = {
        "model": options.model,
        **prompt,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if options.ignore_eos else {}),
    }
    return json.dumps(asked).encode()


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
    parser.add_argument("--prompt-words", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--route", default="/completions", help="or /chat/completions")
    parser.add_argument("--model", default="")
    parser.add_argument("--key", default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ignore-eos", action="store_true", help="where the server knows it")
    parser.add_argument("--json", help="write the figures there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
