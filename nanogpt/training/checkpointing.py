"""When checkpoints are written, which of them stay, and how Lightning writes and reads them."""

import copy
import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import validate_call
from torch.utils._pytree import tree_leaves

from nanogpt.checkpoint import read_checkpoint, read_record, write_checkpoint
from nanogpt.disk import link_atomically
from nanogpt.runs.directory import step_checkpoints
from nanogpt.training.loggers import MetricsLogger
from nanogpt.training.module import StageModule, is_due
from nanogpt.values import Count, Size


class AtomicCheckpointIO(CheckpointIO):
    """Write a Lightning checkpoint as a whole or not at all, and verify what was written.

    With `then` set, the next one is copied and written in a thread, which calls `then` after it.
    """

    def __init__(self) -> None:
        self.then: Callable[[], None] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")  # which ends before the process
        self._writing: Future[None] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Raises ValueError, and leaves no file, for a content that could not be read back."""
        self.join()
        then, self.then = self.then, None
        if then is None:
            _write(checkpoint, Path(path))
        else:
            self._writing = self._thread.submit(_write_copy, *_copied(checkpoint), Path(path), then)

    def join(self) -> None:
        """Wait until the checkpoint is written; raise what writing it raised, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        self.join()
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        self.join()
        Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:  # after training, whether it succeeded or not
        self.join()


class Checkpointing(ModelCheckpoint):
    """Write `step_000500.ckpt` every n steps and at the end; `last.ckpt` is its second name.

    The last `keep` stay, and the one of the best validation loss. Where a step is validated, its
    checkpoint is written after the validation, with the state that other callbacks then have.
    """

    state_key = "Checkpointing"

    @validate_call
    def __init__(self, run_dir: Path, *, every_n_steps: Count = 500, keep: Size = 2) -> None:
        # Lightning finds `last` by its directory, and warns of one in use where it writes itself.
        super().__init__(dirpath=run_dir / "checkpoints", save_top_k=0)
        self.directory = run_dir / "checkpoints"
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.best: tuple[float, int] | None = None  # (validation loss, step); Lightning's `best`
        self.saved_step = 0
        self.stopped = ""  # why training ended before its budget
        self.max_steps = 0  # that budget

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stopped and self.max_steps == trainer.max_steps:
            trainer.should_stop = True  # as it had, when the process ended

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._is_due(trainer) and not will_validate(trainer):
            self.save(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer):
            loss = trainer.callback_metrics.get("val/loss")
            self.save(trainer, pl_module, None if loss is None else float(loss))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save the step after which a callback of the only process failed, but no diverged one."""
        is_between_steps = trainer.fit_loop.total_batch_idx + 1 == trainer.global_step > 0
        is_sound = is_between_steps and not isinstance(exception, FloatingPointError)
        if is_sound and trainer.world_size == 1 and not will_validate(trainer):
            self.save(trainer, pl_module)

    def save(self, trainer: Trainer, module: LightningModule, loss: float | None = None) -> None:
        """Write the checkpoint of this step, once, and remove those that need not stay."""
        assert isinstance(module, StageModule)
        step = trainer.global_step
        if step == self.saved_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.saved_step = step  # or tried, so that on_exception does not repeat what failed
        io = trainer.strategy.checkpoint_io
        own = io if isinstance(io, AtomicCheckpointIO) else None  # not a plugin of the user's
        if own is not None:
            own.join()  # `best` is still that of the checkpoint before
        if loss is not None and (self.best is None or loss < self.best[0]):
            self.best = (loss, step)
        if self.best is not None:
            self.best_model_path = str(self.directory / f"step_{self.best[1]:06d}.ckpt")
        self.stopped, self.max_steps = stopping_reason(trainer), trainer.max_steps
        with module.off_the_clock():
            self.directory.mkdir(parents=True, exist_ok=True)
            path = self.directory / f"step_{step:06d}.ckpt"
            for logger in trainer.loggers:
                if isinstance(logger, MetricsLogger):
                    logger.flush()
            finish = partial(self._finish, path, step)
            if trainer.is_global_zero and own is not None:
                own.then = finish
            trainer.save_checkpoint(path)
            if trainer.is_global_zero and (own is None or own.then is finish):  # which it left
                finish()

    def _finish(self, path: Path, step: int) -> None:
        link_atomically(path, self.directory / "last.ckpt")
        self._remove_old(step)

    def _is_due(self, trainer: Trainer) -> bool:
        now = trainer.should_stop or is_due(trainer.global_step, self.every_n_steps, trainer)
        return trainer.state.fn == TrainerFn.FITTING and now

    def _remove_old(self, step: int) -> None:
        steps = step_checkpoints(self.directory)
        newest = [s for s in steps if s <= step][-self.keep :] if self.keep else []
        for old in set(steps) - {*newest, self.best[1] if self.best else None}:
            steps[old].unlink()

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("best", "stopped", "max_steps")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    write_checkpoint(checkpoint, path)
    try:
        read_record(path)
    except ValueError as error:
        path.unlink()
        for name, state in checkpoint.get("callbacks", {}).items():
            if not _is_plain(state):
                raise ValueError(
                    f"state_dict() of the callback {name} holds Python objects, which can run "
                    "code when loaded; let it return tensors, numbers, text, lists and dicts"
                ) from error
        raise


def _copied(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], torch.Event | None]:
    """Return a copy in the memory of the CPU, and the event of a GPU after which it is there."""
    copies, event = {}, None
    for leaf in tree_leaves(checkpoint):
        if isinstance(leaf, torch.Tensor) and not leaf.is_cpu:
            copy_ = torch.empty_like(leaf, device="cpu", pin_memory=leaf.is_cuda)
            copies[id(leaf)] = copy_.copy_(leaf, non_blocking=leaf.is_cuda)
            if leaf.is_cuda:
                event = torch.cuda.current_stream(leaf.device).record_event(event)
    return copy.deepcopy(checkpoint, copies), event


def _write_copy(
    checkpoint: dict[str, Any], event: torch.Event | None, path: Path, then: Callable[[], None]
) -> None:
    if event is not None:
        event.synchronize()
    _write(checkpoint, path)
    then()


def _is_plain(state: Any) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception:  # whatever a state's own pickling does
        return False
    return True


def stopping_reason(trainer: Trainer) -> str:
    """Return which callback ended training before its budget, and why; empty where none did."""
    if not trainer.should_stop or trainer.global_step == trainer.max_steps:
        return ""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if message := getattr(callback, "stopping_reason_message", None):  # EarlyStopping's
            return f"{type(callback).__name__}: {message}"
    by_signal = getattr(trainer.lightning_module, "stop_signal", None)
    return "" if by_signal else "a callback set should_stop"


def will_validate(trainer: Trainer) -> bool:
    """Return whether Lightning validates after this step's `on_train_batch_end`."""
    every = trainer.val_check_batch
    is_due = isinstance(every, int) and trainer.global_step % every == 0
    return trainer.enable_validation and (trainer.should_stop or is_due)
