"""One sitting of a run: open its directory, settle what is left to the machine, fit, and sum up."""

import contextlib
import hashlib
import logging
import math
import secrets
import traceback
import warnings
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
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    read_checkpoint,
    weights_sha256,
)
from nanogpt.model import GPTConfig
from nanogpt.optim import Schedule
from nanogpt.tokenizer import Tokenizer
from nanogpt.training.callbacks import Figures, Samples, StopSignals, Validation, cut_samples
from nanogpt.training.checkpointing import AtomicCheckpointIO, Checkpointing
from nanogpt.training.launch import Ranks, join, leave_with_launcher, on_rank_zero, resolve_device
from nanogpt.training.loggers import extra_logger
from nanogpt.training.machine import device_name, git_revision, versions
from nanogpt.training.metrics import MetricsFile, MetricsLogger, read_metrics
from nanogpt.training.module import Batch, StageModule
from nanogpt.training.probe import Decisions, decide
from nanogpt.training.progress import ConsoleHandler, Progress, duration, percent
from nanogpt.training.report import write_report
from nanogpt.training.run import RunDirectory, RunLock, check_continues

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
        self._stack = contextlib.ExitStack()

    # Opening and closing

    def __enter__(self) -> "Session":
        leave_with_launcher()
        quieten_lightning()
        with self._stack:
            if self.ranks.world_size > 1:
                join(self.device)
                self._stack.callback(dist.destroy_process_group)
            self.finished, self.recorded = on_rank_zero(self._open)
            if self.ranks.rank == 0:
                self._stack.callback(log_to(self.run.log_path))
            self._stack = self._stack.pop_all()
        if self.finished is not None:
            log.info(
                "%s is already finished (%s steps, validation loss %.4f); "
                "name=<new name> starts another run",
                self.run.path,
                self.finished["steps"],
                self.finished["val_loss"],
            )
        return self

    def _open(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Lock the directory; return the summary of a finished run and what is recorded."""
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
            return None, {}
        check_continues(run, config, may_extend=self._may_extend(recorded))
        summary = run.summary()
        is_finished = summary is not None and summary["steps"] >= self.max_steps
        return summary if is_finished else None, recorded["resolved"]

    def _may_extend(self, recorded: Mapping[str, Any]) -> bool:
        old_max = budget_steps(recorded)
        if old_max == self.max_steps:
            return True
        step = int(read_checkpoint(self.run.last_checkpoint)["global_step"])
        return self.schedule.may_extend(step, old_max, self.max_steps)

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
        """Return what `init_from` names, None for random weights or a run that continues."""
        if self.config["init_from"] is None:
            return None
        if "init_from" in self.recorded:
            path = Path(self.recorded["init_from"]["path"])
        else:
            path = find_checkpoint(self.config["init_from"], self.config["runs_dir"])
        return load_checkpoint(path)

    def settle(
        self,
        model_config: GPTConfig,
        rows_per_rank: int,
        corpus_fingerprint: str,
        init_from: Path | None,
    ) -> Decisions:
        """Decide what is left to the machine, check the corpus, and write config.yaml.

        `rows_per_rank` are the rows of block_size tokens that a rank sees in a step. Raises
        ValueError where the corpus is not the one that the run began with.
        """
        decisions, self.recorded = on_rank_zero(
            lambda: self._settle(model_config, rows_per_rank, corpus_fingerprint, init_from)
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
        init_from: Path | None,
    ) -> tuple[Decisions, dict[str, Any]]:
        config, recorded = self.config, self.recorded
        if recorded and recorded["corpus"] != corpus_fingerprint:
            raise ValueError(
                f"{self.run.path} was trained on another corpus (fingerprint "
                f"{recorded['corpus']}, now {corpus_fingerprint}); restore the data, "
                "pass name=<new name>, or resume=false overwrite=true"
            )

        def setting(key: str) -> Any:
            value = config["trainer"][key] if key == "precision" else config[key]
            kept = recorded.get(key, "auto")
            usable = key != "micro_batch" or (kept != "auto" and rows_per_rank % kept == 0)
            return kept if value == "auto" and usable else value

        decisions = decide(
            model_config,
            device=self.device,
            rows_per_rank=rows_per_rank,
            max_steps=self.max_steps,
            data_dir=Path(config["data_dir"]),
            local_world_size=self.ranks.local_world_size,
            deterministic=config["trainer"]["deterministic"],
            precision=setting("precision"),
            compile=setting("compile"),
            micro_batch=setting("micro_batch"),
            threads=setting("threads"),
        )
        resolved = {
            "corpus": corpus_fingerprint,
            "wandb_id": recorded.get("wandb_id", secrets.token_hex(4)),
            **{k: v for k, v in asdict(decisions).items() if k != "reasons"},
        }
        if init_from is not None:
            resolved["init_from"] = recorded.get("init_from") or {
                "path": str(init_from.resolve()),
                "sha256": hashlib.sha256(init_from.read_bytes()).hexdigest(),
            }
        trainer = {**config["trainer"], "precision": decisions.precision}
        self.run.write_config({**config, "trainer": trainer, "resolved": resolved})
        return decisions, resolved

    @property
    def init_from(self) -> dict[str, str] | None:
        """Path and sha256 of what the run started from."""
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
        resume_step = self._rewind(metrics)
        checkpointing, callbacks = self._callbacks(metrics, tokenizer, validation_batches)
        stop = StopSignals(checkpointing)
        trainer = self._trainer(metrics, [*callbacks, checkpointing, stop, self._progress()])
        log.info(
            "%s: %s",
            self.run.path,
            f"continuing at step {resume_step}" if resume_step else "a new run",
        )
        trainer.fit(
            module,
            datamodule=data,
            ckpt_path=self.run.last_checkpoint if resume_step else None,
            weights_only=True,
        )
        if stop.stopped_by:
            log.info(
                "stopped by a signal at step %s; the same command continues", trainer.global_step
            )
            raise SystemExit(128 + stop.stopped_by)
        return on_rank_zero(lambda: self._sum_up(module, facts))

    def _rewind(self, metrics: MetricsFile) -> int:
        """Cut what was logged after the checkpoint that the run continues from; return its step."""
        step = 0
        if self.run.has_begun:
            step = int(read_checkpoint(self.run.last_checkpoint)["global_step"])
        if self.ranks.rank == 0:
            metrics.cut_after(step)
            cut_samples(self.run.samples_path, step)
        return step

    def _callbacks(
        self,
        metrics: MetricsFile,
        tokenizer: Tokenizer,
        validation_batches: Callable[[int | None], Iterable[Batch]],
    ) -> tuple[Checkpointing, list[Callback]]:
        """Return the checkpoint callback and those that come before it, in their order."""
        wanted = self.config["callbacks"]
        validation, checkpoint = dict(wanted["validation"]), dict(wanted["checkpoint"])
        return Checkpointing(self.run.checkpoints_dir, metrics, **checkpoint), [
            Figures(wanted["log_every_n_steps"]),
            Validation(validation_batches, **validation),
            Samples(
                self.run.samples_path, tokenizer, seed=self.config["seed"], **wanted["samples"]
            ),
        ]

    def _progress(self) -> Progress:
        return Progress(self.config["callbacks"]["progress_every_s"])

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

    def _sum_up(self, module: StageModule, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write summary.json and report.html, from metrics.csv and the weights."""
        last = {name: points[-1][1] for name, points in read_metrics(self.run.metrics_path).items()}
        config = self.config
        steps = self.max_steps
        tokens = steps * config["tokens_per_step"]
        tokens_per_s = tokens / module.train_s if module.train_s else 0.0
        summary = {
            "stage": config["stage"],
            "name": config["name"],
            "steps": steps,
            "tokens": tokens,
            "wall_s": module.wall_s(),
            "train_s": module.train_s,
            "tokens_per_s": tokens_per_s,
            "mfu": module.mfu(tokens_per_s),
            "train_loss": last["train/loss"],
            **{
                f"val_{name.removeprefix('val/')}": v
                for name, v in last.items()
                if name.startswith("val/")
            },
            **facts,
            "n_params": module.model.num_parameters(),
            "weights_sha256": weights_sha256(module.model),
            "device": device_name(self.device),
            "n_ranks": self.ranks.world_size,
            "precision": self.recorded["precision"],
            "git": git_revision(),
            "versions": versions(),
        }
        self.run.write_summary(summary)
        write_report(self.run.path)
        self._tell(summary)
        return summary

    def _tell(self, summary: Mapping[str, Any]) -> None:
        """Say what was reached and what may come next."""
        log.info(
            "finished: %s steps, %s tokens in %s of training (%s tokens/s, MFU %s)",
            summary["steps"],
            f"{summary['tokens']:,}",
            duration(summary["train_s"]),
            f"{summary['tokens_per_s']:,.0f}",
            percent(summary["mfu"]),
        )
        log.info("validation loss %.4f", summary["val_loss"])
        if (bits := summary.get("val_bits_per_byte")) is not None:
            gzip = summary.get("gzip_bits_per_byte")
            beside = f"; gzip -9 needs {gzip:.3f} for the same text" if gzip else ""
            log.info("validation bits per byte %.3f%s", bits, beside)
        where = self.run.path
        log.info("report: %s", self.run.report_path)
        log.info("next:")
        log.info('  python -m nanogpt.generate %s --prompt "def "', where)
        log.info(
            "  python train.py data=text data.path=YOUR_FOLDER      # the same on your own text"
        )
        log.info(
            "  python train.py stage=pretrain model=gpt2_small      # GPT-2 small on FineWeb-Edu"
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


def log_to(path: Path) -> Callable[[], None]:
    """Send the project's log to the terminal and to a file; return what undoes it."""
    console, file = ConsoleHandler(), logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.setLevel(logging.INFO)
    for handler in (console, file):
        log.addHandler(handler)

    def undo() -> None:
        for handler in (console, file):
            log.removeHandler(handler)
            handler.close()

    return undo


def quieten_lightning() -> None:
    """Silence advice that does not fit: loader, steps and checkpoints are not Lightning's."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
