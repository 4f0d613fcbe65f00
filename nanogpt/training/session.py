"""One sitting of a run: open its directory, settle what is left to the machine, fit, and sum up."""

import contextlib
import logging
import math
import os
import secrets
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from nanogpt.checkpoint import (
    KEY,
    Checkpoint,
    find_init_from,
    init_model,
    load_checkpoint,
    read_checkpoint,
    weights_sha256,
    with_block_size,
    with_dropout,
)
from nanogpt.evaluation import hellaswag
from nanogpt.evaluation.examples import find_benchmark
from nanogpt.generation import check_sampling
from nanogpt.model import GPTConfig
from nanogpt.optim import Schedule
from nanogpt.prompts import Template, find_template
from nanogpt.tokenizer import Tokenizer
from nanogpt.training.callbacks import (
    Figures,
    HellaSwag,
    Samples,
    StopSignals,
    Validation,
    cut_samples,
)
from nanogpt.training.checkpointing import AtomicCheckpointIO, Checkpointing
from nanogpt.training.launch import Ranks, join, leave_with_launcher, on_rank_zero, resolve_device
from nanogpt.training.loggers import extra_logger
from nanogpt.training.logs import log_to, quieten_lightning
from nanogpt.training.machine import device_name
from nanogpt.training.metrics import MetricsFile, MetricsLogger
from nanogpt.training.module import Batch, StageModule
from nanogpt.training.probe import Decisions, decide
from nanogpt.training.progress import Progress
from nanogpt.training.report import write_report
from nanogpt.training.run import (
    RunDirectory,
    RunLock,
    check_continues,
    operational_differences,
)
from nanogpt.training.summary import summarise, tell

SAMPLING = ("max_new_tokens", "temperature", "top_k")

log = logging.getLogger("nanogpt")


class Session:
    """A run held by this process (group), from opening it to its summary.

    As a context manager it joins the ranks, locks the run's directory on rank zero and releases
    both. `finished` is the summary of a run that has nothing left to do.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.schedule = Schedule(**config["optim"]["schedule"])
        self.max_steps = budget_steps(config)
        self.ranks = Ranks.from_environment()
        self.device = resolve_device(config["trainer"]["accelerator"])
        self.run = RunDirectory.of(config)
        self.finished: dict[str, Any] | None = None
        self.recorded: dict[str, Any] = {}  # what was resolved when the run began
        check_sampling(
            **{key: config["callbacks"]["samples"][key] for key in SAMPLING}
        )  # now, not when the first sample is due
        self.resume_step = 0  # of the checkpoint that the run continues from
        self.benchmark: list[list[hellaswag.Item]] = []  # HellaSwag's items, where they are scored
        if config["trainer"][
            "deterministic"
        ]:  # read by cuBLAS at the first product, which we probe
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._stack = contextlib.ExitStack()

    # Opening and closing

    def __enter__(self) -> "Session":
        leave_with_launcher()
        quieten_lightning()
        with self._stack:
            if self.ranks.world_size > 1:
                join(self.device)
                self._stack.callback(dist.destroy_process_group)
            opened = on_rank_zero(self._open)
            self.finished, self.recorded, self.resume_step, changed = opened
            if self.ranks.rank == 0:
                self._stack.callback(log_to(self.run.log_path))
                for line in changed:
                    log.debug("changed: %s", line)
            if self.finished is None:
                self.benchmark = on_rank_zero(lambda: hellaswag_items(self.config))
            self._stack = self._stack.pop_all()
        if self.finished is not None:
            log.info(
                "%s is already finished (%s steps, validation loss %.4f); "
                "name=<new name> starts another run",
                self.run.path,
                self.finished["steps"],
                self.finished["val_loss"],
            )
        elif self.resume_step:
            log.info("%s: continuing at step %s", self.run.path, self.resume_step)
        else:
            log.info("%s: a new run", self.run.path)
        return self

    def _open(self) -> tuple[dict[str, Any] | None, dict[str, Any], int, list[str]]:
        """Lock the directory, and find out where the run stands.

        Returns the summary of a finished run, what is recorded, the step to continue from, and the
        operational keys that changed.
        """
        run, config = self.run, self.config
        try:
            run.create()
            self._stack.enter_context(RunLock(run.path))
        except OSError as error:
            raise OSError(
                f"{run.path} cannot be written ({error.strerror}); pass another runs_dir"
            ) from error
        if not config["resume"] and run.config_path.is_file():
            if not config["overwrite"]:
                raise ValueError(
                    f"{run.path} holds a run and resume=false; "
                    "pass overwrite=true to replace it, or name=<new name>"
                )
            run.clear()
        recorded = run.recorded_config()
        if recorded is None or not run.has_begun:
            return None, {}, 0, []
        summary = run.summary()
        if summary is not None and budget_steps(recorded) == self.max_steps:
            check_continues(run, config)
            return summary, recorded["resolved"], summary["steps"], []
        checkpoint = read_checkpoint(run.last_checkpoint)
        step = int(checkpoint["global_step"])
        may_extend = self.schedule.may_extend(step, budget_steps(recorded), self.max_steps)
        check_continues(run, config, may_extend=may_extend)
        if config["init_from"] is None:
            check_shape(run.last_checkpoint, checkpoint[KEY]["model"], config["model"])
        run.summary_path.unlink(missing_ok=True)  # of a budget that has grown since
        return None, recorded["resolved"], step, operational_differences(recorded, config)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, SystemExit) and self.ranks.rank == 0:
            self._log_to_file_only(error)
        self._stack.close()

    def _log_to_file_only(self, error: BaseException) -> None:
        with contextlib.suppress(OSError), open(self.run.log_path, "a", encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)))

    # Settling

    def starting_point(self) -> Checkpoint | None:
        """Return the model and tokenizer that `init_from` names, None where they are to be made.

        A run that continues takes them from its own checkpoint: its start is not resolved again.
        Raises ValueError where a model key was typed that differs, but for a shorter block_size.
        """
        config = self.config
        if config["init_from"] is None:
            return None
        if self.resume_step:
            return load_checkpoint(self.run.last_checkpoint)
        where = (config["init_from"], config["runs_dir"], config["data_dir"])
        start = init_model(on_rank_zero(lambda: find_init_from(*where)))
        start = shorten(start, config["model"]["block_size"], config["typed"])
        check_model_keys(start, config["model"], config["typed"])
        if "model.dropout" in config["typed"]:
            start = with_dropout(start, config["model"]["dropout"])
        return start

    def end_by(self, step: int) -> None:
        """End the run at a step, where its budget goes beyond."""
        self.max_steps = min(self.max_steps, step)

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
        decisions, self.recorded = on_rank_zero(
            lambda: self._settle(model_config, rows_per_rank, corpus_fingerprint, start)
        )
        torch.set_num_threads(decisions.threads)
        for reason in decisions.reasons:
            log.info("%s", reason)
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
        start: Checkpoint | None,
    ) -> tuple[Decisions, dict[str, Any]]:
        config, recorded = self.config, self.recorded
        if recorded and recorded["corpus"] != corpus_fingerprint:
            raise ValueError(
                f"{self.run.path} was trained on another corpus (fingerprint "
                f"{recorded['corpus']}, now {corpus_fingerprint}); restore the data, "
                "pass name=<new name>, or resume=false overwrite=true"
            )
        decisions = decide(
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
        resolved = {
            "corpus": corpus_fingerprint,
            "wandb_id": recorded.get("wandb_id", secrets.token_hex(4)),
            "local_world_size": self.ranks.local_world_size,
            **{k: v for k, v in asdict(decisions).items() if k != "reasons"},
        }
        if start is not None:
            resolved["init_from"] = recorded.get("init_from") or {
                "path": str(start.path.resolve()),
                "sha256": weights_sha256(start.model),
            }
        trainer = {**config["trainer"], "precision": decisions.precision}
        self.run.write_config({**config, "trainer": trainer, "resolved": resolved})
        return decisions, resolved

    def _setting(self, key: str, rows_per_rank: int = 0) -> Any:
        """Return a setting as typed, else as the run began with it where that fits, else auto.

        `remeasure` sets aside what the run began with, but for the precision: it is identity.
        """
        value = self.config["trainer"][key] if key == "precision" else self.config[key]
        kept = self.recorded.get(key)
        anew = self.config["remeasure"] and key != "precision"
        if value != "auto" or kept is None or anew:
            return value
        fits = {
            "micro_batch": rows_per_rank % kept == 0 if key == "micro_batch" else True,
            "threads": self.recorded["local_world_size"] == self.ranks.local_world_size,
        }
        return kept if fits.get(key, True) else value

    @property
    def init_from(self) -> dict[str, str] | None:
        """Path of what the run started from, and the sha256 of its weights."""
        return self.recorded.get("init_from")

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
        metrics = MetricsFile(self.run.metrics_path)
        on_rank_zero(lambda: self._rewind(metrics))
        template = module.record["template"] and find_template(module.record["template"])
        checkpointing, callbacks = self._callbacks(metrics, tokenizer, template, validation_batches)
        stop = StopSignals(checkpointing)
        progress = Progress(self.config["callbacks"]["progress_every_s"])
        trainer = self._trainer(metrics, [*callbacks, checkpointing, stop, progress])
        with stop.instead_of_lightnings(trainer):
            trainer.fit(
                module,
                datamodule=data,
                ckpt_path=self.run.last_checkpoint if self.resume_step else None,
                weights_only=True,
            )
        if stop.stopped_by:
            log.info(
                "stopped by a signal at step %s; the same command continues", trainer.global_step
            )
            raise SystemExit(128 + stop.stopped_by)
        return on_rank_zero(lambda: self._sum_up(module, facts))

    def _sum_up(self, module: StageModule, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write summary.json and report.html, and say what was reached."""
        how = {
            "device": device_name(self.device),
            "n_ranks": self.ranks.world_size,
            "precision": self.recorded["precision"],
        }
        summary = summarise(module, self.config, self.run.metrics_path, {**facts, **how})
        self.run.write_summary(summary)
        write_report(self.run.path)
        tell(summary, self.run.path, self.config["data"]["prompts"])
        return summary

    def _rewind(self, metrics: MetricsFile) -> None:
        """Cut what was logged after the checkpoint that the run continues from."""
        metrics.cut_after(self.resume_step)
        cut_samples(self.run.samples_path, self.resume_step)

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
        return Checkpointing(self.run.checkpoints_dir, metrics, **checkpoint), [
            Figures(wanted["log_every_n_steps"]),
            Validation(validation_batches, **validation),
            *(HellaSwag(items, tokenizer, every_n_steps=every_n_steps) for items in self.benchmark),
            Samples(
                self.run.samples_path,
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
            config["logger"], self.run.path, config["name"], self.recorded["wandb_id"]
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
            precision=self.recorded["precision"],
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


def shorten(start: Checkpoint, block_size: int, typed: Mapping[str, Any]) -> Checkpoint:
    """Return the model to start from, with the typed block_size where that is the shorter one."""
    if "model.block_size" not in typed or block_size >= start.config.block_size:
        return start
    log.info(
        "%s: block_size cut from %s to %s, with the position embeddings beyond it",
        start.path,
        start.config.block_size,
        block_size,
    )
    return with_block_size(start, block_size)


def check_model_keys(start: Checkpoint, model: Mapping[str, Any], typed: Mapping[str, Any]) -> None:
    """Raise ValueError where a model key was typed that differs from the model to start from."""
    for key, value in model.items():
        if key == "dropout" or not {"model", f"model.{key}"} & typed.keys():
            continue
        if (there := getattr(start.config, key)) != value:
            raise ValueError(
                f"{start.path} has {key}={there!r} but the command says model.{key}={value!r}; "
                "leave the model keys out: the model comes from init_from"
            )


def check_shape(path: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError where the run's checkpoint holds another model than its configuration."""
    differences = [f"{key}={there[key]!r}" for key in wanted if there[key] != wanted[key]]
    if differences:
        raise ValueError(
            f"{path} holds another model than the run's config.yaml ({', '.join(differences)}); "
            "restore the run's own checkpoint"
        )


def budget_steps(config: Mapping[str, Any]) -> int:
    """Return the optimizer steps of the run: of `max_steps` and `max_tokens` the first reached."""
    budgets = []
    if config["max_steps"] is not None:
        budgets.append(config["max_steps"])
    if config["max_tokens"] is not None:
        budgets.append(math.ceil(config["max_tokens"] / config["tokens_per_step"]))
    if not budgets:
        raise ValueError("the run has no budget; pass max_steps=N or max_tokens=N")
    return int(min(budgets))
