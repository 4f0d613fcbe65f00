"""How many streamed tokens per second one front end ships, before an engine that only counts.

    python benchmarks/front_end.py

Three processes: an engine that sends a token to each of its streams in one frame, as fast as they
are taken or at a given pace; the front end as `python -m serving` runs it; and benchmarks/load.py.
Where the front end is behind, it puts several tokens into one piece (`pieces` beside `tokens`).
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from nanogpt.tokenizer import byte_tokenizer
from serving.engine.client import read_frame
from serving.engine.messages import (
    Cancel,
    Describe,
    Finished,
    Generate,
    Message,
    ModelDetails,
    ModelInfo,
    Models,
    Tokens,
    to_frame,
)

ROOT = Path(__file__).parent.parent
PORT = 5099


def main() -> int:
    """Measure, and print the load's figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2000, help="of each stream")
    parser.add_argument("--tokens-per-s", type=int, default=0, help="of the engine; 0: no pause")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        address = f"{directory}/engine.sock"
        engine = multiprocessing.get_context("spawn").Process(
            target=count, args=(address, options.tokens_per_s), daemon=True
        )
        engine.start()
        front = subprocess.Popen(
            [sys.executable, "-m", "serving"],
            env={**os.environ, "NANOGPT_ENGINE": f"unix:{address}", "NANOGPT_PORT": str(PORT)},
            cwd=ROOT,
        )
        try:
            asyncio.run(_ready())
            load = [sys.executable, str(ROOT / "benchmarks" / "load.py")]
            load += [f"http://127.0.0.1:{PORT}/v1", "--concurrency", str(options.streams)]
            load += ["--requests", str(options.streams), "--max-tokens", str(options.tokens)]
            return subprocess.run(load).returncode
        finally:
            front.terminate()
            front.wait()
            engine.terminate()
            _print_cpu()


def count(path: str, tokens_per_s: int) -> None:
    """Be the engine: one token for each stream in each frame."""
    asyncio.run(_serve(path, tokens_per_s))


async def _serve(path: str, tokens_per_s: int) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        streams: dict[str, list[int]] = {}  # tokens sent, and wanted
        writer.write(to_frame([Models([ModelInfo("fake", [], 0, "1", True, True)])]))
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
        shape = (10**6, tokenizer.vocab_size, 1, "fp32", tokenizer.record(), None, None)
        writer.write(to_frame([ModelDetails(message.request_id, "fake", "1", "", 1, *shape)]))
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
            frame.append(Tokens(request_id, [97 + counted[0] % 26]))
            if counted[0] == counted[1]:
                del streams[request_id]
                frame.append(Finished(request_id, "length", 1, counted[1], 0, 0.0, 0.0, 0.0))
        if frame:
            writer.write(to_frame(frame))
            await writer.drain()
        now = time.perf_counter()
        due = max(due, now - 0.1) + (len(frame) / tokens_per_s if tokens_per_s else 0)
        await asyncio.sleep(max(0, due - now))


async def _ready() -> None:
    while True:
        await asyncio.sleep(0.1)
        try:
            answer = urllib.request.urlopen(f"http://127.0.0.1:{PORT}/ready", timeout=1)
            if json.load(answer)["status"] == "ready":
                return
        except OSError:
            continue


def _print_cpu() -> None:
    used = os.times()
    print(f"seconds of CPU, all processes: {used.children_user + used.children_system:.1f}")


if __name__ == "__main__":
    sys.exit(main())
