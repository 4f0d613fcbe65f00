"""One sitting of a run: open its directory, settle what is left to the machine, fit, and sum up."""

import contextlib
import logging
import math
import os
import secrets
import shutil
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
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
    checkpoints_of,
    find_init_from,
    init_model,
    load_checkpoint,
    verify_checkpoint,
    weights_sha256,
    with_block_size,
    with_dropout,
)
from nanogpt.command import first_line
from nanogpt.disk import link_atomically
from nanogpt.evaluation import hellaswag
from nanogpt.evaluation.examples import find_benchmark
from nanogpt.model import GPTConfig
from nanogpt.optim import Schedule, check_schedule, may_extend
from nanogpt.prompts import Template, find_template
from nanogpt.ranks import Ranks, join, leave_with_launcher, on_rank_zero
from nanogpt.runs.directory import NEW_OR_ANEW, RunDirectory, RunLock, check_continues, cut_samples
from nanogpt.runs.identity import binding, operational_differences
from nanogpt.runs.log import log_to
from nanogpt.runs.metrics import MetricsFile
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
from nanogpt.training.summary import reached, summarise, tell

log = logging.getLogger("nanogpt")


@dataclass
class Standing:
    """Where a run stands when it is opened.

    `source` is the fingerprint of the data's source, None where that is gone from a run whose data
    it was. `recorded` is what was resolved when the run began, `checkpoint` the newest one that
    verifies, at `step`. With `replaced`, an older run in the directory is removed.
    """

    source: str | None
    recorded: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    step: int = 0
    finished: dict[str, Any] | None = None
    replaced: bool = False


class Session:
    """A run held by this process (group), from opening it to its summary.

    `source_fingerprint` returns the fingerprint of the data's source. As a context manager
    it joins the ranks, locks the run's directory on rank zero and releases both; a directory that
    it made is removed where the run failed before its first step. `finished` is the summary of a
    run that has nothing left to do.
    """

    def __init__(
        self, config: dict[str, Any], schedule: Schedule, source_fingerprint: Callable[[], str]
    ) -> None:
        self.config = config
        self.source_fingerprint = source_fingerprint
        self.schedule = schedule
        self.max_steps = budget_steps(config)
        check_schedule(schedule, self.max_steps)
        self.ranks = Ranks.from_environment()
        self.device = resolve_device(config["trainer"]["accelerator"])
        self.run = RunDirectory.of(config)
        self.standing = Standing(None)
        self.recorded: dict[str, Any] = {}  # what was resolved when the run began
        self.benchmark: list[list[hellaswag.Item]] = []  # HellaSwag's items, where they are scored
        if config["trainer"]["deterministic"]:  # cuBLAS reads it at its first product
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._stack = contextlib.ExitStack()

    @property
    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that has nothing left to do."""
        return self.standing.finished

    @property
    def resume_step(self) -> int:
        """The step of the checkpoint that the run continues from, 0 without one."""
        return self.standing.step

    @property
    def prepared(self) -> str | None:
        """The fingerprint of the prepared corpus that replaces a missing source."""
        is_gone = self.recorded and self.standing.source is None
        return self.recorded["corpus"] if is_gone else None

    # Opening and closing

    def __enter__(self) -> "Session":
        leave_with_launcher()
        quieten_lightning()
        with self._stack:
            if self.ranks.world_size > 1:
                join(self.device)
                self._stack.callback(dist.destroy_process_group)
            self.standing = on_rank_zero(self._open)
            self.recorded = self.standing.recorded
            if self.finished is None:
                self.benchmark = on_rank_zero(lambda: hellaswag_items(self.config))
            elif self.ranks.rank == 0:
                self._restore_last()
                if not is_whole(self.run.report_path):
                    self._write_report()
            self._stack = self._stack.pop_all()
        self._log_standing()
        return self

    def _log_standing(self) -> None:
        path, standing = self.run.path, self.standing
        if standing.finished is not None:
            steps, figures = standing.finished["steps"], reached(standing.finished)
            what = (
                f"already finished ({steps} steps, {figures}); name=<new name> starts another run"
            )
            log.info("%s is %s", path, what)
        elif standing.checkpoint is not None:
            log.info("%s: continuing at step %s, from %s", path, standing.step, standing.checkpoint)
        elif standing.recorded:
            log.info("%s: continuing at step 0: it has no checkpoint", path)

    def _open(self) -> Standing:
        """Lock the directory, open the log, and find out where the run stands."""
        run, config = self.run, self.config
        missing = [path for path in (run.path, *run.path.parents) if not path.exists()]
        try:
            run.create()
            self._stack.enter_context(RunLock(run.path))
        except OSError as error:
            raise OSError(
                f"{run.path} cannot be written ({error.strerror}); pass another runs_dir"
            ) from error
        if missing:
            self._stack.push(lambda kind, *_: self._remove_unbegun(kind, missing))
        self._stack.callback(log_to(run.log_path))
        if not config["resume"] and (run.has_begun or run.config_path.is_file()):
            if not config["overwrite"]:
                raise ValueError(
                    f"{run.path} holds a run and resume=false; "
                    "pass overwrite=true to replace it, or name=<new name>"
                )
            return Standing(self.source_fingerprint(), replaced=True)
        recorded = run.recorded_config()
        if recorded is None or not run.has_begun:
            return Standing(self.source_fingerprint())
        return self._standing(recorded)

    def _standing(self, recorded: dict[str, Any]) -> Standing:
        """Return where a run stands that has begun; raise ValueError where it is another one."""
        run, config, resolved = self.run, self.config, recorded["resolved"]
        newest = self._newest_checkpoint(recorded)
        step = 0 if newest is None else int(newest[1]["global_step"])
        old_max = budget_steps(recorded)
        extends = may_extend(self.schedule, step, old_max, self.max_steps)
        check_continues(run, config, may_extend=extends)
        standing = Standing(self._source(recorded), resolved, step=step)
        if newest is not None:
            standing.checkpoint, content = newest
            if config["init_from"] is None:
                check_shape(standing.checkpoint, content[KEY]["model"], config["model"])
        else:  # and so it starts from what init_from is now
            standing.recorded = {k: v for k, v in resolved.items() if k != "init_from"}
        summary = run.summary()
        same_source = standing.source in (None, resolved.get("source", standing.source))
        if summary is not None and same_source and old_max == self.max_steps:
            standing.finished = summary if step in (0, summary["steps"]) else None
        for line in operational_differences(recorded, config):
            log.debug("changed: %s", line)
        return standing

    def _newest_checkpoint(self, recorded: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest checkpoint that verifies, and its content; damaged ones are logged.

        Raises ValueError where all are damaged, or where it is another run's.
        """
        found = checkpoints_of(self.run.checkpoints_dir)
        foreign = ""
        for path in found:
            try:
                content = verify_checkpoint(path)
            except (ValueError, OSError) as error:
                log.warning("%s; an older checkpoint is used", error)
                continue
            is_own = content[KEY].get("run", binding(recorded)) == binding(recorded)
            if is_own and not foreign:
                return path, content
            if is_own:
                raise ValueError(f"{foreign}; {path} is the newest of this run: copy it over")
            foreign = foreign or f"{path} is a checkpoint of another run"
        if found:
            what = foreign or f"{found[0]} is damaged, and so is every older checkpoint"
            raise ValueError(f"{what}; restore one of this run, or pass {NEW_OR_ANEW}")
        return None

    def _source(self, recorded: Mapping[str, Any]) -> str | None:
        """Return the fingerprint of the data's source, None where that is gone since the run began.

        Raises ValueError or FileNotFoundError where the source never was this run's.
        """
        try:
            return self.source_fingerprint()
        except (ValueError, FileNotFoundError) as error:
            path = self.config["data"].get("path")
            if path is None or recorded["data"].get("path") != path:
                raise
            log.warning("%s; the run's prepared data stands for it", error)
            return None

    def _remove_unbegun(self, kind: type[BaseException] | None, made: list[Path]) -> None:
        """Remove the directories that a failed command made, unless steps were taken."""
        expected = kind is not None and issubclass(kind, ValueError | OSError | KeyboardInterrupt)
        if expected and not self.run.has_begun:
            shutil.rmtree(made[0], ignore_errors=True)
            for parent in made[1:]:
                with contextlib.suppress(OSError):  # another run is there by now
                    parent.rmdir()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, SystemExit) and self.ranks.rank == 0:
            self._log_to_file_only(error)
        self._stack.__exit__(kind, error, trace)

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
        allowed = [config["model"]["block"]] if config["model"]["block"] else []
        if self.standing.checkpoint is not None:
            return load_checkpoint(self.standing.checkpoint, allow_modules=allowed)
        where = (config["init_from"], config["runs_dir"], config["data_dir"])
        start = init_model(on_rank_zero(lambda: find_init_from(*where)), allowed)
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
        if not self.standing.recorded:
            log.info("%s: a new run", self.run.path)
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
        start: Checkpoint | None,
    ) -> tuple[Decisions, dict[str, Any]]:
        config, recorded = self.config, self.standing.recorded
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
            "source": self.standing.source or recorded.get("source"),
            "wandb_id": recorded.get("wandb_id", secrets.token_hex(4)),
            "local_world_size": self.ranks.local_world_size,
            **{k: v for k, v in asdict(decisions).items() if k != "reasons"},
        }
        if start is not None:
            resolved["init_from"] = recorded.get("init_from") or {
                "path": str(start.path.resolve()),
                "sha256": weights_sha256(start.model),
            }
        if self.standing.replaced:
            self.run.clear()
        self.run.write_config(self._as_recorded(resolved))
        return decisions, resolved

    def _as_recorded(self, resolved: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration as config.yaml has it."""
        trainer = {**self.config["trainer"], "precision": resolved["precision"]}
        return {**self.config, "trainer": trainer, "resolved": resolved}

    def _setting(self, key: str, rows_per_rank: int = 0) -> Any:
        """Return a setting as typed, else as the run began with it where that fits, else auto.

        `remeasure` sets aside what the run began with, but for the precision: it is identity.
        """
        value = self.config["trainer"][key] if key == "precision" else self.config[key]
        before = self.recorded.get(key)
        if value != "auto" or before is None or (self.config["remeasure"] and key != "precision"):
            return value
        if key == "micro_batch" and rows_per_rank % before:
            return value
        ranks_before = self.recorded["local_world_size"]
        if key == "threads" and ranks_before != self.ranks.local_world_size:
            return value
        return before

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
        module.record = {**module.record, "run": binding(self._as_recorded(self.recorded))}
        metrics = MetricsFile(self.run.metrics_path)
        on_rank_zero(lambda: self._rewind(metrics))
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
                ckpt_path=self.standing.checkpoint,
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
        self._write_report()
        tell(summary, self.run.path, self.config["data"])
        return summary

    def _write_report(self) -> None:
        """Write report.html from the run's other files; a failure is logged."""
        try:
            write_report(self.run.path)
        except Exception as error:
            log.warning("%s was not written: %s", self.run.report_path, first_line(error))

    def _restore_last(self) -> None:
        """Name the checkpoint that was found `last.ckpt`, where that is missing or damaged."""
        checkpoint, last = self.standing.checkpoint, self.run.last_checkpoint
        if checkpoint is not None and checkpoint != last:
            link_atomically(checkpoint, last)

    def _rewind(self, metrics: MetricsFile) -> None:
        """Cut what was logged after the checkpoint that the run continues from."""
        self.run.summary_path.unlink(missing_ok=True)  # of an older end
        self._restore_last()
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
    differences = [f"{key}={there.get(key)!r}" for key in wanted if there.get(key) != wanted[key]]
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
