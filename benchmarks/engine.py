"""How fast the engine continues 1, 8 and 32 texts at once, beside other programs and the machine.

    python benchmarks/engine.py [--new 64] [--rounds 3] [--threads 2] [--json FILE]

All compute the same random GPT-2 of 124M parameters: greedily, after prompts of 32 random tokens.
Ours are timed with its scheduler and sampler, in the mode where no answer depends on its company.
Rounds alternate between programs; the best of each is shown, with the time to the first token, the
share of the limit (bytes of weights and of keys and values that a step must read, over the read
bandwidth measured in the same run) and the mean KL divergence of its distributions from the fp32
model's on 256 tokens. transformers is the peer that the extra `dev` installs.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt.checkpoint import Checkpoint
from nanogpt.model import GPT, GPTConfig
from nanogpt.pretrained import published_weights
from nanogpt.tokenizer import byte_tokenizer
from serving.engine.counters import Counters
from serving.engine.forward import Span
from serving.engine.loading import make_forward
from serving.engine.messages import Generate, SamplingParams, Tokens
from serving.engine.runner import Runner
from serving.engine.scheduler import Scheduler, Sequence
from serving.engine.slots import Slots

STREAMS = (1, 8, 32)
PROMPT_TOKENS = 32
KL_TOKENS = 256
BLOCK_SIZE = 512  # room for what is measured; all else is GPT-2 small

WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 2 / 64}  # with scales


@dataclass
class Result:
    """What one program did with one number of streams."""

    program: str
    streams: int
    tokens_per_s: float
    first_token_s: float
    share_of_limit: float | None = None
    mean_kl: float | None = None


class Program:
    """Something that continues texts: `run` gives the seconds in all, and to the first token."""

    name: str
    dtype: str

    def run(self, prompts: list[list[int]], n_new: int) -> tuple[float, float]:
        raise NotImplementedError

    def log_probabilities(self, ids: list[int]) -> Tensor:
        """Return log-probabilities (T, V) of what follows each of some tokens."""
        raise NotImplementedError


class Ours(Program):
    """The engine's runner: the scheduler, the kernels and the sampler, without its process."""

    def __init__(self, weights: dict[str, Tensor], dtype: str, temperature: float = 0.0) -> None:
        self.name, self.dtype = f"nanogpt {dtype}", dtype
        self.temperature = temperature
        if temperature:
            self.name += f" T={temperature:g}"
        model = new_model(weights)
        precision = torch.float32 if dtype == "fp32" else torch.bfloat16
        slots = Slots(model.config, max(STREAMS), precision, torch.device("cpu"))
        checkpoint = Checkpoint(
            model, byte_tokenizer(), None, None, "pretrain", model.config, 0, Path("random")
        )
        forward = make_forward(model, slots.cache, dtype)
        self.runner = Runner("m", "1", checkpoint, dtype, forward, Scheduler(slots, 64), Counters())

    def run(self, prompts: list[list[int]], n_new: int) -> tuple[float, float]:
        params = SamplingParams(n_new, temperature=self.temperature)
        start = time.perf_counter()
        for n, prompt in enumerate(prompts):
            request = Generate(str(n), "m", prompt, params, cache_scope=str(start))
            self.runner.scheduler.waiting.append(
                Sequence(
                    str(n), None, "write", list(prompt), len(prompt), str(start), request=request
                )
            )
        first = 0.0
        while not self.runner.scheduler.idle:
            told = [e for e in self.runner.step() if isinstance(e.message, Tokens)]
            if told and not first:
                first = time.perf_counter() - start
        return time.perf_counter() - start, first

    def log_probabilities(self, ids: list[int]) -> Tensor:
        states = self.runner.forward.hidden_states([Span(0, 0, ids)])
        self.runner.scheduler.slots.slots[0].ids = self.runner.scheduler.slots.slots[0].ids[:0]
        return self.runner.forward.logits(states).double().log_softmax(-1)


class Transformers(Program):
    """Hugging Face's `generate`, a batch for all texts."""

    def __init__(self, weights: dict[str, Tensor], dtype: str) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        self.name, self.dtype = f"transformers {dtype}", dtype
        model: Any = GPT2LMHeadModel(GPT2Config(n_positions=BLOCK_SIZE))
        model.load_state_dict(published_weights(new_model(weights)), strict=False)
        self.model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]).eval()
        self.model.generation_config.eos_token_id = None  # all texts reach their full length

    def run(self, prompts: list[list[int]], n_new: int) -> tuple[float, float]:
        ids = torch.tensor(prompts)
        greedily: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
        greedily["attention_mask"] = torch.ones_like(ids)
        start = time.perf_counter()
        self.model.generate(ids, max_new_tokens=1, **greedily)
        first = time.perf_counter() - start
        start = time.perf_counter()
        made = self.model.generate(ids, max_new_tokens=n_new, **greedily)
        assert made.size(1) == ids.size(1) + n_new
        return time.perf_counter() - start, first

    @torch.no_grad()
    def log_probabilities(self, ids: list[int]) -> Tensor:
        return self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    weights = GPT(GPTConfig(block_size=BLOCK_SIZE)).state_dict()
    made: dict[str, Callable[[], Program]] = {
        "transformers": lambda: Transformers(weights, "fp32"),
        "transformers-bf16": lambda: Transformers(weights, "bf16"),
        "fp32": lambda: Ours(weights, "fp32"),
        "bf16": lambda: Ours(weights, "bf16"),
        "int8": lambda: Ours(weights, "int8"),
        "bf16-sampled": lambda: Ours(weights, "bf16", temperature=1.0),
    }
    programs = [made[name]() for name in options.programs or made]
    bandwidth = read_bandwidth()
    print(f"{options.threads} threads read {bandwidth / 1e9:.1f} GB/s")
    results = measure(programs, options.new, options.rounds, options.streams)
    kl = divergences(programs, new_model(weights))
    for result in results:
        program = next(p for p in programs if p.name == result.program)
        limit = limit_tokens_per_s(program.dtype, result.streams, options.new, bandwidth)
        result.share_of_limit = result.tokens_per_s / limit
        result.mean_kl = kl[result.program]
    show(results)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


def measure(programs: list[Program], n_new: int, rounds: int, streams: list[int]) -> list[Result]:
    """Let the programs take turns; return the best of each for each number of streams."""
    generator = torch.Generator().manual_seed(1)
    results = []
    for n in streams:
        prompts = torch.randint(50257, (n, PROMPT_TOKENS), generator=generator).tolist()
        times: dict[str, list[tuple[float, float]]] = {p.name: [] for p in programs}
        for r in range(rounds):
            for program in programs if r % 2 else reversed(programs):
                times[program.name].append(program.run(prompts, n_new))
        for name, runs in times.items():
            best, first = min(run[0] for run in runs), min(run[1] for run in runs)
            results.append(Result(name, n, n * n_new / best, first))
    return results


def divergences(programs: list[Program], reference: GPT) -> dict[str, float]:
    """Return each program's mean KL divergence from the fp32 model's distributions."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(50257, (KL_TOKENS,), generator=generator)
    with torch.no_grad():
        right = reference(ids[None])[0].double().log_softmax(-1)
    return {
        p.name: float((right.exp() * (right - p.log_probabilities(ids.tolist()))).sum(-1).mean())
        for p in programs
    }


def limit_tokens_per_s(dtype: str, n: int, n_new: int, bandwidth: float) -> float:
    """Return the tokens per second of n streams if reading were all there is to do."""
    config = GPTConfig()
    n_weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    context = PROMPT_TOKENS + n_new / 2
    per_token = 2 * config.n_layer * config.n_embd * (4 if dtype == "fp32" else 2)
    return n * bandwidth / (n_weights * WEIGHT_BYTES[dtype] + n * context * per_token)


def read_bandwidth() -> float:
    """Return how many bytes per second all threads read of what no cache holds."""
    values = torch.ones(2**27)  # 512 MB
    best = min(_seconds(values.sum) for _ in range(8))
    return values.numel() * 4 / best


def new_model(weights: dict[str, Tensor]) -> GPT:
    """Return a GPT with these weights."""
    model = GPT(GPTConfig(block_size=BLOCK_SIZE))
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def show(results: list[Result]) -> None:
    print(f"{'':24}{'streams':>8}{'tokens/s':>10}{'first, ms':>11}{'of limit':>10}{'KL':>11}")
    for r in sorted(results, key=lambda r: r.streams):
        print(
            f"{r.program:24}{r.streams:8}{r.tokens_per_s:10.0f}{1e3 * r.first_token_s:11.0f}"
            f"{100 * (r.share_of_limit or 0):9.0f}%{r.mean_kl:11.2e}"
        )


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--new", type=int, default=64, help="tokens to write in each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--streams", type=int, nargs="*", default=list(STREAMS))
    parser.add_argument("--programs", nargs="*", help="some only: fp32 bf16 int8 transformers ...")
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    main()
