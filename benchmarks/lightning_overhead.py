"""What Lightning, metrics and progress cost per optimizer step, against a bare PyTorch loop.

    python benchmarks/lightning_overhead.py [--shape toy|10m] [--rounds 8] [--steps 20] [--nanogpt
    DIR]

Both train the same model on the same batches with the same optimizer, in one process, in
alternating chunks of steps: our trainer runs, and between two of its chunks the bare loop runs as
many steps. With --nanogpt DIR a third rival is the loop body of nanoGPT's train.py around the model
of that checkout. Prints milliseconds per step, the ratio and its spread.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from nanogpt_shakespeare import read_module
from torch.utils.data import DataLoader

from nanogpt.checkpoint import record
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import Constant, adamw
from nanogpt.tokenizer import byte_tokenizer
from nanogpt.training.callbacks import StopSignals
from nanogpt.training.checkpointing import AtomicCheckpointIO, Checkpointing
from nanogpt.training.language_model import LanguageModel
from nanogpt.training.loggers import MetricsLogger
from nanogpt.training.machine import machine_id
from nanogpt.training.progress import Progress
from nanogpt.training.trainer import quieten_lightning

SHAPES = {
    # nanoGPT's documented CPU run
    "toy": (
        GPTConfig(block_size=64, vocab_size=273, n_layer=4, n_head=4, n_embd=128, bias=False),
        12,
    ),
    # nanoGPT's shakespeare_char model on a GPU
    "10m": (
        GPTConfig(block_size=256, vocab_size=273, n_layer=6, n_head=6, n_embd=384, bias=False),
        4,
    ),
}
WARMUP_STEPS = 10


def main() -> int:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    config, batch_size = SHAPES[options.shape]
    batches = _batches(config, batch_size, 16)
    rivals: dict[str, Callable[[int], None]] = {"bare loop": bare_loop(config, batches)}
    if options.nanogpt:
        rivals["nanoGPT's loop"] = nanogpt_loop(options.nanogpt, config, batches)
    times = alternate(config, batches, rivals, options.rounds, options.steps)
    n_parameters = GPT(config).num_parameters()
    print(f"{options.shape}: {n_parameters:,} parameters, batch {batch_size} x {config.block_size}")
    print(f"{machine_id(torch.device('cpu'))}, {options.threads} threads, fp32")
    for name, chunk_times in times.items():
        ms = [1e3 * t / options.steps for t in chunk_times]
        print(
            f"  {name:16} {statistics.median(ms):8.2f} ms per step "
            f"(min {min(ms):.2f}, max {max(ms):.2f})"
        )
    for name in rivals:
        ratios = [a / b for a, b in zip(times["our trainer"], times[name], strict=True)]
        print(
            f"  our trainer / {name}: median {statistics.median(ratios):.3f} "
            f"(min {min(ratios):.3f}, max {max(ratios):.3f}, {len(ratios)} rounds)"
        )
    return 0


def alternate(
    config: GPTConfig,
    batches: list[dict[str, Any]],
    rivals: dict[str, Callable[[int], None]],
    rounds: int,
    steps: int,
) -> dict[str, list[float]]:
    """Return the seconds of every chunk of steps, by rival; chunks i ran one after another."""
    times: dict[str, list[float]] = {"our trainer": [], **{name: [] for name in rivals}}

    class Alternate(Callback):
        began = 0.0

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, *args: Any
        ) -> None:
            done = trainer.global_step - WARMUP_STEPS
            if done < 0 or done % steps:
                return
            if done > 0:
                times["our trainer"].append(time.perf_counter() - self.began)
            for name, run in rivals.items():
                run(WARMUP_STEPS if done == 0 else 1)
                if done > 0:
                    began = time.perf_counter()
                    run(steps)
                    times[name].append(time.perf_counter() - began)
            self.began = time.perf_counter()

    max_steps = WARMUP_STEPS + rounds * steps
    tokenizer = byte_tokenizer()
    module = LanguageModel(
        _seeded_model(config),
        tokenizer=tokenizer,
        make_optimizer=_optimizer,
        schedule=Constant(),
        max_steps=max_steps,
        tokens_per_step=batches[0]["input_ids"].numel(),
        grad_clip=1.0,
        compiled=False,
        metadata=record("pretrain", config, tokenizer),
    )
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quieten_lightning()
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=max_steps,
            max_epochs=-1,
            logger=[MetricsLogger(Path(directory))],
            callbacks=[
                Progress(5.0),
                Alternate(),
                StopSignals(),
                Checkpointing(Path(directory), every_n_steps=10**9),
            ],
            plugins=[AtomicCheckpointIO()],
            limit_val_batches=0,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            enable_model_summary=False,
        )
        steps_of_this_rank = [[batches[i % len(batches)]] for i in range(max_steps)]
        trainer.fit(module, DataLoader(steps_of_this_rank, batch_size=None))  # type: ignore[arg-type]
    return times


def bare_loop(config: GPTConfig, batches: list[dict[str, Any]]) -> Callable[[int], None]:
    """Return a function that trains our model for n steps with nothing around it."""
    model = _seeded_model(config)
    optimizer = _optimizer(model)

    def run(steps: int) -> None:
        for i in range(steps):
            batch = batches[i % len(batches)]
            logits = model(batch["input_ids"]).flatten(0, 1)
            loss = F.cross_entropy(logits, batch["targets"].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def nanogpt_loop(
    checkout: Path, config: GPTConfig, batches: list[dict[str, Any]]
) -> Callable[[int], None]:
    """Return a function that trains nanoGPT's model for n steps as its train.py does on a CPU."""
    theirs = read_module(checkout / "model.py")
    torch.manual_seed(1)
    model = theirs.GPT(
        theirs.GPTConfig(
            block_size=config.block_size,
            vocab_size=config.vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            dropout=0.0,
            bias=False,
        )
    )
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")

    def run(steps: int) -> None:
        for i in range(steps):
            batch = batches[i % len(batches)]
            _, loss = model(batch["input_ids"], batch["targets"])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def _seeded_model(config: GPTConfig) -> GPT:
    torch.manual_seed(1)
    return GPT(config)


def _optimizer(model: GPT) -> torch.optim.Optimizer:
    return adamw(model, learning_rate=1e-3)


def _batches(config: GPTConfig, batch_size: int, n: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (n, batch_size, config.block_size + 1), generator=generator)
    return [
        {
            "input_ids": row[:, :-1].contiguous(),
            "targets": row[:, 1:].contiguous(),
            "step_targets": batch_size * config.block_size,
            "row_seeds": torch.arange(batch_size),
        }
        for row in rows
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="steps of one chunk")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to compare with")
    return parser


if __name__ == "__main__":
    sys.exit(main())
