"""What HTTP costs: before an engine that only counts, and before a real one.

    python benchmarks/front_end.py
    python benchmarks/front_end.py --checkpoint RUN --rounds 5
    python benchmarks/front_end.py --checkpoint RUN --rounds 7 --schema

The first measures how many streamed tokens per second one front end ships, of an engine that sends
a token to each of its streams in one frame, as fast as they are taken or at a given pace. Where the
front end is behind, it puts several tokens into one piece (`pieces` and `tokens`).

The second sends an engine the same requests straight through EngineClient and through HTTP, in
turns, and prints the share of the engine's own throughput that HTTP leaves. The third sends through
HTTP requests without and with a JSON schema, whose answers are equally long, in turns, and prints
the ratio of each pair's throughputs, and of the server's processor time per token (Linux).
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import load

from nanogpt.tokenizer import byte_tokenizer, from_record
from serving.engine.client import EngineClient, EngineProcess
from serving.engine.messages import (
    Cancel,
    Describe,
    Generate,
    Message,
    ModelDetails,
    ModelInfo,
    Models,
    SamplingParams,
    Settings,
    Tokens,
    read_frame,
    to_frame,
)

ROOT = Path(__file__).parent.parent
PORT = 5099
URL = f"http://127.0.0.1:{PORT}"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 3},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 1000}  # of more tokens than an answer has


def main() -> int:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2000, help="of each stream")
    parser.add_argument("--tokens-per-s", type=int, default=0, help="of the engine; 0: no pause")
    parser.add_argument("--checkpoint", help="measure a real engine with this model")
    parser.add_argument("--dtype", default="auto", help="of the real engine")
    parser.add_argument("--rounds", type=int, default=5, help="of each of the two ways")
    parser.add_argument("--schema", action="store_true", help="compare answers by a JSON schema")
    options = parser.parse_args()
    if options.checkpoint:
        compare = share_with_schema if options.schema else share_of_engine
        print(json.dumps(compare(options), indent=2))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        address = f"{directory}/engine.sock"
        engine = multiprocessing.get_context("spawn").Process(
            target=count, args=(address, options.tokens_per_s), daemon=True
        )
        engine.start()
        try:
            with front_end(f"unix:{address}"):
                command = [sys.executable, str(ROOT / "benchmarks" / "load.py"), f"{URL}/v1"]
                command += ["--concurrency", str(options.streams)]
                command += ["--requests", str(options.streams), "--max-tokens", str(options.tokens)]
                return subprocess.run(command).returncode
        finally:
            engine.terminate()
            _print_cpu()


def share_of_engine(options: argparse.Namespace) -> dict[str, object]:
    """Return the tokens per second of each round, straight and through HTTP, and their ratio."""
    settings = Settings(models=options.checkpoint, dtype=options.dtype)
    engine = EngineProcess(settings)
    engine.start()
    flags = ["--concurrency", str(options.streams), "--requests", str(options.streams)]
    flags += ["--max-tokens", str(options.tokens), "--ignore-eos"]
    straight: list[float] = []
    through_http: list[float] = []
    try:
        with front_end(engine.address):
            for number in range(2 * (options.rounds + 1)):  # other prompts each time: no cache
                seeded = load.parser().parse_args([f"{URL}/v1", *flags, "--seed", str(number)])
                if number % 4 in (0, 3):
                    straight.append(asyncio.run(_straight_rate(engine, seeded)))
                else:
                    through_http.append(_http_rate(seeded))
    finally:
        engine.stop()
    straight, through_http = straight[1:], through_http[1:]  # the first round warms up
    return {
        "checkpoint": options.checkpoint,
        "streams": options.streams,
        "tokens": options.tokens,
        "straight_tokens_per_s": straight,
        "http_tokens_per_s": through_http,
        "share": round(statistics.median(through_http) / statistics.median(straight), 3),
    }


def share_with_schema(options: argparse.Namespace) -> dict[str, object]:
    """Return how throughput and processor time per token change with a JSON schema, by rounds."""
    engine = EngineProcess(Settings(models=options.checkpoint, dtype=options.dtype))
    engine.start()
    flags = ["--concurrency", str(options.streams), "--requests", str(options.streams)]
    flags += ["--max-tokens", str(options.tokens), "--ignore-eos"]
    n_tokens = options.streams * options.tokens
    rates: dict[str, list[float]] = {"": [], json.dumps(PEOPLE): []}
    cpu_ms: dict[str, list[float]] = {schema: [] for schema in rates}
    try:
        with front_end(engine.address):
            for number in range(options.rounds + 1):  # other prompts each time: no cache
                for schema in sorted(rates, reverse=number % 2 == 1):
                    given = [f"{URL}/v1", *flags, "--seed", str(number), "--schema", schema]
                    began = _cpu_s()
                    rates[schema].append(_http_rate(load.parser().parse_args(given)))
                    cpu_ms[schema].append((_cpu_s() - began) / n_tokens * 1e3)
    finally:
        engine.stop()
    report: dict[str, object] = {"checkpoint": options.checkpoint, "streams": options.streams}
    for name, values in (("tokens_per_s", rates), ("cpu_ms_per_token", cpu_ms)):
        plain, bound = (own[1:] for own in values.values())  # the first round warms up
        ratios = sorted(b / a for a, b in zip(plain, bound, strict=True))
        report[name] = [round(statistics.median(own), 3) for own in (plain, bound)]
        report[f"ratio_of_{name}"] = {
            "median": round(statistics.median(ratios), 3),
            "min": round(ratios[0], 3),
            "max": round(ratios[-1], 3),
        }
    return report


def _cpu_s() -> float:
    """Return the processor time of the processes that this one has started, and theirs."""
    parents, ticks = dict[int, int](), dict[int, int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            fields = path.read_text().rpartition(") ")[2].split()
            pid = int(path.parent.name)
            parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    ours = {os.getpid()}
    while new := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= new
    return sum(ticks.get(pid, 0) for pid in ours - {os.getpid()}) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def front_end(engine: str) -> Iterator[None]:
    """Run a front end before the engine at an address."""
    variables = {"NANOGPT_ENGINE": engine, "NANOGPT_PORT": str(PORT)}
    front = subprocess.Popen(
        [sys.executable, "-m", "serving"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # a line for each request
    )
    try:
        asyncio.run(_ready(front))
        yield
    finally:
        front.terminate()
        front.wait()


def _http_rate(options: argparse.Namespace) -> float:
    report = load.run(load.load(options))
    assert report["statuses"] == {"200": options.requests}, report["statuses"]
    return float(report["tokens_per_s"])


async def _straight_rate(engine: EngineProcess, options: argparse.Namespace) -> float:
    """Send the requests of load.py without HTTP."""
    client = EngineClient(engine.address)
    await client.connect()
    model = client.models()[0]
    tokenizer = from_record((await client.details(model)).tokenizer)
    prompts = [
        tokenizer.encode_prompt(load.content_of(request)["prompt"])
        for request in load.requests(options, options.requests)
    ]

    async def one(seed: int, ids: list[int]) -> int:
        params = SamplingParams(options.max_tokens, seed, ignore_eos=True)
        answers: asyncio.Queue[Message] = asyncio.Queue()
        client.submit(Generate(client.new_id(), model.id, ids, params), answers.put_nowait)
        n = 0
        while True:
            answer = await answers.get()
            assert isinstance(answer, Tokens)
            n += len(answer.ids)
            if answer.finish_reason:
                return n

    began = time.perf_counter()
    counts = await asyncio.gather(*(one(seed, ids) for seed, ids in enumerate(prompts)))
    seconds = time.perf_counter() - began
    await client.close()
    return round(sum(counts) / seconds, 1)


def count(path: str, tokens_per_s: int) -> None:
    """Be the engine: one token for each stream in each frame."""
    asyncio.run(_serve(path, tokens_per_s))


async def _serve(path: str, tokens_per_s: int) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        streams: dict[str, list[int]] = {}  # tokens sent and requested
        writer.write(to_frame([Models([ModelInfo("fake", [], 0, "1", True, [None, "generate"])])]))
        stepping = asyncio.create_task(_step(streams, writer, tokens_per_s))
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                for message in await read_frame(reader):
                    _receive(message, streams, writer)
        stepping.cancel()
        writer.close()

    server = await asyncio.start_unix_server(connected, path)
    await server.serve_forever()


def _receive(message: Message, streams: dict[str, list[int]], writer: asyncio.StreamWriter) -> None:
    if isinstance(message, Describe):
        tokenizer = byte_tokenizer()
        shape = (10**6, tokenizer.vocab_size, 1, 1, "fp32", tokenizer.record(), None, None)
        writer.write(to_frame([ModelDetails(message.request_id, "1", "", 1, *shape)]))
    elif isinstance(message, Generate):
        streams[message.request_id] = [0, message.params.max_tokens]
    elif isinstance(message, Cancel):
        streams.pop(message.request_id, None)


async def _step(
    streams: dict[str, list[int]], writer: asyncio.StreamWriter, tokens_per_s: int
) -> None:
    due = time.perf_counter()
    while True:
        frame: list[Message] = []
        for request_id, counted in list(streams.items()):
            counted[0] += 1
            tokens = Tokens(request_id, [97 + counted[0] % 26])
            if counted[0] == counted[1]:
                del streams[request_id]
                tokens.finish_reason = "length"
            frame.append(tokens)
        if frame:
            writer.write(to_frame(frame))
            await writer.drain()
        now = time.perf_counter()
        due = max(due, now - 0.1) + (len(frame) / tokens_per_s if tokens_per_s else 0)
        await asyncio.sleep(max(0, due - now))


async def _ready(front: subprocess.Popen[bytes]) -> None:
    while front.poll() is None:
        await asyncio.sleep(0.1)
        try:
            answer = urllib.request.urlopen(f"{URL}/ready", timeout=1)
            if json.load(answer)["status"] == "ready":
                return
        except OSError:
            continue
    raise RuntimeError(f"the front end ended with code {front.returncode}; is {URL} taken?")


def _print_cpu() -> None:
    used = os.times()
    print(f"seconds of CPU, all processes: {used.children_user + used.children_system:.1f}")


if __name__ == "__main__":
    sys.exit(main())
