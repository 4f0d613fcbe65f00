"""A run held by this process (group): opened, continued or begun, and finished."""

import contextlib
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanogpt.checkpoint import (
    KEY,
    Checkpoint,
    find_init_from,
    init_model,
    load_checkpoint,
    read_checkpoint,
    record,
    weights_sha256,
    with_config,
)
from nanogpt.disk import link_atomically
from nanogpt.model import GPTConfig
from nanogpt.prompts import Template
from nanogpt.ranks import Ranks, join, leave_with_launcher, on_rank_zero
from nanogpt.runs.directory import NEW_OR_ANEW, RunDirectory, cut_samples, lock_run, reached
from nanogpt.runs.identity import binding, budget_steps, identity_differences
from nanogpt.runs.log import logging_to
from nanogpt.runs.metrics import MetricsFile
from nanogpt.tokenizer import Tokenizer

log = logging.getLogger("nanogpt")

SourceFingerprint = Callable[[], str]
MayExtend = Callable[[int, int, int], bool]


@dataclass(eq=False)
class Run:
    """A run whose directory is locked by rank zero; `open_run` returns it on every rank.

    Attributes:
        files: the paths of the run's files; `path` is their directory.
        source: fingerprint of the data's source, None where the source is gone.
        recorded: what was resolved when the run began, without `corpus` before `begin`.
        checkpoint: the newest intact checkpoint, None to start at step 0.
        step: its optimizer step, 0 without one.
        finished: the summary of a run that has nothing left to do, else None.
        max_steps: the budget in optimizer steps.
    """

    config: Mapping[str, Any]
    files: RunDirectory
    source: str | None = None
    recorded: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    step: int = 0
    finished: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.path = self.files.path
        self.max_steps = budget_steps(self.config)

    @property
    def ranks(self) -> Ranks:
        """This process among those of the run."""
        return Ranks.from_environment()

    @property
    def binding(self) -> dict[str, str]:
        """What binds this run's checkpoints to it."""
        return binding(self._as_recorded(self.recorded))

    def metadata(
        self,
        model_config: GPTConfig,
        tokenizer: Tokenizer,
        template: Template | None,
        labels: list[str] | None,
    ) -> dict[str, Any]:
        """Return the self-description of this run's checkpoints."""
        about = record(
            self.config["stage"],
            model_config,
            tokenizer,
            template=None if template is None else template.name,
            labels=labels,
            init_from=self.recorded.get("init_from"),
        )
        return {**about, "run": self.binding}

    def initial_checkpoint(self) -> Checkpoint | None:
        """Return the model and tokenizer that `init_from` names, None where they are to be made.

        A run that continues takes them from its own checkpoint: its start is not resolved again.
        The configured `model.block` is allowed. Raises ValueError where a model key was typed that
        differs, but for a shorter block_size.
        """
        config = self.config
        if config["init_from"] is None:
            return None
        allow_modules = list(filter(None, [config["model"].get("block")]))
        if self.checkpoint is not None:
            start = load_checkpoint(self.checkpoint, allow_modules=allow_modules)
        else:
            where = (config["init_from"], config["runs_dir"], config["data_dir"])
            start = init_model(on_rank_zero(lambda: find_init_from(*where)), allow_modules)
            start = adapt(start, config["model"], config["typed"])
        if self.ranks.rank == 0 and "init_from" not in self.recorded:
            path, sha256 = str(start.path.resolve()), weights_sha256(start.model)
            self.recorded["init_from"] = {"path": path, "sha256": sha256}
        return start

    def begin(self, resolved: Mapping[str, Any]) -> None:
        """Write config.yaml with `resolved` in it, after removing a run that `overwrite` replaces.

        `resolved` has the fingerprint of the data, `corpus`, and the settings that were left to the
        machine. Called on every rank. Raises ValueError where the corpus is not the one that the
        run began with.
        """
        now, before = resolved["corpus"], self.recorded.get("corpus")
        if before not in (None, now):
            raise ValueError(
                f"{self.path} was trained on another corpus (fingerprint {before}, now {now}); "
                f"restore the data, or pass {NEW_OR_ANEW}"
            )
        self.recorded = on_rank_zero(lambda: self._begin(resolved))
        if before is None:
            log.info("%s: a new run", self.path)

    def _begin(self, resolved: Mapping[str, Any]) -> dict[str, Any]:
        recorded = {"wandb_id": secrets.token_hex(4), **self.recorded, **resolved}
        recorded["local_world_size"] = self.ranks.local_world_size
        if self.source is not None:
            recorded["source"] = self.source
        recorded["identity"] = binding(self._as_recorded(recorded))["identity"]
        if not self.config["resume"]:
            self.files.clear()
        self.record(recorded)
        return recorded

    def record(self, recorded: dict[str, Any]) -> None:
        """Write config.yaml with what was `recorded` in it; called on rank zero."""
        self.recorded = recorded
        self.files.write_config(self._as_recorded(recorded))

    def _as_recorded(self, resolved: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration as config.yaml has it."""
        trainer = {**self.config["trainer"], "precision": resolved["precision"]}
        return {**self.config, "trainer": trainer, "resolved": dict(resolved)}

    def rewind(self) -> None:
        """Cut what was written after the checkpoint to resume from; called on rank zero."""
        self.files.summary_path.unlink(missing_ok=True)  # of an older end
        MetricsFile(self.files.metrics_path).cut_after(self.step)
        cut_samples(self.files.samples_path, self.step)

    def log_state(self) -> None:
        """Log the point to continue from, or that the run is finished."""
        if self.finished is not None:
            steps, stopped = self.finished["steps"], self.finished.get("stopped")
            what = f"{steps} steps, {reached(self.finished)}"
            what += f"; ended before its budget by {stopped}" if stopped else ""
            finished = f"is already finished ({what}); name=<new name> starts another run"
            log.info("%s %s", self.path, finished)
        elif self.checkpoint is not None:
            log.info("%s: continuing at step %s, from %s", self.path, self.step, self.checkpoint)
        elif "corpus" in self.recorded:
            log.info("%s: continuing at step 0: it has no checkpoint", self.path)

    def find_state(
        self, recorded: dict[str, Any], source: SourceFingerprint, may_extend: MayExtend
    ) -> None:
        """Find the checkpoint to continue from, and whether the run is finished.

        `recorded` is the run's config.yaml. Raises ValueError, with the ways on, where it records
        another run than the configured one.
        """
        files, config, own = self.files, self.config, binding(recorded)
        resolved = {**recorded["resolved"], **own}
        self.checkpoint, self.step = self._newest_checkpoint(own)
        old_max = budget_steps(recorded)
        extends = may_extend(self.step, old_max, self.max_steps)
        if differences := identity_differences(recorded, config, may_extend=extends):
            found = f"{files.path} holds another run ({'; '.join(differences)})"
            raise ValueError(f"{found}; pass {NEW_OR_ANEW}")
        try:
            self.source = source()
        except (ValueError, FileNotFoundError) as error:
            path = config["data"].get("path")
            if path is None or recorded["data"].get("path") != path:
                raise  # it never was this run's
            log.warning("%s; the run's prepared data replaces it", error)
        if self.checkpoint is None:  # and so it starts from the present init_from
            resolved.pop("init_from", None)
        elif self.checkpoint != files.last_checkpoint:  # that one is missing or damaged
            link_atomically(self.checkpoint, files.last_checkpoint)
        self.recorded = resolved
        summary = files.summary()
        same_source = self.source in (None, resolved.get("source", self.source))
        if summary is not None and same_source and old_max == self.max_steps:
            self.finished = summary if self.step in (0, summary["steps"]) else None

    def _newest_checkpoint(self, own: Mapping[str, str]) -> tuple[Path | None, int]:
        """Return the newest checkpoint that verifies, and its step; damaged ones are logged.

        `own` is what binds checkpoints to this run. Raises ValueError where the checkpoint is
        another run's, or where all are damaged.
        """
        found = self.files.checkpoints()
        for path in found:
            try:
                content = read_checkpoint(path)
            except (ValueError, OSError) as error:
                log.warning("%s; an older checkpoint is used", error)
                continue
            if content[KEY].get("run", own) != own:
                raise ValueError(
                    f"{path} is a checkpoint of another run; remove it to continue from an older "
                    f"one, or pass {NEW_OR_ANEW}"
                )
            return path, int(content["global_step"])
        if found:
            raise ValueError(
                f"{found[0]} is damaged, and so is every older checkpoint; restore one of this "
                f"run, or pass {NEW_OR_ANEW}"
            )
        return None, 0


@contextlib.contextmanager
def open_run(
    config: Mapping[str, Any],
    device: torch.device,
    *,
    source_fingerprint: SourceFingerprint,
    may_extend: MayExtend,
) -> Iterator[Run]:
    """Join the ranks, lock the run's directory on rank zero, and find the point to continue from.

    `source_fingerprint` returns the fingerprint of the data's source; `may_extend(step, old_max,
    new_max)` whether the schedule lets the budget of a run at `step` change. A directory that was
    made here is removed where the run fails before its first step. Raises ValueError, with the ways
    on, where the directory holds another run or another process has it.
    """
    leave_with_launcher()
    files = RunDirectory.from_config(config)
    with contextlib.ExitStack() as stack:
        if Ranks.from_environment().world_size > 1:
            join(device)
            stack.callback(dist.destroy_process_group)
        run = on_rank_zero(lambda: _open(config, files, stack, source_fingerprint, may_extend))
        run.log_state()
        try:
            yield run
        except BaseException as error:
            if run.ranks.rank == 0 and not isinstance(error, SystemExit):
                files.log_error(error)
            raise


def _open(
    config: Mapping[str, Any],
    files: RunDirectory,
    stack: contextlib.ExitStack,
    source: SourceFingerprint,
    may_extend: MayExtend,
) -> Run:
    """Lock the directory, open the log, and return the run with the point to continue from."""
    missing = [path for path in (files.path, *files.path.parents) if not path.exists()]
    try:
        files.create()
        stack.enter_context(lock_run(files.path))
    except OSError as error:
        raise OSError(
            f"{files.path} cannot be written ({error.strerror}); pass another runs_dir"
        ) from error
    if missing:
        stack.push(lambda kind, *_: _remove_unbegun(kind, files, missing))
    stack.enter_context(logging_to(files.log_path))
    run = Run(config, files)
    is_run = files.has_begun or files.config_path.is_file()
    if is_run and not config["resume"] and not config["overwrite"]:
        raise ValueError(
            f"{files.path} holds a run and resume=false; "
            "pass overwrite=true to replace it, or name=<new name>"
        )
    recorded = files.recorded_config() if config["resume"] else None
    if recorded is not None and files.has_begun:
        run.find_state(recorded, source, may_extend)
    else:
        run.source = source()
    return run


def _remove_unbegun(
    kind: type[BaseException] | None, files: RunDirectory, made: list[Path]
) -> None:
    """Remove the directories that a failed command made, unless steps were taken."""
    if kind not in (None, SystemExit) and not files.has_begun:
        shutil.rmtree(made[0], ignore_errors=True)
        for parent in made[1:]:
            with contextlib.suppress(OSError):  # another run is there by now
                parent.rmdir()


def adapt(start: Checkpoint, model: Mapping[str, Any], typed: Mapping[str, Any]) -> Checkpoint:
    """Return the model to start from with the typed dropout and shorter block_size.

    A typed `rope_scaling` of rotary positions is taken as well, and with it a longer block_size.
    Raises ValueError for any other typed model key that differs.
    """
    length, is_rotary = start.config.block_size, start.config.position == "rotary"
    if scales := is_rotary and "model.rope_scaling" in typed:
        start = with_config(start, rope_scaling=model["rope_scaling"])
    if "model.block_size" in typed and (scales or model["block_size"] < length):
        verb = "cut" if model["block_size"] < length else "raised"
        also = "" if is_rotary else ", with the position embeddings beyond it"
        change = (verb, length, model["block_size"], also)
        log.info("%s: block_size %s from %s to %s%s", start.path, *change)
        start = with_config(start, block_size=model["block_size"])
    for key, value in model.items():
        if key == "dropout" or not {"model", f"model.{key}"} & typed.keys():
            continue
        there = getattr(start.config, key, value)
        if there != value and replace(start.config, **{key: value}) != start.config:
            raise ValueError(
                f"{start.path} has {key}={there!r} but the command has model.{key}={value!r}; "
                "leave the model keys out: the model comes from init_from"
            )
    return with_config(start, dropout=model["dropout"]) if "model.dropout" in typed else start
