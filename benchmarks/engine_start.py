"""How long an engine takes from its start to the first token of a checkpoint.

    python benchmarks/engine_start.py CHECKPOINT [--rounds 3] [--dtype auto] [--json FILE]

Each round starts an engine twice: with kernels still to be compiled, and with those that are there.
The time to import torch is measured separately, in a process that does nothing else; what is left
without it is the engine's own.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from serving.engine.client import EngineClient, EngineProcess
from serving.engine.messages import Generate, Message, SamplingParams, Settings


def main() -> None:
    options = _parser().parse_args()
    settings = Settings(models=str(options.checkpoint), dtype=options.dtype, drain_s=1)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        for _ in range(options.rounds):
            shutil.rmtree(Path(cache) / "nanogpt", ignore_errors=True)
            torch_s = import_torch_s()
            for kernels in ("to be compiled", "compiled"):
                ready_s, first_token_s = start(settings)
                rows.append(
                    {
                        "kernels": kernels,
                        "torch_s": torch_s,
                        "ready_s": ready_s,
                        "first_token_s": first_token_s,
                        "without_torch_s": first_token_s - torch_s,
                    }
                )
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def import_torch_s() -> float:
    """Return how long a new process takes to import torch."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - started


def start(settings: Settings) -> tuple[float, float]:
    """Start an engine and generate a token; return the seconds until ready and until the token."""
    process = EngineProcess(settings)
    started = time.perf_counter()
    process.start()
    try:
        ready, first_token = asyncio.run(_first_token(process))
    finally:
        process.stop()
    return ready - started, first_token - started


async def _first_token(process: EngineProcess) -> tuple[float, float]:
    client = EngineClient(process.address)
    await client.connect()
    ready = time.perf_counter()
    params = SamplingParams(1, temperature=0)
    request = Generate(client.new_id(), client.models()[0].id, [1, 2, 3], params)
    answers: asyncio.Queue[Message] = asyncio.Queue()
    client.submit(request, answers.put_nowait)
    await answers.get()
    first_token = time.perf_counter()
    await client.close()
    return ready, first_token


def show(rows: list[dict[str, float | str]]) -> None:
    print("| kernels | `import torch`, s | ready, s | first token, s | without torch, s |")
    print("|---|---|---|---|---|")
    for kernels in dict.fromkeys(str(row["kernels"]) for row in rows):
        own = [row for row in rows if row["kernels"] == kernels]
        cells = [_spread([float(row[name]) for row in own]) for name in list(own[0])[1:]]
        print("|", " | ".join([kernels, *cells]), "|")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "fp24", "bf16", "int8"))
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    main()
