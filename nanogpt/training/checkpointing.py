"""When checkpoints are written, which of them stay, and how Lightning writes and reads them."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO

from nanogpt.checkpoint import (
    LAST,
    read_checkpoint,
    read_record,
    step_checkpoints,
    write_checkpoint,
)
from nanogpt.disk import link_atomically
from nanogpt.runs.metrics import MetricsFile
from nanogpt.training.module import StageModule, is_due

log = logging.getLogger("nanogpt.checkpoints")


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's door to our checkpoint files: atomic, verified, loud on failure."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Raises ValueError, and leaves no file, for a content that could not be read back."""
        log.debug("%s: sha256 %s", path, write_checkpoint(checkpoint, Path(path)))
        try:
            read_record(Path(path))
        except ValueError:
            Path(path).unlink()
            raise

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpointing(Callback):
    """Write `step_000500.ckpt` every n steps and at the end; `last.ckpt` is its second name.

    The last `keep` stay, and the one of the best validation loss.
    """

    def __init__(
        self, directory: Path, metrics: MetricsFile, *, every_n_steps: int, keep: int
    ) -> None:
        if every_n_steps < 1 or keep < 0:
            raise ValueError(
                f"callbacks.checkpoint has every_n_steps={every_n_steps} and keep={keep}; "
                "pass at least 1 step and at least 0 kept files"
            )
        self.directory = directory
        self.metrics = metrics
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.best: tuple[float, int] | None = None  # (validation loss, step)
        self.saved_step = -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if is_due(trainer.global_step, self.every_n_steps, trainer):
            self.save(trainer, pl_module)

    def save(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the checkpoint of this step, once, and remove those that need not stay."""
        assert isinstance(module, StageModule)
        step = trainer.global_step
        if step == self.saved_step:
            return
        with module.off_the_clock():
            self._note_best(module, step)
            path = self.directory / f"step_{step:06d}.ckpt"
            if trainer.is_global_zero:
                self.metrics.flush()
            trainer.save_checkpoint(path)
            if trainer.is_global_zero:
                link_atomically(path, self.directory / LAST)
                self._remove_old(step)
            self.saved_step = step

    def _note_best(self, module: StageModule, step: int) -> None:
        loss = module.validation.get("loss")
        if loss is None or module.validated_at != step:
            return
        if self.best is None or loss < self.best[0]:
            self.best = (loss, step)

    def _remove_old(self, step: int) -> None:
        steps = step_checkpoints(self.directory)
        newest = [s for s in steps if s <= step][-self.keep :] if self.keep else []
        best = [self.best[1]] if self.best else []
        for old in set(steps) - set(newest) - set(best):
            steps[old].unlink()

    def state_dict(self) -> dict[str, Any]:
        return {"best": list(self.best) if self.best else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best = state_dict["best"]
        self.best = (float(best[0]), int(best[1])) if best else None
