"""The optimizer step: what every stage's LightningModule shares.

Optimization is manual, and one batch of the loader is one whole optimizer step of this rank: a list
of micro-batches. So Lightning's batches, its global step and all intervals are optimizer steps,
gradient accumulation is an ordinary loop, and losses are summed and divided by the scored tokens of
the step over all ranks, and dropout follows from a seed that the batch has for each row, which
makes every split of a step over micro-batches and ranks give the same update.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from nanogpt.checkpoint import KEY
from nanogpt.model import GPT
from nanogpt.muon import MuonAdamW
from nanogpt.optim import factor_at, learning_rates, set_learning_rates
from nanogpt.prompts import Template
from nanogpt.tokenizer import Tokenizer
from nanogpt.training.micro_batch import fewer_rows, in_rows

# The batch contract: input_ids (B, T), targets (B, T), step_targets, row_seeds (B,).
Batch = dict[str, Any]


class StageModule(LightningModule):
    """A model in training: one optimizer step per batch, no synchronisation per step.

    A stage subclasses it with `summed_loss` and `scores`. `schedule` returns the factor of the
    learning rates for (step, max_steps). Losses and gradient norms stay on the device and are read
    together every `log_every_n_steps` of the trainer and before validation, samples and
    checkpoints; a value that is not finite then stops the run with its step.
    """

    # A rank without validation rows of its own is no error.
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        model: GPT,
        *,
        tokenizer: Tokenizer,
        make_optimizer: Callable[[GPT], torch.optim.Optimizer],
        schedule: Callable[[int, int], float],
        max_steps: int,
        tokens_per_step: int,
        grad_clip: float | None,
        compiled: bool,
        metadata: dict[str, Any],
        template: Template | None = None,
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model.train()
        self.tokenizer = tokenizer
        self.template = template
        self.make_optimizer = make_optimizer
        self.schedule = schedule
        self.max_steps = max_steps
        self.tokens_per_step = tokens_per_step
        self.grad_clip = grad_clip
        self.metadata = metadata
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.compiled, self.recompute = compiled, activation_checkpointing
        self.micro_batch: int | None = None  # rows of a forward, where memory needs fewer
        self.progress: dict[str, float] = {}
        self.stop_signal: int | None = None  # that ends training before its budget
        # The first step of a process, which compiles and warms up, is not timed.
        self.train_s, self.timed_steps = 0.0, 0
        self._is_first_step = True
        self._wall_s_before = 0.0  # of earlier processes
        self._began = time.monotonic()
        self._pending: list[tuple[Tensor, Tensor]] = []  # (loss, grad norm) since the last reading
        self._window_began, self._untimed = 0.0, 0

    # What a stage defines

    def summed_loss(self, batch: Batch) -> Tensor:
        """Return the loss summed over the scored positions of rows (B, T).

        Raises NotImplementedError; stages override it.
        """
        raise NotImplementedError

    def scores(self, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return the amounts and integer weights, of one shape, of each validation metric.

        A metric of rows (B, T) is the sum of its amounts over that of its weights.

        Raises NotImplementedError; stages override it.
        """
        raise NotImplementedError

    def measure(self) -> dict[str, Any]:
        """Return more metrics of the trained model for the summary; called on rank zero."""
        return {}

    # The step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.make_optimizer(self.model)
        self.learning_rates = learning_rates(optimizer)  # a checkpoint has those of its step
        if isinstance(optimizer, MuonAdamW) and isinstance(self.trainer.strategy, DDPStrategy):
            optimizer.shared = True  # ranks have all gradients
        return optimizer

    def on_train_start(self) -> None:
        self._began = self._window_began = time.monotonic()

    def training_step(self, micro_batches: list[Batch], batch_idx: int) -> None:
        step = self.trainer.global_step
        optimizer: Any = self.optimizers()
        factor = factor_at(self.schedule, step, self.max_steps)
        set_learning_rates(optimizer, self.learning_rates, factor, step)
        losses = self._add_gradients(micro_batches)
        grad_norm = self._clip_gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=self.trainer.world_size == 1)  # else in the buckets of DDP
        self._pending.append((torch.stack(losses).sum(), grad_norm))
        if self._is_first_step:
            self._is_first_step, self._untimed = False, 1
            self._window_began = time.monotonic()
        self._after_step(step + 1)

    def _after_step(self, step: int) -> None:
        """Log the training metrics where they are due; have the last step validated."""
        trainer: Any = self.trainer  # its stubs lack log_every_n_steps
        if step == 1 or is_due(step, trainer.log_every_n_steps, trainer):
            names = {"loss": "train/loss", "grad_norm": "train/grad_norm"}
            metrics = {names.get(k, k): v for k, v in self.read_metrics().items() if k != "step"}
            # For callbacks; loggers have them below, `metrics.csv` without rounding.
            self.log_dict(metrics, logger=False)
            self.log("step", float(step))  # by which Lightning labels what callbacks log
            for logger in self.trainer.loggers:
                logger.log_metrics({**metrics, "wall_s": self.wall_s()}, step)
        if step == self.trainer.max_steps:
            self.trainer.should_stop = True  # upon which Lightning validates, at any interval

    def _add_gradients(self, micro_batches: list[Batch]) -> list[Tensor]:
        """Add up the gradients of a step; return its shares of the loss.

        Where memory runs out, the step begins again in smaller micro-batches, which stay.
        """
        parts = [part for batch in micro_batches for part in in_rows(batch, self.micro_batch)]
        # Ranks reduce gradients at the last micro-batch of a step only.
        reduce_later = getattr(self.trainer.strategy, "block_backward_sync", contextlib.nullcontext)
        losses, n_rows = [], len(parts[0]["input_ids"])
        try:
            for batch in parts[:-1]:
                with reduce_later():
                    losses.append(self._backward(batch))
            return [*losses, self._backward(parts[-1])]
        except (RuntimeError, MemoryError) as error:
            self.micro_batch = fewer_rows(n_rows, error, self.trainer)
        self.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return self._add_gradients(micro_batches)

    def _backward(self, batch: Batch) -> Tensor:
        """Add a micro-batch's share of the step's gradient; return its share of the loss."""
        loss = self.summed_loss(batch) / batch["step_targets"]
        # DDP averages gradients over ranks; the shares are to be summed.
        self.manual_backward(loss * self.trainer.world_size)
        return loss.detach()

    def _clip_gradients(self) -> Tensor:
        """Scale the gradients down to norm `grad_clip`; return their norm before."""
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # fp16: the gradients are still multiplied by the loss scale
            norm = norm / scaler.scale(torch.ones_like(norm))
        if self.grad_clip is not None and not (norm.is_cpu and norm <= self.grad_clip):  # no wait
            torch.nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norm)
        return norm

    # Reading the metrics

    def read_metrics(self) -> dict[str, float]:
        """Read the losses since the last reading; return the metrics of the last step.

        Called on all ranks at the same steps. Raises FloatingPointError, naming the step, where a
        loss or a gradient norm is not finite.
        """
        if not self._pending:
            return dict(self.progress)
        shares = torch.stack([loss for loss, _ in self._pending])
        norms = torch.stack([norm for _, norm in self._pending]).tolist()
        losses: list[float] = self.trainer.strategy.reduce(shares, reduce_op="sum").tolist()
        n_steps, self._pending = len(losses), []
        now = time.monotonic()
        window_s, self._window_began = now - self._window_began, now
        n_timed, self._untimed = n_steps - self._untimed, 0
        self.train_s += window_s
        self.timed_steps += n_timed
        step = self.trainer.global_step
        self._check_finite(losses, norms, step - n_steps)
        self.progress = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "loss": losses[-1],
            "grad_norm": norms[-1],
            "learning_rate": float(self.trainer.optimizers[0].param_groups[0]["lr"]),
        }
        if n_timed:
            tokens_per_s = n_timed * self.tokens_per_step / window_s
            self.progress |= {"tokens_per_s": tokens_per_s, "mfu": self.mfu(tokens_per_s)}
        return dict(self.progress)

    def mfu(self, tokens_per_s: float) -> float:
        """Return the share of the devices' peak that the arithmetic uses, 0 where unknown."""
        peak_flops = self.peak_flops * self.trainer.world_size
        return tokens_per_s * self.flops_per_token / peak_flops if peak_flops else 0.0

    def wall_s(self) -> float:
        """Return the seconds since training began, those of earlier processes included."""
        return self._wall_s_before + time.monotonic() - self._began

    def _check_finite(self, losses: list[float], norms: list[float], before: int) -> None:
        overflow_is_normal = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not math.isfinite(loss) or not (math.isfinite(norm) or overflow_is_normal):
                raise FloatingPointError(
                    f"the loss is {loss} and the gradient norm {norm} at step {before + i + 1} "
                    f"(batch {before + i} of the data order, counted from 0); the checkpoint "
                    "before it stays: lower optim.learning_rate, or inspect that batch"
                )

    @contextlib.contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Keep what happens inside (validation, samples, checkpoints) out of the training time."""
        self.read_metrics()
        try:
            yield
        finally:
            self._window_began = time.monotonic()

    # Validation

    def on_validation_start(self) -> None:
        self.read_metrics()

    def validation_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Any]:
        return self._log_scores("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_scores("test", batch)

    def on_validation_end(self) -> None:
        self._window_began = time.monotonic()

    def _log_scores(self, split: str, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Log the weighted means over all batches of all ranks, in float64; return the scores.

        Lightning labels metrics with the metric `step` where there is one. It multiplies and adds
        batch sizes, so that one may be a tensor, which needs no wait for the device.
        """
        scores = {name: (wide(a), wide(w)) for name, (a, w) in self.scores(batch).items()}
        for name, (amounts, weights) in scores.items():
            weight: Any = weights.sum()
            mean = amounts.sum() / weight.clamp(min=1)
            self.log(f"{split}/{name}", mean, batch_size=weight, sync_dist=True)
        step = torch.tensor(self.trainer.global_step, dtype=torch.float64)
        self.log("step", step, batch_size=1, reduce_fx="max", sync_dist=True)
        return scores

    # Checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = {
            **self.metadata,
            "clock": {
                "train_s": self.train_s,
                "timed_steps": self.timed_steps,
                "wall_s": self.wall_s(),
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        clock = checkpoint[KEY]["clock"]
        self.train_s, self.timed_steps = clock["train_s"], clock["timed_steps"]
        self._wall_s_before = clock["wall_s"]


def wide(values: Tensor) -> Tensor:
    """Return values in float64, on the CPU where their device has none."""
    return (values.cpu() if values.is_mps else values).double()


def is_due(step: int, every_n_steps: int | None, trainer: Trainer) -> bool:
    """Return whether something of this interval happens at this step, as all does at the last."""
    if every_n_steps is None:
        return False
    return step % every_n_steps == 0 or step == trainer.max_steps
