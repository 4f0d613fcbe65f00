"""Time one training step of ours against nanoGPT's, in nanoGPT's documented CPU run.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/nanogpt_shakespeare.py --nanogpt nanoGPT

The run is tinyshakespeare with 4 layers, 4 heads, 128 channels and 12 rows of 64 tokens. A step is
a batch, forward, backward, clipping and AdamW, plain and compiled. nanoGPT computes in float32 on a
CPU; ours is also timed under bfloat16 autocast, as `trainer.precision=bf16-mixed`. All take turns
step by step, so a busy machine slows them alike. nanoGPT counts 65 characters and we 273 bytes and
special tokens, so our head and loss are four times as large; `--vocab-size 273` makes them equal.
The tokens are random: their values do not change the time.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import Cosine, adamw, learning_rates, set_learning_rates
from nanogpt.training.compiled import training_loss
from nanogpt.training.language_model import next_token_loss

BLOCK_SIZE, ROWS = 64, 12
SHAPE = {"block_size": BLOCK_SIZE, "n_layer": 4, "n_head": 4, "n_embd": 128, "bias": False}
N_CHARACTERS, N_BYTES = 65, 273
N_TOKENS = 1_003_854  # of tinyshakespeare's training split
LEARNING_RATE, MIN_RATE, BETAS, WEIGHT_DECAY = 1e-3, 1e-4, (0.9, 0.99), 0.1
MAX_STEPS, WARMUP_STEPS, GRAD_CLIP = 2000, 100, 1.0
WARM_STEPS = 5  # untimed, of each side; the first of them compiles

Step = Callable[[], None]


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    print(describe(options))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "train.tokens"
        np.random.default_rng(0).integers(0, N_CHARACTERS, N_TOKENS, np.uint16).tofile(path)
        reference = read_module(options.nanogpt / "model.py")
        steps: dict[str, Step] = {}
        for mode, compiled in (("plain", False), ("compiled", True)):
            steps[f"nanoGPT {mode}"] = nanogpt_step(reference, path, options.vocab_size, compiled)
            steps[f"ours {mode}"] = our_step(path, compiled)
        steps["ours bf16-mixed"] = our_step(path, compiled=False, bf16=True)
        rounds = [round_ms(steps, options.steps) for _ in warmed(steps, options.rounds)]
    print(report(rounds))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--rounds", type=int, default=5, help="one ratio each (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="of each side in a round (50)")
    parser.add_argument("--threads", type=int, default=1, help="of both (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=N_CHARACTERS, help="nanoGPT's (65)")
    options = parser.parse_args()
    if not (options.nanogpt / "model.py").is_file():
        parser.error(
            f"{options.nanogpt} has no model.py; pass the directory of a checkout of "
            f"https://github.com/karpathy/nanoGPT"
        )
    return options


def nanogpt_step(reference: ModuleType, path: Path, vocab_size: int, compiled: bool) -> Step:
    """Return a step of nanoGPT's loop: its model and optimizer, and what its train.py does."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(None):
        model = reference.GPT(reference.GPTConfig(vocab_size=vocab_size, dropout=0.0, **SHAPE))
        optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, "cpu")
    if compiled:
        model = torch.compile(model)
    batches = random_windows(path)
    batch = next(batches)
    done = 0

    def step() -> None:
        nonlocal batch, done
        rate = cosine_rate(done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        _, loss = model(*batch)
        batch = next(batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        done += 1

    return step


def our_step(path: Path, compiled: bool, bf16: bool = False) -> Step:
    """Return a step of ours: what the trainer does, without the trainer."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=N_BYTES, **SHAPE))  # type: ignore[arg-type]
    optimizer = adamw(model, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS)
    schedule, rates = Cosine(WARMUP_STEPS, MIN_RATE / LEARNING_RATE), learning_rates(optimizer)
    summed_loss = training_loss(next_token_loss, compiled)
    batches = aligned_windows(path)
    done = 0

    def step() -> None:
        nonlocal done
        input_ids, targets = next(batches)
        set_learning_rates(optimizer, rates, schedule(done, MAX_STEPS), done)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = summed_loss(model, input_ids, targets) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        done += 1

    return step


def random_windows(path: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches as nanoGPT draws them: the file mapped anew, rows at random places."""
    while True:
        tokens = np.memmap(path, np.uint16, "r")
        starts = torch.randint(len(tokens) - BLOCK_SIZE, (ROWS,)).tolist()
        rows = [tokens[start : start + BLOCK_SIZE + 1].astype(np.int64) for start in starts]
        input_ids = torch.stack([torch.from_numpy(row[:-1]) for row in rows])
        targets = torch.stack([torch.from_numpy(row[1:]) for row in rows])
        yield input_ids, targets


def aligned_windows(path: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of the file's windows in a random order, each once in a pass."""
    tokens = np.memmap(path, np.uint16, "r")
    n_windows = (len(tokens) - 1) // BLOCK_SIZE
    places = np.arange(BLOCK_SIZE + 1)
    while True:
        order = np.random.default_rng(0).permutation(n_windows)
        for first in range(0, n_windows - ROWS + 1, ROWS):
            starts = order[first : first + ROWS, None] * BLOCK_SIZE
            rows = torch.from_numpy(tokens[starts + places].astype(np.int64))
            yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def warmed(steps: dict[str, Step], n_rounds: int) -> Iterator[int]:
    """Run the untimed steps, then count the rounds."""
    for step in steps.values():
        for _ in range(WARM_STEPS):
            step()
    yield from range(n_rounds)


def round_ms(steps: dict[str, Step], n_steps: int) -> dict[str, float]:
    """Return each side's mean milliseconds over `n_steps` turns, the first to go changing."""
    names = list(steps)
    seconds = dict.fromkeys(names, 0.0)
    for turn in range(n_steps):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            steps[name]()
            seconds[name] += time.perf_counter() - began
    return {name: 1e3 * seconds[name] / n_steps for name in names}


def report(rounds: list[dict[str, float]]) -> str:
    """Return a line of ms per step for each side, and our ratios to nanoGPT's faster one."""
    median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    lines = [f"{name:16} {spread([r[name] for r in rounds], '.1f')} ms per step" for name in median]
    faster = min((name for name in median if name.startswith("nanoGPT")), key=median.__getitem__)
    for name in (name for name in median if name.startswith("ours")):
        ratios = [r[name] / r[faster] for r in rounds]
        lines.append(f"{name} / {faster}: {spread(ratios, '.3f')}")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} (min {low:{form}}, max {high:{form}})"


def cosine_rate(step: int) -> float:
    """Return nanoGPT's learning rate of a step."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / (WARMUP_STEPS + 1)
    progress = min((step - WARMUP_STEPS) / (MAX_STEPS - WARMUP_STEPS), 1.0)
    return MIN_RATE + (LEARNING_RATE - MIN_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def read_module(path: Path) -> ModuleType:
    """Import a Python file by its path."""
    spec = importlib.util.spec_from_file_location("nanogpt_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def describe(options: argparse.Namespace) -> str:
    """Return one line of hardware and versions, and one of what is compared."""
    digest = hashlib.sha256((options.nanogpt / "model.py").read_bytes()).hexdigest()[:12]
    return (
        f"{processor()}, {os.cpu_count()} cores, {options.threads} threads; "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}\n"
        f"nanoGPT (model.py {digest}) with {options.vocab_size} tokens, ours with {N_BYTES}; "
        f"{options.rounds} rounds of {options.steps} steps each, in turns"
    )


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
