"""The Lightning Trainer of a run: from its node of the configuration, callbacks and loggers."""

import logging
import signal
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from nanogpt.build import CallbackError, build
from nanogpt.runs.run import Run
from nanogpt.training.checkpointing import AtomicCheckpointIO
from nanogpt.training.loggers import MetricsLogger
from nanogpt.training.module import StageModule
from nanogpt.training.progress import Progress

log = logging.getLogger("nanogpt")

# Lightning's advice that does not fit: the loader's items are steps, and checkpoints are ours.
MISFITTING = (
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*dataloader is not resumable.*",
    ".*was configured so validation will run.*",
    ".*exists and is not empty.*",
    ".*recommended to use `sync_dist=True`.*",
    ".*LeafSpec.*",
    ".*broadcast_buffers.*",
)


def quieten_lightning() -> None:
    """Silence Lightning's progress notes and the advice that does not fit."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # their tables
    for message in MISFITTING:
        warnings.filterwarnings("ignore", message=message)


def build_trainer(
    node: Mapping[str, Any],
    run: Run,
    device: torch.device,
    callbacks: Mapping[str, Callback],
    loggers: Mapping[str, Logger],
) -> Trainer:
    """Return the configured trainer for this rank.

    `metrics.csv` is always among its loggers, and our progress display gives way to a user's.
    """
    ranks = run.ranks
    several = ranks.world_size > 1
    bars = [callback for callback in callbacks.values() if isinstance(callback, ProgressBar)]
    if len(bars) > 1 or not node.get("enable_progress_bar", True):
        callbacks = {n: c for n, c in callbacks.items() if not isinstance(c, Progress)}
    has_metrics = any(isinstance(logger, MetricsLogger) for logger in loggers.values())
    keys = {
        "enable_progress_bar": bool(bars),
        **node,
        "accelerator": device.type,
        "devices": ranks.local_world_size if several or device.type != "cuda" else 1,
        "num_nodes": ranks.num_nodes,
        "precision": run.recorded["precision"],
        "plugins": [AtomicCheckpointIO(), *(node.get("plugins") or [])],
    }
    if several and node.get("strategy", "auto") == "auto":
        keys["strategy"] = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    # With trainer.deterministic torch would fill every new tensor, which all of ours overwrite.
    deterministic: Any = torch.utils.deterministic  # whose attribute the stubs lack
    deterministic.fill_uninitialized_memory = False
    trainer: Trainer = build(
        keys,
        "trainer",
        max_steps=run.max_steps,
        callbacks=[*callbacks.values()],
        logger=[*([] if has_metrics else [MetricsLogger(run.path)]), *loggers.values()],
        default_root_dir=run.path,
    )
    return trainer


def fit(
    trainer: Trainer,
    module: StageModule,
    data: LightningDataModule,
    parts: Mapping[str, Mapping[str, Any]],
    checkpoint: Path | None,
) -> None:
    """Train to the end of the budget, then validate on the final part of the validation set.

    Leaves by SystemExit 143 or 130 after a checkpoint where a signal ended training. Raises
    CallbackError where a callback, logger or data module of the user's own raises; `parts` are the
    callbacks and loggers by group and name.
    """
    log.info(
        "model: %s parameters in %s layers; budget: %s steps, %s tokens",
        f"{module.model.num_parameters():,}",
        module.model.config.n_layer,
        f"{trainer.max_steps:,}",
        f"{trainer.max_steps * module.tokens_per_step:,}",
    )
    if module.compiled:
        log.info("compiling at the first step, which takes a minute or more")
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        if module.stop_signal is not None:
            step = trainer.global_step
            log.info("stopped by a signal at step %s; the same command continues", step)
            raise SystemExit(128 + module.stop_signal)
        tokens = {getattr(data, name, None) for name in ("val_tokens", "final_val_tokens")}
        if len(tokens) > 1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.validate(module, datamodule=data, verbose=False)
    except SIGTERMException:  # Lightning's, for a signal before training or validation started
        raise SystemExit(128 + signal.SIGTERM) from None
    except Exception as error:
        named = {f"{group}.{name}": part for group in parts for name, part in parts[group].items()}
        if name := _failing_part(error, {**named, "data": data}):
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise CallbackError(
                f"{name} failed at step {trainer.global_step}: {what}; fix it, and the same "
                "command continues from the last checkpoint, if there is one"
            ) from error
        raise


def _failing_part(error: BaseException, parts: Mapping[str, Any]) -> str | None:
    """Return the name of the part, a class of the user's own, in which an error was raised."""
    own = {n: p for n, p in parts.items() if not type(p).__module__.startswith("nanogpt.")}
    for frame, _ in reversed([*traceback.walk_tb(error.__traceback__)]):
        called = [
            frame.f_locals.get(name) for name in ("self", "callback")
        ]  # the latter: Lightning
        if found := [name for name, part in own.items() if any(part is one for one in called)]:
            return found[0]
    return None
