"""One sitting of a run: open its directory, settle what is left to the machine, fit, and sum up."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from nanogpt.checkpoint import (
    Checkpoint,
)
from nanogpt.command import first_line
from nanogpt.evaluation import hellaswag
from nanogpt.evaluation.examples import find_benchmark
from nanogpt.model import GPTConfig
from nanogpt.optim import Schedule, check_schedule, may_extend
from nanogpt.prompts import Template, find_template
from nanogpt.ranks import Ranks, on_rank_zero
from nanogpt.runs.identity import budget_steps
from nanogpt.runs.metrics import MetricsFile
from nanogpt.runs.run import Run, open_run
from nanogpt.tokenizer import Tokenizer
from nanogpt.training.callbacks import (
    Figures,
    HellaSwag,
    Samples,
    StopSignals,
    Validation,
)
from nanogpt.training.checkpointing import AtomicCheckpointIO, Checkpointing
from nanogpt.training.launch import resolve_device
from nanogpt.training.loggers import MetricsLogger, extra_logger
from nanogpt.training.logs import quieten_lightning
from nanogpt.training.machine import device_name
from nanogpt.training.module import Batch, StageModule
from nanogpt.training.probe import Decisions, decide
from nanogpt.training.progress import Progress
from nanogpt.training.report import is_whole, write_report
from nanogpt.training.summary import summarise, tell

log = logging.getLogger("nanogpt")


class Session:
    """One sitting of a run, from opening it to its summary.

    `source_fingerprint` returns the fingerprint of the data's source. `finished` is the summary of
    a run that has nothing left to do.
    """

    run: Run

    def __init__(
        self, config: dict[str, Any], schedule: Schedule, source_fingerprint: Callable[[], str]
    ) -> None:
        self.config = config
        self.source_fingerprint = source_fingerprint
        self.schedule = schedule
        check_schedule(schedule, budget_steps(config))
        self.ranks = Ranks.from_environment()
        self.device = resolve_device(config["trainer"]["accelerator"])
        self.benchmark: list[list[hellaswag.Item]] = []  # HellaSwag's items, where they are scored
        if config["trainer"]["deterministic"]:  # cuBLAS reads it at its first product
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._stack = contextlib.ExitStack()

    @property
    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that has nothing left to do."""
        return self.run.finished

    @property
    def prepared(self) -> str | None:
        """The fingerprint of the prepared corpus that replaces a missing source."""
        return self.run.prepared

    @property
    def max_steps(self) -> int:
        """The budget in optimizer steps."""
        return self.run.max_steps

    @property
    def init_from(self) -> dict[str, str] | None:
        """Path of what the run started from, and the sha256 of its weights."""
        return self.run.init_from

    def __enter__(self) -> "Session":
        quieten_lightning()
        with self._stack:
            self.run = self._stack.enter_context(
                open_run(
                    self.config,
                    self.device,
                    source_fingerprint=self.source_fingerprint,
                    may_extend=partial(may_extend, self.schedule),
                )
            )
            if self.finished is None:
                self.benchmark = on_rank_zero(lambda: hellaswag_items(self.config))
            elif self.ranks.rank == 0 and not is_whole(self.run.files.report_path):
                self._write_report()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    # Settling

    def starting_point(self) -> Checkpoint | None:
        """Return the model and tokenizer to start from, None where they are to be made."""
        block = self.config["model"]["block"]
        return self.run.initial_checkpoint(allow_modules=[block] if block else [])

    def end_by(self, step: int) -> None:
        """End the run at a step, where its budget goes beyond."""
        self.run.end_by(step)

    def settle(
        self,
        model_config: GPTConfig,
        rows_per_rank: int,
        corpus_fingerprint: str,
        start: Checkpoint | None,
    ) -> Decisions:
        """Decide what is left to the machine, check the corpus, and write config.yaml.

        `rows_per_rank` are the rows of block_size tokens that a rank sees in a step. Raises
        ValueError where the corpus is not the one that the run began with.
        """
        decisions = on_rank_zero(
            lambda: self._settle(model_config, rows_per_rank, corpus_fingerprint)
        )
        settings = {k: v for k, v in asdict(decisions).items() if k != "reasons"}
        self.run.begin({"corpus": corpus_fingerprint, **settings})
        torch.set_num_threads(decisions.threads)
        for reason in decisions.reasons:
            key = reason.partition(" ")[0]
            is_auto = self.config["trainer"].get(key, self.config.get(key)) == "auto"
            log.info("%s", reason.replace(": as given", ": same as before") if is_auto else reason)
        log.info(
            "tokens_per_step %s = %s rank(s) x %s micro-batch(es) x %s rows x block_size %s",
            f"{self.config['tokens_per_step']:,}",
            self.ranks.world_size,
            rows_per_rank // decisions.micro_batch,
            decisions.micro_batch,
            model_config.block_size,
        )
        return decisions

    def _settle(
        self,
        model_config: GPTConfig,
        rows_per_rank: int,
        corpus_fingerprint: str,
    ) -> Decisions:
        config = self.config
        self.run.check_corpus(corpus_fingerprint)
        return decide(
            model_config,
            device=self.device,
            rows_per_rank=rows_per_rank,
            max_steps=self.max_steps,
            data_dir=Path(config["data_dir"]),
            local_world_size=self.ranks.local_world_size,
            deterministic=config["trainer"]["deterministic"],
            precision=self._setting("precision"),
            compile=self._setting("compile"),
            micro_batch=self._setting("micro_batch", rows_per_rank),
            threads=self._setting("threads"),
            remeasure=config["remeasure"],
        )

    def _setting(self, key: str, rows_per_rank: int = 0) -> Any:
        """Return a setting as typed, else as the run began with it where that fits, else auto.

        `remeasure` sets aside what the run began with, but for the precision: it is identity.
        """
        value = self.config["trainer"][key] if key == "precision" else self.config[key]
        before = self.run.recorded.get(key)
        if value != "auto" or before is None or (self.config["remeasure"] and key != "precision"):
            return value
        if key == "micro_batch" and rows_per_rank % before:
            return value
        ranks_before = self.run.recorded["local_world_size"]
        if key == "threads" and ranks_before != self.ranks.local_world_size:
            return value
        return before

    # Fitting

    def fit(
        self,
        module: StageModule,
        data: LightningDataModule,
        tokenizer: Tokenizer,
        validation_batches: Callable[[int | None], Iterable[Batch]],
        facts: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Train to the end of the budget and return the summary, with `facts` in it.

        `validation_batches` takes the number of tokens to score, None for all. Leaves by SystemExit
        143 or 130 after a checkpoint where a signal asked for it.
        """
        module.record = {**module.record, "run": self.run.binding}
        self.run.rewind()
        metrics = MetricsFile(self.run.files.metrics_path)
        template = module.record["template"] and find_template(module.record["template"])
        checkpointing, callbacks = self._callbacks(metrics, tokenizer, template, validation_batches)
        log.info(
            "model: %s parameters in %s layers; budget: %s steps, %s tokens",
            f"{module.model.num_parameters():,}",
            module.model.config.n_layer,
            f"{self.max_steps:,}",
            f"{self.max_steps * module.tokens_per_step:,}",
        )
        if module.compiled:
            log.info("compiling at the first step, which takes a minute or more")
        stop = StopSignals(checkpointing)
        progress = Progress(self.config["callbacks"]["progress_every_s"])
        trainer = self._trainer(metrics, [*callbacks, checkpointing, stop, progress])
        with stop.instead_of_lightnings(trainer):
            trainer.fit(
                module,
                datamodule=data,
                ckpt_path=self.run.checkpoint,
                weights_only=True,
            )
        if stop.stopped_by:
            log.info(
                "stopped by a signal at step %s; the same command continues", trainer.global_step
            )
            raise SystemExit(128 + stop.stopped_by)
        summary = self.run.finish(on_rank_zero(lambda: self._sum_up(module, facts)))
        if self.ranks.rank == 0:
            self._write_report()
            tell(summary, self.run.path, self.config["data"])
        return summary

    def _sum_up(self, module: StageModule, facts: Mapping[str, Any]) -> dict[str, Any]:
        how = {
            "device": device_name(self.device),
            "n_ranks": self.ranks.world_size,
            "precision": self.run.recorded["precision"],
        }
        return summarise(module, self.config, self.run.files.metrics_path, {**facts, **how})

    def _write_report(self) -> None:
        """Write report.html from the run's other files; a failure is logged."""
        try:
            write_report(self.run.path)
        except Exception as error:
            log.warning("%s was not written: %s", self.run.files.report_path, first_line(error))

    def _callbacks(
        self,
        metrics: MetricsFile,
        tokenizer: Tokenizer,
        template: Template | None,
        validation_batches: Callable[[int | None], Iterable[Batch]],
    ) -> tuple[Checkpointing, list[Callback]]:
        """Return the checkpoint callback and those that come before it, in their order."""
        wanted = self.config["callbacks"]
        validation, checkpoint = dict(wanted["validation"]), dict(wanted["checkpoint"])
        every_n_steps = wanted["hellaswag"]["every_n_steps"]
        return Checkpointing(self.run.files.checkpoints_dir, metrics, **checkpoint), [
            Figures(wanted["log_every_n_steps"]),
            Validation(validation_batches, **validation),
            *(HellaSwag(items, tokenizer, every_n_steps=every_n_steps) for items in self.benchmark),
            Samples(
                self.run.files.samples_path,
                tokenizer,
                prompts=self.config["data"]["prompts"],
                seed=self.config["seed"],
                template=template,
                **wanted["samples"],
            ),
        ]

    def _trainer(self, metrics: MetricsFile, callbacks: list[Callback]) -> Trainer:
        config, ranks = self.config, self.ranks
        loggers: list[Logger] = [MetricsLogger(metrics)]
        if extra := extra_logger(
            config["logger"], self.run.path, config["name"], self.run.recorded["wandb_id"]
        ):
            loggers.append(extra)
        several = ranks.world_size > 1
        return Trainer(
            accelerator=self.device.type,
            devices=ranks.local_world_size if several or self.device.type != "cuda" else 1,
            num_nodes=ranks.num_nodes,
            strategy=DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
            if several
            else "auto",
            precision=self.run.recorded["precision"],
            max_steps=self.max_steps,
            max_epochs=-1,
            logger=loggers,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=self.run.path,
            deterministic=config["trainer"]["deterministic"],
            detect_anomaly=config["trainer"]["detect_anomaly"],
            limit_val_batches=0,  # validation is ours, by optimizer steps
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


def hellaswag_items(config: Mapping[str, Any]) -> list[list[hellaswag.Item]]:
    """Return the items that are to be scored while training, as a list of one; else none.

    Read before anything is prepared. Raises ValueError for a stage whose model does not write.
    """
    wanted = config["callbacks"]["hellaswag"]
    if wanted["every_n_steps"] is None:
        return []
    if config["stage"] == "classify":
        raise ValueError(
            "callbacks.hellaswag scores language models and stage=classify trains none; "
            "pass callbacks.hellaswag.every_n_steps=null"
        )
    path = wanted["path"]
    if path is None:
        path = find_benchmark(hellaswag.BENCHMARK, config["data_dir"])
    return [hellaswag.read_items(path, wanted["limit"])]
