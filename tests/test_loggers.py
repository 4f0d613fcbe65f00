"""Loggers in addition to metrics.csv."""

import logging
from pathlib import Path
from typing import Any

import pytest

from nanogpt.training import loggers
from nanogpt.training.loggers import wandb_logger


def test_wandb_with_a_key_and_no_network_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with caplog.at_level(logging.INFO, "nanogpt"):
        logger: Any = wandb_logger(tmp_path, "run", "abcd1234")
    assert logger._wandb_init["mode"] == "offline"
    assert "http://127.0.0.1:9 cannot be reached" in caplog.text
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in caplog.text


def test_wandb_with_a_key_is_online_where_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(loggers, "problem_of", lambda endpoint: "")
    logger: Any = wandb_logger(tmp_path, "run", "abcd1234")
    assert logger._wandb_init["mode"] == "online"
