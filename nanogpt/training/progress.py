"""Training progress: a bar on a terminal, a line every few seconds elsewhere."""

import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from pydantic import validate_call
from tqdm import tqdm

from nanogpt.runs.log import print_text
from nanogpt.text import format_duration, format_percent
from nanogpt.values import Amount

BAR_EVERY_S = 0.25
tqdm.monitor_interval = 0  # no watching thread: every refresh is explicit, and workers are forked


class Progress(ProgressBar):
    """Show step, loss, tokens/s, MFU and time left, from rank zero.

    They are those of `pl_module.progress`, a dict {"step", "tokens", "loss", "tokens_per_s", "mfu"}
    of plain numbers that the module replaces when it logs: the device is never synchronised.
    """

    @validate_call
    def __init__(self, every_s: Amount = 5.0) -> None:
        super().__init__()
        self.every_s = every_s
        self._due = math.inf  # never, unless training has begun on rank zero
        self._shown = -1
        self._bar = tqdm(disable=True)  # which it stays where lines are printed

    def disable(self) -> None:
        """Lightning calls it on the other ranks, where `on_train_start` shows nothing anyway."""

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        print_text(sep.join(map(str, args)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._due, self._shown = 0.0, -1
            self._bar = tqdm(
                total=trainer.max_steps,
                initial=trainer.global_step,
                bar_format="{percentage:3.0f} %|{bar}| {desc}",
                dynamic_ncols=True,
                disable=not _on_terminal(),
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if time.monotonic() >= self._due:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.global_step > self._shown >= 0:
            self._show(trainer, pl_module)

    def on_exception(self, *args: Any) -> None:
        self.teardown()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self._due = math.inf
        self._bar.close()

    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due = time.monotonic() + (self.every_s if self._bar.disable else BAR_EVERY_S)
        self._shown = trainer.global_step
        metrics = getattr(pl_module, "progress", {})
        max_steps = getattr(pl_module, "max_steps", trainer.max_steps)
        line = progress_line(self._shown, max_steps, metrics)
        if self._bar.disable:
            print_text(line)
        else:
            self._bar.n, self._bar.total = self._shown, max_steps
            self._bar.set_description_str(line)


def progress_line(step: int, max_steps: int, metrics: Mapping[str, float]) -> str:
    """Return e.g. `step 120/1500  loss 3.2145  5,412 tokens/s  MFU 38 %  1 min 20 s left`.

    Metrics that are not known yet are left out; the time left is that of training alone.
    """
    parts = [f"step {step}/{max_steps}"]
    if "loss" in metrics:
        logged_at = f" (step {metrics['step']:.0f})" if metrics["step"] != step else ""
        parts.append(f"loss {metrics['loss']:.4f}{logged_at}")
    if tokens_per_s := metrics.get("tokens_per_s"):
        parts.append(f"{tokens_per_s:,.0f} tokens/s")
    if mfu := metrics.get("mfu"):
        parts.append(f"MFU {format_percent(mfu)}")
    if tokens_per_s and step < max_steps:
        left_s = (max_steps - step) * metrics["tokens"] / metrics["step"] / tokens_per_s
        parts.append(f"{format_duration(left_s)} left")
    return "  ".join(parts)


def _on_terminal() -> bool:
    """Return whether both streams lead to a terminal that can hold a bar (some have no size)."""
    streams = (sys.stdout, sys.stderr)
    if not all(stream.isatty() for stream in streams) or os.environ.get("TERM") == "dumb":
        return False
    return min(os.get_terminal_size(sys.stderr.fileno())) > 2
