"""How fast the engine continues 1, 8 and 32 texts at once, against other programs and the machine.

    python benchmarks/engine.py [--model smollm2_135m] [--new 64] [--rounds 3] [--json FILE]

All compute the same random model, by default GPT-2 of 124M parameters: greedily, after prompts of
32 random tokens.
Ours are timed with its scheduler and sampler, in the mode where no answer depends on its company.
Each program has a process of its own and they take turns. Shown are the fastest round, the time to
the first token, the share of the limit (bytes of weights and of keys and values that a step must
read, over the read bandwidth measured in the same run) and the mean KL divergence of its
distributions from the fp32 model's on 256 tokens; then, for each peer, our fastest precision whose
divergence is no larger, and by how much it is ahead, round by round. Last, a chat's second turn.

Peers: pip install -e ".[peers]"; what is not installed is left out.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import engine_programs
import random_models
import torch
from torch import Tensor

from nanogpt.model import GPT, GPTConfig
from nanogpt.training.machine import device_name
from serving.engine.compiling import processor_flags

STREAMS = (1, 8, 32)
PROMPT_TOKENS = 32
KL_TOKENS = 256
SAME_KL = 1e-12  # below it, two orders of the same float32 sums
TURN = (850, 50, 20)  # tokens of a chat's first prompt, its answer and the next message
CPU_FLAGS = {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}
TURN_TOKENS = sum(TURN) + engine_programs.N_COMPARED


@dataclass
class Result:
    """What one program did with one number of streams; rounds in tokens per second."""

    program: str
    streams: int
    rounds: list[float] = field(default_factory=list)
    first_token_s: float = float("inf")
    share_of_limit: float = 0.0
    mean_kl: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return max(self.rounds)


class Remote:
    """A program in a process of its own, which sleeps while others have their turn."""

    def __init__(self, name: str, files: Path, threads: int) -> None:
        self.name = name
        here, there = multiprocessing.get_context("spawn").Pipe()
        if name.startswith("nanogpt"):
            os.environ["GOMP_SPINCOUNT"] = "300"  # as the engine's process has it
        self.process = multiprocessing.get_context("spawn").Process(
            target=_answer, args=(there, name, files, threads), daemon=True
        )
        self.process.start()
        os.environ.pop("GOMP_SPINCOUNT", None)
        self.connection = here
        self.weight_bytes, self.kv_bytes = here.recv()

    def __call__(self, method: str, *arguments: Any) -> Any:
        """Return what a method of the program returns."""
        self.connection.send((method, arguments))
        return self.connection.recv()


def _answer(connection: Connection, name: str, files: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    kind, keys = engine_programs.PROGRAMS[name]
    program = kind(files, **keys)
    connection.send((program.weight_bytes, program.kv_bytes))
    with suppress(EOFError):  # the parent closed its end
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(program, method)(*arguments))


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    config = random_models.shape(parser, options)
    if config.block_size < TURN_TOKENS:
        parser.error(f"the context of {options.model} has less than {TURN_TOKENS} tokens")
    torch.set_num_threads(options.threads)
    flags = [flag for flag in processor_flags().split() if flag in CPU_FLAGS]
    processor = f"{device_name(torch.device('cpu'))}: {' '.join(flags)}"
    print(processor)
    names = [n for n in engine_programs.PROGRAMS if n in (options.programs or [n])]
    for name in [n for n in names if engine_programs.missing(n)]:
        print(f"without {name}: {', '.join(engine_programs.missing(name))} is not installed")
        names.remove(name)
    with tempfile.TemporaryDirectory() as directory:
        files = Path(directory)
        ids, right = reference(random_models.write_random(files / "model.ckpt", config))
        names = engine_programs.write_files(names, files)
        programs = [Remote(name, files, options.threads) for name in names]
        bandwidth = read_bandwidth()
        results = measure(programs, config, options.new, options.rounds, options.streams)
        kl = {p.name: _divergence(right, p("log_probabilities", ids)) for p in programs}
        describe(results, programs, config, kl, options.new, bandwidth)
        turns = second_turns(programs, config, options.turns)
    print(f"{options.threads} threads read {bandwidth / 1e9:.1f} GB/s\n")
    show(results, turns)
    if options.json:
        rows = [asdict(result) for result in results]
        found = {"processor": processor, "results": rows, "second_turns": turns}
        options.json.write_text(json.dumps(found, indent=1))


@torch.no_grad()
def reference(model: GPT) -> tuple[list[int], Tensor]:
    """Return random tokens, and the fp32 model's log-probabilities (T, V) after each of them."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(model.config.vocab_size, (KL_TOKENS,), generator=generator)
    return ids.tolist(), model(ids[None])[0].double().log_softmax(-1)


def measure(
    programs: list[Remote], config: GPTConfig, n_new: int, rounds: int, streams: list[int]
) -> list[Result]:
    """Let the programs take turns, in the other order every second round."""
    generator = torch.Generator().manual_seed(1)
    results: list[Result] = []
    for n in streams:
        shape = (n, PROMPT_TOKENS)
        prompts = torch.randint(config.vocab_size, shape, generator=generator).tolist()
        of_program = {program.name: Result(program.name, n) for program in programs}
        for program in programs:
            program("run", prompts, 2)  # not counted
        for r in range(rounds):
            for program in programs if r % 2 else reversed(programs):
                seconds, first = program("run", prompts, n_new)
                result = of_program[program.name]
                result.rounds.append(n * n_new / seconds)
                result.first_token_s = min(result.first_token_s, first)
        results += of_program.values()
    return results


def describe(
    results: list[Result],
    programs: list[Remote],
    config: GPTConfig,
    kl: dict[str, float],
    n_new: int,
    bandwidth: float,
) -> None:
    """Add to results their divergence and their share of what reading alone would allow."""
    of_name = {program.name: program for program in programs}
    for result in results:
        program = of_name[result.program]
        limit = limit_tokens_per_s(program, config, result.streams, n_new, bandwidth)
        result.share_of_limit = result.tokens_per_s / limit
        result.mean_kl = kl[result.program]


def second_turns(
    programs: list[Remote], config: GPTConfig, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Return our seconds to the first token of a second turn, read anew and continued."""
    if not rounds:
        return {}
    generator = torch.Generator().manual_seed(3)
    prompt, new = (
        torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in TURN[::2]
    )
    ours = [p for p in programs if p.name.startswith("nanogpt") and "T=" not in p.name]
    turns: dict[str, list[tuple[float, float]]] = {p.name: [] for p in ours}
    for _ in range(rounds):
        for program in ours:
            turns[program.name].append(program("second_turn", prompt, TURN[1], new))
    return turns


def limit_tokens_per_s(
    program: Remote, config: GPTConfig, n: int, n_new: int, bandwidth: float
) -> float:
    """Return the tokens per second of n streams if reading were all there is to do."""
    heads = config.n_head + config.kv_heads  # queries and outputs, keys and values
    matrices = 3 if config.activation == "swiglu" else 2
    n_weights = config.n_embd * (
        config.n_layer * (2 * heads * config.head_dim + matrices * config.inner_dim)
        + config.vocab_size
    )
    context = PROMPT_TOKENS + n_new / 2
    per_token = 2 * config.n_layer * config.kv_heads * config.head_dim * program.kv_bytes
    return n * bandwidth / (n_weights * program.weight_bytes + n * context * per_token)


def read_bandwidth() -> float:
    """Return how many bytes per second all threads read of what no cache holds."""
    values = torch.ones(2**27)  # 512 MB
    best = min(_seconds(values.sum) for _ in range(8))
    return values.numel() * 4 / best


def show(results: list[Result], turns: dict[str, list[tuple[float, float]]]) -> None:
    print("| | streams | tokens/s | median | first token, ms | of the limit | mean KL |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        median = statistics.median(r.rounds)
        print(
            f"| {r.program} | {r.streams} | {r.tokens_per_s:.0f} | {median:.0f}"
            f" | {1e3 * r.first_token_s:.0f} | {100 * r.share_of_limit:.0f} % | {r.mean_kl:.1e} |"
        )
    print("\n| peer | streams | ours, its KL no larger | times as fast (min to max) |")
    print("|---|---|---|---|")
    for peer in [r for r in results if not r.program.startswith("nanogpt")]:
        print(f"| {peer.program} | {peer.streams} | {_lead(peer, results)} |")
    print("\n| second turn | read anew, ms | continued, ms | ratio |")
    print("|---|---|---|---|")
    for name, rounds in turns.items():
        cold, warm = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
        print(f"| {name} | {1e3 * cold:.0f} | {1e3 * warm:.0f} | {warm / cold:.3f} |")


def _lead(peer: Result, results: list[Result]) -> str:
    """Return which of ours is as true as a peer and the fastest of those, and how far ahead."""
    ours = [
        r
        for r in results
        if r.program.startswith("nanogpt")
        and "T=" not in r.program
        and r.streams == peer.streams
        and r.mean_kl <= max(peer.mean_kl, SAME_KL)
    ]
    if not ours:
        return "none | -"
    best = max(ours, key=lambda r: statistics.median(r.rounds))
    ratios = [a / b for a, b in zip(best.rounds, peer.rounds, strict=True)]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"{best.program.removeprefix('nanogpt ')} | {spread}"


def _divergence(right: Tensor, other: Tensor) -> float:
    return float((right.exp() * (right - other)).sum(-1).mean())


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    random_models.add_options(parser)
    parser.add_argument("--new", type=int, default=64, help="tokens to write in each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3, help="rounds of second turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--streams", type=int, nargs="*", default=list(STREAMS))
    parser.add_argument("--programs", nargs="*", choices=engine_programs.PROGRAMS, help="some only")
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    main()
