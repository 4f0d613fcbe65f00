"""Whether an answer depends on its company: random schedules, each answer compared with its own.

    python benchmarks/schedules.py CHECKPOINT [--schedules 200] [--dtype fp32 fp24 bf16 int8]
        [--kernels native torch] [--first 0] [--json FILE]

A schedule is up to 32 conversations that begin at random moments and are held at once, through an
engine process and its client: prompts that share beginnings, from one token to nearly the whole
context, next turns that continue an answer, several answers to one prompt, temperatures 0 and 1,
every way to narrow and to penalise, log-probabilities, scored prompts, keys and requests that take
turns, and readers that leave. Then each request is put to a new engine that computes nothing else.
Tokens, log-probabilities (bit for bit) and the reason of the end must be the same; of an
abandoned answer, the part that arrived. Slots and chunks of the engine process change every few
schedules. Exits with 1 at the first difference.
"""

import argparse
import asyncio
import inspect
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from msgspec import structs

from nanogpt.checkpoint import Checkpoint, load_checkpoint
from serving.engine import compiling, native
from serving.engine.client import EngineClient, EngineProcess
from serving.engine.engine import Engine, Events
from serving.engine.messages import (
    Failed,
    Generate,
    Message,
    SamplingParams,
    Score,
    Settings,
    Tokens,
)

MAX_AT_ONCE = 32
SCHEDULES_PER_ENGINE = 10
KEYS = ("", "", "", "another")
ORIGINS = ("", "one", "two")
N_THREADS = torch.get_num_threads()
PAUSE_S = 0.3  # conversations begin within this time


@dataclass
class Answer:
    """The answer to a request; with `left` its reader did not wait for the rest."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)
    end: str = ""
    left: bool = False
    cached_tokens: int = 0

    def add(self, message: Message) -> None:
        """Add one message of the engine."""
        if isinstance(message, Tokens):
            self.ids += message.ids
            self.logprobs += [own or 0.0 for own, _, _ in message.logprobs or []]
            self.top += [(ids, values) for _, ids, values in message.logprobs or []]
            self.cached_tokens = message.cached_tokens
            self.end = message.finish_reason or ""
        elif isinstance(message, Failed):
            self.end = f"failed: {message.message}"

    def difference(self, alone: "Answer") -> str | None:
        """Return what is not as in the answer to the same request alone, or None."""
        n = len(self.ids) if self.left else None
        for name in ("ids", "logprobs", "top"):
            mine, right = getattr(self, name), getattr(alone, name)[:n]
            if mine != right:
                at = next((i for i, (a, b) in enumerate(zip(mine, right)) if a != b), "the end")  # noqa: B905
                return f"{name} differ at {at}: {mine} alone {right}"
        if not self.left and self.end != alone.end:
            return f"the end is {self.end!r}, alone {alone.end!r}"
        return None


Exchange = tuple[Generate | Score, Answer]


@dataclass
class Row:
    """What the schedules of one precision and kind of kernels amounted to."""

    dtype: str
    kernels: str
    schedules: int = 0
    requests: int = 0
    at_once: int = 0  # the most that were open at a time
    left: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    with_logprobs: int = 0
    differences: int = 0
    seconds: float = 0.0


def main() -> int:
    options = _parser().parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "300")  # engines in two processes share the cores
    about = load_checkpoint(options.checkpoint)
    rows = []
    for kernels in options.kernels:
        for dtype in options.dtype:
            choose(kernels)
            row, difference = check(about, dtype, kernels, options)
            rows.append(row)
            if difference:
                print(difference)
                break
    show(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(any(row.differences for row in rows))


def check(
    about: Checkpoint, dtype: str, kernels: str, options: argparse.Namespace
) -> tuple[Row, str | None]:
    """Run schedules up to the first difference; return their counts, and what differed."""
    row, started = Row(dtype, kernels), time.monotonic()
    numbers = list(range(options.first, options.first + options.schedules))
    for begin in range(0, len(numbers), SCHEDULES_PER_ENGINE):
        some = numbers[begin : begin + SCHEDULES_PER_ENGINE]
        rng = random.Random(f"engine {some[0]}")
        settings = Settings(
            models=str(about.path),
            dtype=dtype,  # type: ignore[arg-type]
            max_slots=rng.choice([3, 8, 32, 32]),
            chunk_tokens=rng.choice([5, 16, 64, 64]),
            cache_gb=1.0,
            drain_s=1.0,
        )
        for number, exchanges, at_once in asyncio.run(run_schedules(some, settings, about)):
            _count(row, exchanges, at_once)
            for request, answer in exchanges:
                if why := answer.difference(alone(request, settings)):
                    row.differences += 1
                    row.seconds = time.monotonic() - started
                    what = f"schedule {number} of {settings}: {request}"
                    return row, f"{dtype}, {kernels} kernels, {what}\n{why}"
        log(f"{dtype} {kernels}: {row.schedules} schedules, {row.requests} requests the same")
    row.seconds = time.monotonic() - started
    return row, None


async def run_schedules(
    numbers: list[int], settings: Settings, about: Checkpoint
) -> list[tuple[int, list[Exchange], int]]:
    """Hold the conversations of some schedules with one engine process."""
    process = EngineProcess(settings)
    process.start()
    client = EngineClient(process.address)
    try:
        await client.connect()
        await client.details(client.models()[0])  # loads the model
        return [(n, *await Schedule(n, client, about).run()) for n in numbers]
    finally:
        await client.close()
        await asyncio.to_thread(process.stop)


class Schedule:
    """The conversations of one number, the seed of every request."""

    def __init__(self, number: int, client: EngineClient, about: Checkpoint) -> None:
        self.rng = random.Random(number)
        self.client, self.block_size = client, about.config.block_size
        self.model = client.models()[0].id
        self.text = about.tokenizer.encode(inspect.getsource(argparse))
        self.openings = [self._cut(self.rng.randint(1, self.block_size - 20)) for _ in range(4)]
        self.exchanges: list[Exchange] = []
        self.room = asyncio.Semaphore(MAX_AT_ONCE)
        self.open = self.most_open = 0

    async def run(self) -> tuple[list[Exchange], int]:
        """Hold all conversations; return all requests and answers, and how many were open."""
        n = self.rng.choice([1, 2, 4, 8, 16, 32, 32])
        seeds = [self.rng.randrange(2**32) for _ in range(n)]
        await asyncio.gather(*(self._converse(random.Random(seed)) for seed in seeds))
        return self.exchanges, self.most_open

    async def _converse(self, rng: random.Random) -> None:
        await asyncio.sleep(rng.uniform(0, PAUSE_S))
        prompt, key = self._prompt(rng), rng.choice(KEYS)
        if rng.random() < 0.05:
            await self._score(prompt, rng)
            return
        for _ in range(rng.choice([1, 1, 2, 3])):
            params = self._params(rng)
            answers = [
                self._generate(
                    prompt, structs.replace(params, seed=(params.seed + i) % 2**64), key, rng
                )
                for i in range(rng.choice([1, 1, 1, 1, 3]))
            ]
            replies = await asyncio.gather(*answers)
            prompt = [*prompt, *replies[0].ids, *self._cut(rng.randint(1, 12), rng)]
            if replies[0].left or len(prompt) >= self.block_size:
                return

    async def _generate(
        self, prompt: list[int], params: SamplingParams, key: str, rng: random.Random
    ) -> Answer:
        origin = rng.choice(ORIGINS)
        request = Generate(self.client.new_id(), self.model, prompt, params, key=key, origin=origin)
        answer, leaves_after = Answer(), rng.randint(0, 12) if rng.random() < 0.15 else None
        self.exchanges.append((request, answer))
        messages: asyncio.Queue[Message] = asyncio.Queue()
        async with self._place():
            self.client.submit(request, messages.put_nowait)
            while not answer.end and not answer.left:
                answer.add(await messages.get())
                has_enough = leaves_after is not None and len(answer.ids) >= leaves_after
                answer.left = has_enough and not answer.end
            self.client.cancel(request.request_id)
        return answer

    async def _score(self, prompt: list[int], rng: random.Random) -> None:
        request = Score(self.client.new_id(), self.model, prompt, rng.randint(0, 5))
        async with self._place():
            scored = await self.client.answer(request, Tokens)
        self.exchanges.append((request, Answer()))
        self.exchanges[-1][1].add(scored)

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        async with self.room:
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            try:
                yield
            finally:
                self.open -= 1

    def _cut(self, n: int, rng: random.Random | None = None) -> list[int]:
        start = (rng or self.rng).randrange(len(self.text) - n)
        return self.text[start : start + n]

    def _prompt(self, rng: random.Random) -> list[int]:
        kind = rng.random()
        if kind < 0.1:
            return self._cut(1, rng)
        if kind < 0.2:
            return self._cut(self.block_size - rng.randint(1, 20), rng)
        if kind < 0.5:
            return self._cut(rng.randint(2, self.block_size // 2), rng)
        opening = rng.choice(self.openings)
        return (opening + self._cut(rng.randint(1, 20), rng))[: self.block_size - 1]

    def _params(self, rng: random.Random) -> SamplingParams:
        return SamplingParams(
            max_tokens=rng.randint(1, 40),
            seed=rng.randrange(2**64),
            temperature=rng.choice([0.0, 1.0, 1.0, 0.7]),
            top_k=rng.choice([None, None, 1, 5, 300]),
            top_p=rng.choice([None, None, 0.9, 0.99]),
            min_p=rng.choice([None, None, 0.05]),
            presence_penalty=rng.choice([0.0, 0.0, 0.7]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            logit_bias=rng.choice([{}, {}, {65: 2.0, 10: -100.0}]),
            stop_ids=rng.choice([(), (0,), tuple(self._cut(2, rng))]),
            ignore_eos=rng.random() < 0.2,
            logprobs=rng.choice([None, 0, 1, 5, 20]),
        )


def alone(request: Generate | Score, settings: Settings) -> Answer:
    """Return the answer of an engine that computes nothing else, before or after."""
    answer = Answer()

    def add(events: Events) -> None:
        for message in (m for messages in events.values() for m in messages):
            if getattr(message, "request_id", None) == request.request_id:
                answer.add(message)

    settings = settings.model_copy(update={"max_slots": 1, "chunk_tokens": 64, "drain_s": 600.0})
    engine = Engine(settings, add)
    engine.post(lambda: engine.accept(None, request))
    engine.post(engine.drain)
    engine.run()
    return answer


def choose(kernels: str) -> None:
    """Have engines compute with our own kernels (native), or with torch's."""
    os.environ["NANOGPT_NO_KERNELS"] = "1" if kernels == "torch" else ""
    torch.set_num_threads(1 if kernels == "native" else N_THREADS)  # ours add alike in any number
    compiling.compiled_kernels.cache_clear()
    native.load_library.cache_clear()


def _count(row: Row, exchanges: list[Exchange], at_once: int) -> None:
    row.schedules += 1
    row.requests += len(exchanges)
    row.at_once = max(row.at_once, at_once)
    for _, answer in exchanges:
        row.left += answer.left
        row.tokens += len(answer.ids)
        row.cached_tokens += answer.cached_tokens
        row.with_logprobs += bool(answer.logprobs)


def show(rows: list[Row]) -> None:
    columns = [name.replace("_", " ") for name in asdict(rows[0])]
    print("|", " | ".join(columns), "|")
    print("|" + "---|" * len(columns))
    for row in rows:
        cells = [f"{v:.0f}" if isinstance(v, float) else str(v) for v in asdict(row).values()]
        print("|", " | ".join(cells), "|")


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--schedules", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first schedule")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "fp24", "bf16", "int8"])
    parser.add_argument("--kernels", nargs="+", default=["native"], choices=["native", "torch"])
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
