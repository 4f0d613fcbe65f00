"""Callbacks: HellaSwag, samples, validation by parts, and stopping on a signal.

All intervals are optimizer steps; these are Lightning callbacks like a user's own.
"""

import os
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import validate_call

from nanogpt.disk import replacing
from nanogpt.evaluation import hellaswag
from nanogpt.evaluation.examples import find_benchmark, read_items
from nanogpt.generation import Reply, evaluating
from nanogpt.prompts import trimmed
from nanogpt.ranks import gathered, on_rank_zero
from nanogpt.runs.directory import RunDirectory, cut_samples
from nanogpt.training.checkpointing import will_validate
from nanogpt.training.module import StageModule, is_due
from nanogpt.values import Amount, Count, Text

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Periodic(Callback):
    """Act every n steps and when training ends, off the training clock; None is never."""

    def __init__(self, every_n_steps: int | None) -> None:
        self.every_n_steps = every_n_steps
        self._acted_at = -1

    def act(self, trainer: Trainer, module: StageModule) -> None:
        """Do the callback's work; called on all ranks."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_due(trainer.global_step, self.every_n_steps, trainer):
            self._acted_at = trainer.global_step  # before the checkpoint that was restored

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if is_due(trainer.global_step, self.every_n_steps, trainer):
            self._act(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_interrupted = getattr(pl_module, "stop_signal", None) is not None
        if self.every_n_steps is not None and not is_interrupted:
            self._act(trainer, pl_module)

    def _act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, StageModule)
        if trainer.global_step != self._acted_at:
            self._acted_at = trainer.global_step
            with pl_module.off_the_clock():
                self.act(trainer, pl_module)


class HellaSwag(Periodic):
    """Score HellaSwag every n steps and at the end, each rank its share of the items.

    In fp32, as `python -m nanogpt.evaluate` does: the last scores are those of the checkpoint. The
    first `limit` items of a file are taken, by default the hub's validation split.
    """

    @validate_call
    def __init__(
        self,
        stage: str,
        data_dir: str,
        *,
        every_n_steps: Count | None = None,
        path: Text | None = None,
        limit: Count | None = None,
    ) -> None:
        super().__init__(every_n_steps)
        if every_n_steps is None:
            return
        if stage == "classify":
            raise ValueError(
                "callbacks.hellaswag scores language models and stage=classify trains none; "
                "pass callbacks.hellaswag.every_n_steps=null"
            )
        self.items = on_rank_zero(
            lambda: read_items(
                hellaswag.Item, path or find_benchmark(hellaswag.BENCHMARK, data_dir), limit
            )
        )

    def act(self, trainer: Trainer, module: StageModule) -> None:
        requests = [hellaswag.completion_request(module.tokenizer, item) for item in self.items]
        with evaluating(module.model):
            scores = hellaswag.scores(module.model, self.items, requests)
        metrics = {f"hellaswag/{name}": value for name, value in scores.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)


class Samples(Periodic):
    """Write samples of the model every n steps and at the end, with the same prompts and seed.

    With a template the prompts are a user's messages, and there is a sample before the first step.
    """

    @validate_call
    def __init__(
        self,
        run_dir: Path,
        seed: int,
        *,
        prompts: Sequence[str],
        every_n_steps: Count | None = 500,
        max_new_tokens: Count = 200,
        temperature: Amount = 0.8,
        top_k: Count | None = 50,
    ) -> None:
        super().__init__(every_n_steps if prompts else None)
        self.path = run_dir / "samples.txt"
        self.prompts = prompts
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "seed": seed}
        self.sampling["max_new_tokens"] = max_new_tokens

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, StageModule)
        is_before = pl_module.template is not None and trainer.global_step == 0
        if is_before and self.every_n_steps is not None and trainer.is_global_zero:
            self.write(pl_module, 0)

    def act(self, trainer: Trainer, module: StageModule) -> None:
        if trainer.is_global_zero:
            self.write(module, trainer.global_step)

    def write(self, module: StageModule, step: int) -> None:
        """Append a sample for each prompt to samples.txt.

        Replaces those that a killed process wrote at this step.
        """
        cut_samples(self.path, step - 1)
        text = "\n---\n".join(self.sample(module, prompt) for prompt in self.prompts)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"=== step {step} ===\n{text}\n")

    def sample(self, module: StageModule, prompt: str) -> str:
        """Return the prompt with its continuation, or with the reply to it on the next line."""
        model = (module.model, module.tokenizer, prompt, module.template)
        text = Reply(*model, **self.sampling).read().text
        if module.template is None:
            return prompt + text
        return f"> {prompt}\n{trimmed(text) or '(it ends its reply at once)'}"


class ValidationParts(Callback):
    """Write `validation.csv`: the nats, tokens and bytes of each part of the last validation.

    The sums are of float64, over all ranks. Classifiers have no file, nor has data of a user's own
    whose batches lack `parts`.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = RunDirectory(run_dir).validation_path
        # Of each batch, the starts of parts (N,) and their sums (N, 3), on its device.
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batches = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        if not outputs or "bits_per_byte" not in outputs or "parts" not in batch:
            return
        nats, scored = outputs["loss"]  # (B, T) each
        columns = torch.stack([nats, scored, outputs["bits_per_byte"][1]], -1)
        starts, parts = batch["parts"].cpu().unique(return_inverse=True)
        parts = parts.expand_as(scored).flatten().to(nats.device, non_blocking=True)
        sums = nats.new_zeros(len(starts), 3).index_add(0, parts, columns.flatten(0, 1))
        self.batches.append((starts, sums))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        own = [torch.cat(parts).cpu() for parts in zip(*self.batches, strict=True)]
        totals: dict[int, Any] = defaultdict(float)
        for of_rank in gathered(own):
            for start, row in zip(*of_rank, strict=True):
                if row[1]:  # its tokens
                    totals[int(start)] += row
        if trainer.is_global_zero and totals:
            with replacing(self.path, "w") as file:
                file.write("start,nats,tokens,bytes\n")
                for start, row in sorted(totals.items()):
                    nats, n_tokens, n_bytes = row.tolist()
                    file.write(f"{start},{nats!r},{n_tokens:.0f},{n_bytes:.0f}\n")


class StopSignals(Callback):
    """On SIGTERM or SIGINT finish the step, write the checkpoint and leave.

    A second SIGINT leaves at once, as either does in the validation after training. The ranks agree
    on the step without waiting: each starts a reduction of its flag over gloo and reads the
    previous step's. The main thread blocks the signals until training or that validation starts,
    since Lightning's own handler broadcasts; one that another thread takes counts then.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._reduction: tuple[Any, torch.Tensor] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if _handles_signals():
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning would broadcast to all ranks, and wait for the device, before every step.
        epoch_loop: Any = trainer.fit_loop.epoch_loop
        epoch_loop._broadcast_sigterm_tensor = lambda: None
        self._handle(self._receive)
        if trainer.received_sigterm:  # before, by another thread, which does not block it
            self.received = signal.SIGTERM

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # which the same command repeats
            self._handle(_leave)
            if self.received is not None:  # after the last step
                _leave(self.received)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        signum = self._agreed()
        if signum and trainer.global_step < trainer.max_steps:
            assert isinstance(pl_module, StageModule)
            pl_module.stop_signal = signum
            if not will_validate(trainer):
                trainer.limit_val_batches = 0  # else Lightning validates before it stops
            trainer.should_stop = True

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        if _handles_signals():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    on_exception = teardown

    def _handle(self, handler: Callable[[int, FrameType | None], None]) -> None:
        if _handles_signals():
            for signum in STOP_SIGNALS:  # Lightning restores the former handlers
                signal.signal(signum, handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            os._exit(128 + signum)
        self.received = signum

    def _agreed(self) -> int:
        """Return the signal that a rank had received by the previous step, 0 for none."""
        if not dist.is_initialized():
            return self.received or 0
        agreed = 0
        if self._reduction is not None:
            work, flag = self._reduction
            work.wait()
            agreed = int(flag.item())
        flag = torch.tensor(self.received or 0)
        self._reduction = (dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True), flag)
        return agreed


def _leave(signum: int, frame: FrameType | None = None) -> None:
    raise SystemExit(128 + signum)


def _handles_signals() -> bool:
    """Return whether this thread may handle signals, on a system that can block them."""
    return hasattr(signal, "pthread_sigmask") and (
        threading.current_thread() is threading.main_thread()
    )
