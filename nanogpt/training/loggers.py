"""Loggers that may sit beside metrics.csv: TensorBoard, and W&B without a question."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger


def extra_logger(
    wanted: Mapping[str, Any], run_dir: Path, name: str, wandb_id: str
) -> Logger | None:
    """Return the logger that the config group `logger` names, None where metrics.csv is enough."""
    kind = wanted["use"]
    if kind == "tensorboard":
        return _tensorboard(run_dir)
    if kind == "wandb":
        return _wandb(wanted, run_dir, name, wandb_id)
    return None


def _tensorboard(run_dir: Path) -> Logger:
    from lightning.pytorch.loggers import TensorBoardLogger

    try:
        return TensorBoardLogger(run_dir, name="", version="tensorboard")
    except ModuleNotFoundError as error:
        raise ValueError(
            'logger=tensorboard needs the package tensorboard; pip install "nanogpt[tensorboard]"'
        ) from error


def _wandb(wanted: Mapping[str, Any], run_dir: Path, name: str, wandb_id: str) -> Logger:
    """W&B under one id for the whole life of the run; offline where no key is known."""
    from lightning.pytorch.loggers import WandbLogger

    os.environ.setdefault("WANDB_SILENT", "true")
    return WandbLogger(
        name=name,
        id=wandb_id,
        save_dir=run_dir,
        project=wanted["project"],
        entity=wanted["entity"],
        tags=list(wanted["tags"]),
        offline=not _has_wandb_key(),
        resume="allow",
    )


def _has_wandb_key() -> bool:
    """Return whether W&B can log in without asking: a key in the environment or in ~/.netrc."""
    import wandb

    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
