"""The Lightning Trainer of a run: from its node of the configuration, callbacks and loggers."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from nanogpt.build import build
from nanogpt.command import first_line
from nanogpt.runs.run import Run
from nanogpt.training.checkpointing import AtomicCheckpointIO, failing_callback
from nanogpt.training.loggers import MetricsLogger
from nanogpt.training.module import StageModule
from nanogpt.training.progress import Progress

log = logging.getLogger("nanogpt")


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
    replaced = [bar for bar in bars if isinstance(bar, Progress) and len(bars) > 1]
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
    trainer: Trainer = build(
        keys,
        "trainer",
        max_steps=run.max_steps,
        callbacks=[callback for callback in callbacks.values() if callback not in replaced],
        logger=[*([] if has_metrics else [MetricsLogger(run.path)]), *loggers.values()],
        default_root_dir=run.path,
    )
    return trainer


def fit(
    trainer: Trainer,
    module: StageModule,
    data: LightningDataModule,
    callbacks: Mapping[str, Callback],
    checkpoint: Path | None,
) -> None:
    """Train to the end of the budget, then validate on the final part of the validation set.

    Leaves by SystemExit 143 or 130 after a checkpoint where a signal ended training. Raises
    RuntimeError, naming the callback, where one of the user's own raises.
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
    except Exception as error:
        failed = failing_callback(error, trainer)
        for name, callback in callbacks.items():
            if callback is failed:
                what = f"{type(error).__name__}: {first_line(error)}"
                raise RuntimeError(
                    f"callbacks.{name} failed at step {trainer.global_step}: {what}; mend it, and "
                    "the same command continues from the last checkpoint"
                ) from error
        raise
    if module.stop_signal is not None:
        step = trainer.global_step
        log.info("stopped by a signal at step %s; the same command continues", step)
        raise SystemExit(128 + module.stop_signal)
    parts = {getattr(data, name, None) for name in ("val_tokens", "final_val_tokens")}
    if len(parts) > 1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        trainer.validate(module, datamodule=data, verbose=False)
