"""Time one training step of ours beside nanoGPT's and transformers', eager and compiled.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/training_step.py --nanogpt nanoGPT [--shape toy] [--precision bf16-mixed]

A step is forward, backward, clipping and AdamW on one micro-batch of random tokens. Every
side runs in a process of its own, as its users start it (`ours` with the environment and the memory
allocation of train.py), and they take turns, so that a busy machine slows them alike. `trainer` is
ours within Lightning's trainer, with metrics and progress. bf16-mixed is autocast for all, which
nanoGPT's own train.py leaves out on a CPU. Characters are nanoGPT's tokens in the shapes toy and
10m, 65, and bytes ours, 273. Prints milliseconds per step, and each ratio to `ours` with its
spread. `--clock cpu` counts the processor's time, for one thread on a busy machine.
"""

import argparse
import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Step = Callable[[], object]

# rows, and the model by nanoGPT's names of its fields
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "toy": (12, {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128, "bias": False}),
    "10m": (4, {"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "bias": False}),
    "124m": (2, {"block_size": 256, "n_layer": 12, "n_head": 12, "n_embd": 768, "bias": True}),
}
N_CHARACTERS, N_BYTES = 65, 273
GPT2_TOKENS, GPT2_PADDED = 50_257, 50_304  # nanoGPT's default is the padded number
SIDES = ("ours", "nanogpt", "transformers")
WARM_STEPS = 4
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
OPTIMIZER: dict[str, Any] = {"weight_decay": 0.1, "learning_rate": 1e-3, "betas": (0.9, 0.95)}


def main() -> None:
    options = parse_options()
    print(describe(options), flush=True)
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in options.sides:
        environment = dict(os.environ)
        if name.startswith(("ours", "trainer")):
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py does
        pipes[name], theirs = spawn.Pipe()
        spawn.Process(target=work, args=(theirs, options, name), daemon=True).start()
        os.environ.clear()
        os.environ.update(environment)
        print(f"  {name:22} {answer(pipes[name])}", flush=True)  # also the end of its warm-up
    rounds: list[dict[str, float]] = []
    for turn in range(options.rounds):
        first = turn % len(pipes)
        names = [*pipes][first:] + [*pipes][:first]
        rounds.append({})
        for name in names:
            pipes[name].send(options.steps)
            rounds[-1][name] = 1e3 * answer(pipes[name]) / options.steps
    print(report(rounds))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--shape", choices=SHAPES, default="124m")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument(
        "--sides",
        nargs="+",
        help=f"of {', '.join(SIDES)}, each also as NAME-compiled, and trainer (default: all there)",
    )
    parser.add_argument("--rounds", type=int, default=7, help="one ratio each (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="of a side in a round (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    if options.sides is None:
        there = [side for side in SIDES if side != "nanogpt" or options.nanogpt]
        options.sides = [name + how for name in there for how in ("", "-compiled")]
    return options


def answer(pipe: Connection) -> Any:
    found = pipe.recv()
    if isinstance(found, BaseException):
        raise SystemExit(f"{type(found).__name__}: {found}")
    return found


def work(pipe: Connection, options: argparse.Namespace, name: str) -> None:
    """Build a side and run as many of its steps as the other end sends, until it closes."""
    try:
        _work(pipe, options, name)
    except EOFError:
        return
    except Exception as error:
        pipe.send(RuntimeError(f"{name}: {type(error).__name__}: {error}"))


def _work(pipe: Connection, options: argparse.Namespace, name: str) -> None:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    side, _, compiled = name.partition("-")
    if side == "trainer":
        return run_trainer(pipe, options)
    build = {"ours": our_step, "nanogpt": nanogpt_step, "transformers": transformers_step}[side]
    step = build(options, bool(compiled))
    turns = Turns(pipe, options.clock)
    for n_done in itertools.count():
        turns.begin(n_done)
        step()
    return None


class Turns:
    """Steps counted in turns: between two of them the process waits for its next turn."""

    def __init__(self, pipe: Connection, clock: str) -> None:
        self.pipe, self.clock = pipe, CLOCKS[clock]
        self.ends_at, self.began = WARM_STEPS, 0.0
        self.built = time.perf_counter()

    def begin(self, n_done: int) -> None:
        """Report a turn that has ended; block until the next one begins."""
        if n_done < self.ends_at:
            return
        if n_done == WARM_STEPS:
            self.pipe.send(f"{WARM_STEPS} untimed steps, {time.perf_counter() - self.built:.0f} s")
        else:
            self.pipe.send(self.clock() - self.began)
        self.ends_at = n_done + self.pipe.recv()
        self.began = self.clock()


def our_step(options: argparse.Namespace, compiled: bool) -> Step:
    """Return a step of ours: what the trainer does, without the trainer."""
    import torch

    from nanogpt.optim import adamw
    from nanogpt.training.compiled import training_loss
    from nanogpt.training.language_model import next_token_loss
    from nanogpt.training.machine import keep_freed_memory

    keep_freed_memory(torch.device("cpu"))
    model = our_model(options)
    optimizer = adamw(model, **OPTIMIZER)
    summed_loss = training_loss(next_token_loss, compiled)
    input_ids, targets = random_tokens(options, model.config.vocab_size)

    def step() -> None:
        with autocast(options):
            loss = summed_loss(model, input_ids, targets) / targets.numel()
        loss.backward()
        clip_and_update(model, optimizer)

    return step


def nanogpt_step(options: argparse.Namespace, compiled: bool) -> Step:
    """Return a step of nanoGPT's loop: its model, loss and optimizer."""
    import torch

    if options.nanogpt is None or not (options.nanogpt / "model.py").is_file():
        raise FileNotFoundError("pass --nanogpt, a checkout of github.com/karpathy/nanoGPT")
    path = options.nanogpt / "model.py"
    spec: Any = importlib.util.spec_from_file_location("nanogpt_reference", path)
    reference = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    vocab_size = GPT2_PADDED if options.shape == "124m" else N_CHARACTERS
    keys = {**SHAPES[options.shape][1], "vocab_size": vocab_size, "dropout": 0.0}
    with contextlib.redirect_stdout(None):
        model = reference.GPT(reference.GPTConfig(**keys))
        rates = (OPTIMIZER["weight_decay"], OPTIMIZER["learning_rate"], OPTIMIZER["betas"])
        optimizer = model.configure_optimizers(*rates, "cpu")
    called = torch.compile(model) if compiled else model
    input_ids, targets = random_tokens(options, vocab_size)

    def step() -> None:
        with autocast(options):
            _, loss = called(input_ids, targets)
        loss.backward()
        clip_and_update(model, optimizer)

    return step


def transformers_step(options: argparse.Namespace, compiled: bool) -> Step:
    """Return a step of transformers' GPT-2."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    fields = SHAPES[options.shape][1]
    vocab_size = GPT2_TOKENS if options.shape == "124m" else N_CHARACTERS
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=fields["block_size"],
        n_layer=fields["n_layer"],
        n_head=fields["n_head"],
        n_embd=fields["n_embd"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIMIZER["learning_rate"], fused=True)
    called = torch.compile(model) if compiled else model
    input_ids, _ = random_tokens(options, vocab_size)

    def step() -> None:
        with autocast(options):
            loss = called(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        clip_and_update(model, optimizer)

    return step


def our_model(options: argparse.Namespace) -> Any:
    from nanogpt.model import GPT, GPTConfig

    vocab_size = GPT2_TOKENS if options.shape == "124m" else N_BYTES
    return GPT(GPTConfig(vocab_size=vocab_size, **SHAPES[options.shape][1])).train()


def random_tokens(options: argparse.Namespace, vocab_size: int) -> Any:
    """Return inputs and targets (B, T) int64 of the shape: their values do not change the time."""
    import torch

    rows, fields = SHAPES[options.shape]
    tokens = torch.randint(vocab_size, (rows, fields["block_size"] + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def autocast(options: argparse.Namespace) -> Any:
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16-mixed")


def clip_and_update(model: Any, optimizer: Any) -> None:
    import torch

    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def run_trainer(pipe: Connection, options: argparse.Namespace) -> None:
    """Train ours with Lightning's trainer, its turns between two steps."""
    from functools import partial

    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.utils.data import DataLoader

    from nanogpt.checkpoint import record
    from nanogpt.optim import Constant, adamw
    from nanogpt.tokenizer import byte_tokenizer
    from nanogpt.training.callbacks import StopSignals
    from nanogpt.training.checkpointing import AtomicCheckpointIO, Checkpointing
    from nanogpt.training.language_model import LanguageModel
    from nanogpt.training.loggers import MetricsLogger
    from nanogpt.training.machine import keep_freed_memory
    from nanogpt.training.progress import Progress
    from nanogpt.training.trainer import quieten_lightning

    keep_freed_memory(torch.device("cpu"))
    turns = Turns(pipe, options.clock)

    class TakeTurns(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, *args: Any
        ) -> None:
            turns.begin(trainer.global_step)

    model, tokenizer = our_model(options), byte_tokenizer()
    input_ids, targets = random_tokens(options, model.config.vocab_size)
    n_tokens = targets.numel()
    batch = {"input_ids": input_ids, "targets": targets, "step_targets": n_tokens}
    max_steps = WARM_STEPS + options.rounds * options.steps
    module = LanguageModel(
        model,
        tokenizer=tokenizer,
        make_optimizer=partial(adamw, **OPTIMIZER),
        schedule=Constant(),
        max_steps=max_steps,
        tokens_per_step=n_tokens,
        grad_clip=1.0,
        compiled=False,
        metadata=record("pretrain", model.config, tokenizer),
    )
    with tempfile.TemporaryDirectory() as directory:
        quieten_lightning()
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            precision=options.precision,
            max_steps=max_steps,
            max_epochs=-1,
            logger=[MetricsLogger(Path(directory))],
            callbacks=[
                Progress(5.0),
                TakeTurns(),
                StopSignals(),
                Checkpointing(Path(directory), every_n_steps=10**9),
            ],
            plugins=[AtomicCheckpointIO()],
            limit_val_batches=0,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader([[batch]] * max_steps, batch_size=None))  # type: ignore[arg-type]


def report(rounds: list[dict[str, float]]) -> str:
    """Return a line for each side: ms per step, and how many times as fast ours is."""
    lines = [f"{'':24} ms per step{'':22} time / ours"]
    for name in rounds[0]:
        ms = spread([r[name] for r in rounds], ".1f")
        lines.append(f"  {name:22} {ms:33} {spread([r[name] / r['ours'] for r in rounds], '.3f')}")
    return "\n".join(lines) if "ours" in rounds[0] else "no side is ours"


def spread(values: list[float], form: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} (min {low:{form}}, max {high:{form}})"


def describe(options: argparse.Namespace) -> str:
    """Return the processor, the versions and the shape."""
    import importlib.metadata

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    model = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    flags = set((re.search(r"^flags\s*: (.*)$", info, re.MULTILINE) or ["", ""])[1].split())
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")
    )
    rows, fields = SHAPES[options.shape]
    features = " ".join(flag for flag in FLAGS if flag in flags)
    return (
        f"{model[1] if model else platform.machine()} ({features}), "
        f"{options.threads} thread(s); {versions}\n"
        f"{options.shape}: {rows} x {fields['block_size']} tokens, {options.precision}, "
        f"{options.clock} clock, {options.rounds} rounds of {options.steps} steps"
    )


if __name__ == "__main__":
    main()
