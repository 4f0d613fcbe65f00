"""What a person sees of a training: a bar on a terminal, a line every few seconds elsewhere."""

import math
import os
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from pydantic import validate_call
from tqdm import tqdm

from nanogpt.runs.log import say
from nanogpt.values import Amount

BAR_EVERY_S = 0.25
PACE_S = 60.0  # the time left follows the pace of about the last minute


class Progress(ProgressBar):
    """Show step, loss, tokens/s, MFU and time left, from rank zero.

    The figures are those of `pl_module.progress`, a dict {"step", "loss", "tokens_per_s", "mfu"} of
    plain numbers that the module renews when it logs: the device is never waited for. What is not
    there yet is left out.
    """

    @validate_call
    def __init__(self, every_s: Amount = 5.0) -> None:
        super().__init__()
        self.every_s = every_s
        self._due = math.inf  # never, unless training has begun on rank zero
        self._shown = -1
        self._pace: _Pace | None = None
        self._bar: _Bar | None = None

    def disable(self) -> None:
        """Lightning calls it on the other ranks, where `on_train_start` shows nothing anyway."""

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        say(sep.join(map(str, args)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._due, self._shown, self._pace = 0.0, -1, None
        if _on_terminal():
            self._bar = _Bar(
                total=trainer.max_steps,
                initial=trainer.global_step,
                bar_format="{percentage:3.0f} %|{bar}| {desc}",
                dynamic_ncols=True,
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        now = time.monotonic()
        if now >= self._due:
            self._due = now + (self.every_s if self._bar is None else BAR_EVERY_S)
            self._show(trainer, pl_module, now)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.global_step > self._shown >= 0:
            self._show(trainer, pl_module, time.monotonic())
        self._close()

    def on_exception(self, *args: Any) -> None:
        self._close()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self._close()

    def _show(self, trainer: Trainer, pl_module: LightningModule, now: float) -> None:
        step, total = trainer.global_step, trainer.max_steps
        if self._pace is None:  # the first step, slow with warming up and compiling, says little
            self._pace = _Pace(step, now)
        step_s = self._pace.update(step, now)
        left_s = None if step_s is None or step >= total else step_s * (total - step)
        line = progress_line(step, total, getattr(pl_module, "progress", {}), left_s)
        self._shown = step
        if self._bar is None:
            say(line)
        else:
            self._bar.n = step
            self._bar.set_description_str(line)

    def _close(self) -> None:
        self._due = math.inf
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def progress_line(
    step: int, total: int, figures: dict[str, float], left_s: float | None = None
) -> str:
    """Return e.g. `step 120/1500  loss 3.2145  5,412 tokens/s  MFU 38 %  1 min 20 s left`."""
    parts = [f"step {step}/{total}"]
    if figures.get("loss") is not None:
        at = "" if figures.get("step", step) == step else f" (step {figures['step']:.0f})"
        parts.append(f"loss {figures['loss']:.4f}{at}")
    if figures.get("tokens_per_s"):
        parts.append(f"{figures['tokens_per_s']:,.0f} tokens/s")
    if figures.get("mfu"):
        parts.append(f"MFU {percent(figures['mfu'])}")
    if left_s is not None:
        parts.append(f"{duration(left_s)} left")
    return "  ".join(parts)


def percent(fraction: float) -> str:
    """Return e.g. `38 %`, with a decimal below ten."""
    digits = 0 if 100 * abs(fraction) >= 9.95 else 1
    return f"{100 * fraction:.{digits}f} %"


def duration(seconds: float) -> str:
    """Return a time span in its two largest units, e.g. `1 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60:02} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"


def _on_terminal() -> bool:
    """Tell whether both streams lead to a terminal that can hold a bar (some have no size)."""
    streams = (sys.stdout, sys.stderr)
    if not all(stream.isatty() for stream in streams) or os.environ.get("TERM") == "dumb":
        return False
    return min(os.get_terminal_size(sys.stderr.fileno())) > 2


class _Pace:
    """Seconds per step, older steps fading out; pauses (validation, checkpoints) are part of it."""

    def __init__(self, step: int, now: float) -> None:
        self._step, self._now = step, now
        self._steps = self._seconds = 0.0

    def update(self, step: int, now: float) -> float | None:
        elapsed = now - self._now
        fading = math.exp(-elapsed / PACE_S)
        self._steps = self._steps * fading + step - self._step
        self._seconds = self._seconds * fading + elapsed
        self._step, self._now = step, now
        return self._seconds / self._steps if self._steps else None


class _Bar(tqdm):
    monitor_interval = 0  # tqdm's watching thread is of no use where every refresh is explicit
