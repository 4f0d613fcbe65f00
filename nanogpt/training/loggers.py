"""Loggers: metrics.csv, and W&B without a prompt."""

import logging
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from nanogpt.hub import problem_of
from nanogpt.runs.metrics import MetricsFile

log = logging.getLogger("nanogpt")


class MetricsLogger(Logger):
    """Write the run's `metrics.csv`."""

    name = ""
    version = ""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.file = MetricsFile(run_dir / "metrics.csv")

    @property
    def save_dir(self) -> str:
        return str(self.file.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append to the row of `step`, an optimizer step; Lightning's own `epoch` is left out."""
        assert step is not None, "rows of metrics.csv are optimizer steps"
        self.file.append(step, {name: metrics[name] for name in metrics if name != "epoch"})

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Ignore them: the run directory's `config.yaml` is their record."""

    @rank_zero_only
    def flush(self) -> None:
        """Force what was logged to the disk itself; call it before a checkpoint is written."""
        self.file.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.flush()


def wandb_logger(run_dir: Path, name: str, wandb_id: str, **options: Any) -> Logger:
    """Return W&B under one id for the whole life of the run; offline without a key or a network.

    `options` are those of Lightning's WandbLogger and of `wandb.init`.
    """
    from lightning.pytorch.loggers import WandbLogger

    os.environ.setdefault("WANDB_SILENT", "true")
    mode = os.environ.get("WANDB_MODE") or ("online" if _is_wandb_usable(run_dir) else "offline")
    settings = {"mode": mode, "resume": "allow", "project": "nanogpt", **options}
    logger = WandbLogger(name=name, id=wandb_id, save_dir=run_dir, **settings)
    logger._wandb_init.pop("anonymous", None)  # W&B warns of this removed argument
    return logger


def _is_wandb_usable(run_dir: Path) -> bool:
    """Return whether W&B can log in without a prompt and answers; log why where it does not."""
    from requests.utils import get_netrc_auth

    endpoint = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not (os.environ.get("WANDB_API_KEY") or get_netrc_auth(endpoint)):
        return False
    if problem := problem_of(endpoint):
        log.warning(
            "logger=wandb: %s; the run is logged offline, and wandb sync %s uploads it",
            problem,
            run_dir / "wandb" / "offline-run-*",
        )
    return not problem
