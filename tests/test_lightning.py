"""Lightning's own loops, callbacks and checkpoints on our modules: stock features do their jobs."""

import ast
import csv
import logging
import math
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
)
from torch.utils.data import DataLoader

from nanogpt.checkpoint import record, weights_sha256
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer import byte_tokenizer
from nanogpt.training.callbacks import Samples, StopSignals
from nanogpt.training.checkpointing import AtomicCheckpointIO, Checkpointing
from nanogpt.training.language_model import LanguageModel
from nanogpt.training.loggers import MetricsLogger
from nanogpt.training.trainer import quieten_lightning

TOKENIZER = byte_tokenizer()
CONFIG = GPTConfig(
    block_size=16, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=2, n_embd=16, dropout=0.1
)
MAX_STEPS, VALIDATED_EVERY, SAVED_EVERY = 13, 4, 3
PRODUCT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quiet() -> None:
    quieten_lightning()


def rows(number: int) -> dict[str, Any]:
    tokens = torch.randint(0, 255, (2, 17), generator=torch.Generator().manual_seed(number))
    return {
        "input_ids": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "step_targets": 4 * 16,
        "row_seeds": torch.arange(2) + number,
    }


class Data(LightningDataModule):
    """A user's own data module that keeps the batch contract: two micro-batches a step."""

    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.workers = workers

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        first, end = self.trainer.global_step, self.trainer.max_steps
        steps = {step: [rows(2 * step), rows(2 * step + 1)] for step in range(end)}
        return DataLoader(
            steps,  # type: ignore[arg-type]
            batch_size=None,
            sampler=_Rest(range(first, end), end),
            num_workers=self.workers,
        )

    def val_dataloader(self) -> Any:
        return DataLoader([rows(1000 + i) for i in range(3)], batch_size=None)  # type: ignore[arg-type]


class _Rest:
    def __init__(self, steps: range, length: int) -> None:
        self.steps, self.length = steps, length

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def __len__(self) -> int:
        return self.length


class Kill(Callback):
    """Send SIGTERM to this process during a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Run:
    """A short training in a directory, from a checkpoint of it or from the start."""

    def __init__(
        self,
        directory: Path,
        *callbacks: Callback,
        max_steps: int = MAX_STEPS,
        start: Path | None = None,
        workers: int = 0,
    ) -> None:
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.directory = directory
        torch.manual_seed(0)
        self.module = LanguageModel(
            GPT(CONFIG),
            tokenizer=TOKENIZER,
            make_optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
            schedule=lambda step, max_steps: 1.0,
            max_steps=max_steps,
            tokens_per_step=64,
            grad_clip=1.0,
            compiled=False,
            metadata=record("pretrain", CONFIG, TOKENIZER),
        )
        self.checkpointing = Checkpointing(directory, every_n_steps=SAVED_EVERY, keep=9)
        self.trainer = Trainer(
            max_steps=max_steps,
            max_epochs=-1,
            accelerator="cpu",
            val_check_interval=VALIDATED_EVERY,
            check_val_every_n_epoch=None,
            log_every_n_steps=3,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=[MetricsLogger(directory)],
            plugins=[AtomicCheckpointIO()],
            callbacks=[*callbacks, StopSignals(), self.checkpointing],
        )
        self.trainer.fit(self.module, datamodule=Data(workers), ckpt_path=start, weights_only=True)
        self.weights = weights_sha256(self.module.model)

    def checkpoint(self, step: int) -> Path:
        return self.directory / "checkpoints" / f"step_{step:06d}.ckpt"

    def metrics(self, after: int = 0) -> list[tuple[str, str, str]]:
        with open(self.directory / "metrics.csv", encoding="utf-8") as file:
            return [
                (row["step"], row["train/loss"], row["val/loss"])
                for row in csv.DictReader(file)
                if int(row["step"]) > after
            ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    quieten_lightning()
    return Run(tmp_path_factory.mktemp("whole"))


def test_validation_follows_lightnings_interval_and_the_last_step(whole: Run) -> None:
    assert [step for step, _, loss in whole.metrics() if loss] == ["4", "8", "12", "13"]
    assert [step for step, loss, _ in whole.metrics() if loss] == ["1", "3", "6", "9", "12", "13"]


def test_callback_metrics_hold_the_latest_of_both_splits(whole: Run) -> None:
    metrics = whole.trainer.callback_metrics
    last = whole.metrics()[-1]
    assert float(metrics["val/loss"]) == float(last[2])
    assert float(metrics["train/loss"]) == pytest.approx(float(last[1]), rel=1e-6)


def test_the_best_is_that_of_a_step_that_was_saved_and_validated(whole: Run) -> None:
    losses = {int(step): float(loss) for step, _, loss in whole.metrics() if loss}
    best = min((12, 13), key=losses.__getitem__)
    assert whole.checkpointing.best == (pytest.approx(losses[best]), best)
    assert whole.trainer.checkpoint_callback is whole.checkpointing
    assert whole.checkpointing.best_model_path == str(whole.checkpoint(best))


@pytest.mark.parametrize(("step", "workers"), [(3, 0), (6, 2), (9, 0), (12, 0)])
def test_resuming_is_exact_at_a_validated_step_and_between(
    whole: Run, tmp_path: Path, step: int, workers: int
) -> None:
    resumed = Run(tmp_path, start=whole.checkpoint(step), workers=workers)
    assert resumed.weights == whole.weights
    assert resumed.metrics() == whole.metrics(after=step)


def test_a_grown_budget_is_the_same_as_that_budget_at_once(whole: Run, tmp_path: Path) -> None:
    at_once = Run(tmp_path / "at_once", max_steps=18)
    grown = Run(tmp_path / "grown", max_steps=18, start=whole.checkpoint(MAX_STEPS))
    assert grown.weights == at_once.weights
    assert grown.metrics() == at_once.metrics(after=MAX_STEPS)


@pytest.mark.parametrize("step", [1, 7, 8])
def test_a_signal_ends_the_step_with_a_checkpoint_and_no_validation_of_its_own(
    whole: Run, tmp_path: Path, step: int
) -> None:
    handlers = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    stopped = Run(tmp_path, Kill(step))
    assert (stopped.trainer.global_step, stopped.module.stop_signal) == (step, signal.SIGTERM)
    assert [s for s, _, loss in stopped.metrics() if loss] == [str(s) for s in (4, 8) if s <= step]
    assert handlers == [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    resumed = Run(tmp_path, start=stopped.checkpoint(step))
    assert resumed.weights == whole.weights
    assert resumed.metrics() == whole.metrics()


def early() -> EarlyStopping:
    return EarlyStopping("val/loss", patience=1, mode="max")  # the loss falls, so it stops soon


def test_early_stopping_ends_training_with_a_checkpoint_and_its_reason(tmp_path: Path) -> None:
    stopped = Run(tmp_path / "whole", early(), max_steps=100)
    assert stopped.trainer.global_step == 8
    assert stopped.checkpointing.stopped.startswith("EarlyStopping: Monitored metric val/loss")
    for step in (3, 8):  # the latter as if killed between its checkpoint and the summary
        start = stopped.checkpoint(step)
        resumed = Run(tmp_path / str(step), early(), max_steps=100, start=start)
        assert resumed.trainer.global_step == 8
        assert resumed.weights == stopped.weights


class StopAt(Callback):
    """End training at a step, without a reason."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.should_stop = True


def test_a_run_that_a_callback_stopped_takes_no_further_step(tmp_path: Path) -> None:
    Run(tmp_path, StopAt(5))
    resumed = Run(tmp_path, StopAt(5), start=tmp_path / "checkpoints" / "last.ckpt")
    assert resumed.trainer.global_step == 5
    assert resumed.checkpointing.stopped == "a callback set should_stop"
    grown = Run(tmp_path, max_steps=20, start=resumed.checkpoint(5))
    assert (grown.trainer.global_step, grown.checkpointing.stopped) == (20, "")


def test_a_signal_at_the_step_of_early_stopping_does_not_undo_it(tmp_path: Path) -> None:
    stopped = Run(tmp_path, early(), Kill(8), max_steps=100)
    assert stopped.module.stop_signal == signal.SIGTERM
    resumed = Run(tmp_path, early(), max_steps=100, start=stopped.checkpoint(8))
    assert resumed.trainer.global_step == 8
    assert resumed.checkpointing.stopped.startswith("EarlyStopping: Monitored metric val/loss")


def test_samples_of_a_killed_process_are_replaced(tmp_path: Path) -> None:
    def samples() -> Samples:
        return Samples(tmp_path, 0, prompts=["a"], every_n_steps=50, max_new_tokens=2)

    stopped = Run(tmp_path, early(), samples(), max_steps=100)
    written = stopped.directory / "samples.txt"
    text = written.read_bytes()
    assert text.startswith(b"=== step 8 ===\na")
    Run(tmp_path, early(), samples(), max_steps=100, start=stopped.checkpoint(8))
    assert written.read_bytes() == text


def test_stock_monitors_write_into_metrics_csv(tmp_path: Path) -> None:
    Run(tmp_path, LearningRateMonitor(), DeviceStatsMonitor(cpu_stats=False))
    with open(tmp_path / "metrics.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == sorted((r["step"] for r in table), key=int)
    assert {row["lr-AdamW"] for row in table if row["lr-AdamW"]} == {"0.01"}


class Weights(Callback):
    """Record the final norm's weights after every step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.seen.append(pl_module.model.ln_f.weight.detach().clone())


def test_stock_averages_become_the_weights_and_resume(tmp_path: Path) -> None:
    weights = Weights()
    Run(tmp_path / "plain", weights)
    expected, *others = weights.seen
    for one in others:
        expected = 0.9 * expected + 0.1 * one
    whole = Run(tmp_path / "whole", EMAWeightAveraging(decay=0.9))
    torch.testing.assert_close(whole.module.model.state_dict()["ln_f.weight"], expected)
    resumed = Run(tmp_path / "whole", EMAWeightAveraging(decay=0.9), start=whole.checkpoint(6))
    assert weights_sha256(resumed.module.model) == weights_sha256(whole.module.model)


class LongTokens(Callback):
    """Let every token have seven bytes."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.token_bytes.fill_(7)


def test_averages_leave_the_bytes_of_tokens(tmp_path: Path) -> None:
    run = Run(tmp_path, LongTokens(), EMAWeightAveraging(decay=0.9))
    metrics = run.trainer.callback_metrics
    expected = metrics["val/loss"] / math.log(2) / 7
    torch.testing.assert_close(metrics["val/bits_per_byte"], expected)


class LogStep(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        pl_module.log("its_step", float(trainer.global_step))


def test_what_a_callback_logs_stands_in_the_row_of_its_step(tmp_path: Path) -> None:
    Run(tmp_path, LogStep())
    with open(tmp_path / "metrics.csv", encoding="utf-8") as file:
        found = [(row["step"], row["its_step"]) for row in csv.DictReader(file) if row["its_step"]]
    assert found == [(step, f"{step}.0") for step in ("3", "6", "9", "12", "13")]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_is_validated_and_tested_by_itself(whole: Run) -> None:
    module = LanguageModel(
        GPT(CONFIG),
        tokenizer=TOKENIZER,
        make_optimizer=lambda model: torch.optim.AdamW(model.parameters()),
        schedule=lambda step, max_steps: 1.0,
        max_steps=1,
        tokens_per_step=64,
        grad_clip=1.0,
        compiled=False,
        metadata={},
    )
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, plugins=[AtomicCheckpointIO()]
    )
    loader = Data().val_dataloader()
    path = whole.checkpoint(12)
    metrics = trainer.validate(module, loader, ckpt_path=path, verbose=False, weights_only=True)[0]
    expected = float({step: loss for step, _, loss in whole.metrics()}["12"])
    assert metrics["val/loss"] == pytest.approx(expected, abs=1e-9)
    tested = trainer.test(module, loader, ckpt_path=path, verbose=False, weights_only=True)[0]
    assert tested["test/loss"] == metrics["val/loss"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(("which", "step"), [("best", None), ("last", MAX_STEPS)])
def test_best_and_last_are_found_by_name(tmp_path: Path, which: str, step: int | None) -> None:
    run = Run(tmp_path)
    step = step or (run.checkpointing.best or (0, 0))[1]
    for parameter in run.module.parameters():
        parameter.data.zero_()
    loader = Data().val_dataloader()
    metrics = run.trainer.validate(
        run.module, loader, ckpt_path=which, verbose=False, weights_only=True
    )[0]
    expected = float({s: loss for s, _, loss in run.metrics()}[str(step)])
    assert metrics["val/loss"] == pytest.approx(expected, abs=1e-9)


IMPORTS = (ast.Import, ast.ImportFrom)
# Private members of libraries in use, each with its reason.
EXCEPTIONS = {
    # Lightning would synchronize all ranks, and wait for the device, before every step.
    ("nanogpt/training/callbacks.py", "_broadcast_sigterm_tensor"),
    # Lightning passes what W&B no longer knows, which prints a warning.
    ("nanogpt/training/loggers.py", "_wandb_init"),
    # torch's product of int8 weights has no public name.
    ("serving/engine/forward.py", "_weight_int8pack_mm"),
    # torch has no public name of tensors without storage, nor of a mode that sees each operation.
    ("nanogpt/training/memory.py", "torch._subclasses.fake_tensor.FakeTensorMode"),
    ("nanogpt/training/memory.py", "torch.utils._python_dispatch.TorchDispatchMode"),
    # Nor has a function that returns the tensors in nested lists and dicts.
    ("nanogpt/training/checkpointing.py", "torch.utils._pytree.tree_leaves"),
}


def test_private_members_of_libraries_are_those_listed() -> None:
    scripts = [PRODUCT / "train.py", PRODUCT / "serve.py"]
    folders = (PRODUCT / name for name in ("nanogpt", "serving", "hydra_plugins"))
    trees = {
        path.relative_to(PRODUCT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in [*scripts, *(path for folder in folders for path in folder.rglob("*.py"))]
    }
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    ours = {node.name for _, node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    ours |= {
        node.attr
        for _, node in nodes
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
    documented = (
        "__",
        "_foreach",
        "_fields",
        "_asdict",
        "_replace",
        "_exit",
    )  # underscored, and public
    members = {
        (path, node.attr)
        for path, node in nodes
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and node.attr not in ours
        and not node.attr.startswith(documented)
    }
    imports = {(path, name) for path, node in nodes for name in private_imports(node)}
    assert members | imports == EXCEPTIONS


def private_imports(node: ast.AST) -> list[str]:
    """Return the dotted names that an import takes from private modules, or private ones."""
    names = [alias.name for alias in node.names] if isinstance(node, IMPORTS) else []
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{name}" for name in names]
    return [name for name in names if re.search(r"(^|\.)_(?!_)", name)]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from torch._dynamo import config", ["torch._dynamo.config"]),
        ("import torch._inductor as inductor", ["torch._inductor"]),
        ("import os, _thread", ["_thread"]),
        ("from torch.utils import _pytree, data", ["torch.utils._pytree"]),
        ("from __future__ import annotations", []),
        ("from nanogpt import __version__", []),
    ],
)
def test_imports_of_private_names_are_found(line: str, found: list[str]) -> None:
    assert private_imports(ast.parse(line).body[0]) == found


def test_private_members_in_use_exist() -> None:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    assert callable(getattr(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"))  # noqa: B009


def test_logging_of_lightning_is_quiet_but_for_warnings_of_users() -> None:
    assert logging.getLogger("lightning.pytorch").level == logging.ERROR
