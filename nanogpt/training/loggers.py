"""Loggers: metrics.csv, TensorBoard, and W&B without a question."""

import logging
import netrc
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from nanogpt.hub import problem_of
from nanogpt.runs.metrics import MetricsFile

log = logging.getLogger("nanogpt")


class MetricsLogger(Logger):
    """A `MetricsFile` for `Trainer(logger=[...])`, beside TensorBoard or W&B."""

    def __init__(self, file: MetricsFile) -> None:
        super().__init__()
        self.file = file

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.file.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append to the row of `step`, an optimizer step; Lightning's own `epoch` is left out."""
        assert step is not None, "metrics.csv is kept by optimizer step"
        self.file.append(step, {name: metrics[name] for name in metrics if name != "epoch"})

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Ignore them: the run directory's `config.yaml` is their record."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.file.flush()


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
            'logger=tensorboard needs the package tensorboard; pip install -e ".[tensorboard]"'
        ) from error


def _wandb(wanted: Mapping[str, Any], run_dir: Path, name: str, wandb_id: str) -> Logger:
    """W&B under one id for the whole life of the run; offline without a key or a network."""
    from lightning.pytorch.loggers import WandbLogger

    os.environ.setdefault("WANDB_SILENT", "true")
    mode = os.environ.get("WANDB_MODE") or ("online" if _is_wandb_usable(run_dir) else "offline")
    logger = WandbLogger(
        name=name,
        id=wandb_id,
        save_dir=run_dir,
        project=wanted["project"],
        entity=wanted["entity"],
        tags=list(wanted["tags"]),
        mode=mode,
        resume="allow",
    )
    logger._wandb_init.pop("anonymous", None)  # W&B no longer knows it, and says so
    return logger


def _is_wandb_usable(run_dir: Path) -> bool:
    """Return whether W&B can log in without a prompt and answers; log why where it does not."""
    endpoint = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not _has_wandb_key(endpoint):
        return False
    if problem := problem_of(endpoint):
        log.warning(
            "logger=wandb: %s; the run is logged offline, and wandb sync %s uploads it",
            problem,
            run_dir / "wandb" / "offline-run-*",
        )
    return not problem


def _has_wandb_key(endpoint: str) -> bool:
    """Return whether there is a key in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(urlsplit(endpoint).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
