"""A run held by this process (group): opened, continued or begun, and finished."""

import contextlib
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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
    record,
    verify_checkpoint,
    weights_sha256,
    with_block_size,
    with_dropout,
)
from nanogpt.disk import link_atomically
from nanogpt.model import GPTConfig
from nanogpt.prompts import Template
from nanogpt.ranks import Ranks, join, leave_with_launcher, on_rank_zero
from nanogpt.runs.directory import NEW_OR_ANEW, RunDirectory, RunLock, cut_samples, reached
from nanogpt.runs.identity import (
    binding,
    budget_steps,
    check_continues,
    operational_differences,
    upgrade,
)
from nanogpt.runs.log import log_to
from nanogpt.runs.metrics import MetricsFile
from nanogpt.tokenizer import Tokenizer

log = logging.getLogger("nanogpt")

SourceFingerprint = Callable[[], str]
MayExtend = Callable[[int, int, int], bool]


@dataclass
class Standing:
    """Where a run stands when it is opened.

    `source` is the fingerprint of the data's source, None where that is gone from a run whose data
    it was. `recorded` is what was resolved when the run began, `checkpoint` the newest one that
    verifies, at `step`. `identities` are the hashes that its checkpoints may carry. With
    `replaced`, an older run in the directory is removed.
    """

    source: str | None
    recorded: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    step: int = 0
    finished: dict[str, Any] | None = None
    identities: list[str] = field(default_factory=list)
    replaced: bool = False


class Run:
    """A run whose directory is locked by rank zero; `open_run` makes it.

    Attributes:
        files: the paths of the run's files; `path` is their directory.
        finished: the summary of a run that has nothing left to do, else None.
        recorded: what was resolved when the run began, empty for a new one until `begin`.
        checkpoint: the checkpoint to resume from, None to start at step 0.
        step: its optimizer step, 0 without one.
        max_steps: the budget in optimizer steps.
        prepared: fingerprint of the prepared corpus that replaces a missing source, else None.
    """

    def __init__(
        self, config: Mapping[str, Any], files: RunDirectory, ranks: Ranks, standing: Standing
    ) -> None:
        self.config = config
        self.files = files
        self.path = files.path
        self.ranks = ranks
        self.finished = standing.finished
        self.recorded = standing.recorded
        self.checkpoint = standing.checkpoint
        self.step = standing.step
        self.max_steps = budget_steps(config)
        is_gone = standing.recorded and standing.source is None
        self.prepared: str | None = standing.recorded["corpus"] if is_gone else None
        self._standing = standing
        self._started_from: dict[str, str] | None = None

    @property
    def init_from(self) -> dict[str, str] | None:
        """Path of what the run started from, and the sha256 of its weights."""
        return self.recorded.get("init_from")

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
        """Return what this run's checkpoints say of themselves."""
        about = record(
            self.config["stage"],
            model_config,
            tokenizer,
            template=None if template is None else template.name,
            labels=labels,
            init_from=self.init_from,
        )
        return {**about, "run": self.binding}

    def end_by(self, step: int) -> None:
        """End the run at a step, where its budget goes beyond."""
        self.max_steps = min(self.max_steps, step)

    def initial_checkpoint(self) -> Checkpoint | None:
        """Return the model and tokenizer that `init_from` names, None where they are to be made.

        A run that continues takes them from its own checkpoint: its start is not resolved again.
        The configured `model.block` is allowed. Raises ValueError where a model key was typed that
        differs, but for a shorter block_size.
        """
        config = self.config
        if config["init_from"] is None:
            return None
        block = config["model"].get("block")
        allow_modules = [block] if block else []
        if self.checkpoint is not None:
            start = load_checkpoint(self.checkpoint, allow_modules=allow_modules)
        else:
            where = (config["init_from"], config["runs_dir"], config["data_dir"])
            start = init_model(on_rank_zero(lambda: find_init_from(*where)), allow_modules)
            start = adapt(start, config["model"], config["typed"])
        if self.ranks.rank == 0 and self.init_from is None:
            path, sha256 = str(start.path.resolve()), weights_sha256(start.model)
            self._started_from = {"path": path, "sha256": sha256}
        return start

    def check_corpus(self, fingerprint: str) -> None:
        """Raise ValueError where the corpus is not the one that the run began with."""
        before = self._standing.recorded.get("corpus", fingerprint)
        if before != fingerprint:
            raise ValueError(
                f"{self.path} was trained on another corpus (fingerprint "
                f"{before}, now {fingerprint}); restore the data, "
                "pass name=<new name>, or resume=false overwrite=true"
            )

    def begin(self, resolved: Mapping[str, Any]) -> None:
        """Clear a run that is replaced and write config.yaml, with `resolved` in it.

        `resolved` has the fingerprint of the data, `corpus`, and the settings that were left to the
        machine. Called on every rank. Raises ValueError where the corpus is not the one that the
        run began with.
        """
        self.recorded = on_rank_zero(lambda: self._begin(resolved))
        if not self._standing.recorded:
            log.info("%s: a new run", self.path)

    def _begin(self, resolved: Mapping[str, Any]) -> dict[str, Any]:
        standing, before = self._standing, self._standing.recorded
        self.check_corpus(resolved["corpus"])
        recorded = {
            "corpus": resolved["corpus"],
            "source": standing.source or before.get("source"),
            "wandb_id": before.get("wandb_id", secrets.token_hex(4)),
            "local_world_size": self.ranks.local_world_size,
            **resolved,
        }
        if init_from := before.get("init_from") or self._started_from:
            recorded["init_from"] = init_from
        identity = binding(self._as_recorded(recorded))["identity"]
        if former := [other for other in standing.identities if other != identity]:
            recorded["former_identities"] = former
        if standing.replaced:
            self.files.clear()
        self.files.write_config(self._as_recorded(recorded))
        return recorded

    def _as_recorded(self, resolved: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration as config.yaml has it."""
        trainer = {**self.config["trainer"], "precision": resolved["precision"]}
        return {**self.config, "trainer": trainer, "resolved": dict(resolved)}

    def rewind(self) -> None:
        """Cut what was written after the checkpoint to resume from. Called on every rank."""
        on_rank_zero(self._rewind)

    def _rewind(self) -> None:
        self.files.summary_path.unlink(missing_ok=True)  # of an older end
        self.restore_last()
        MetricsFile(self.files.metrics_path).cut_after(self.step)
        cut_samples(self.files.samples_path, self.step)

    def restore_last(self) -> None:
        """Name the checkpoint that was found `last.ckpt`, where that is missing or damaged."""
        last = self.files.last_checkpoint
        if self.checkpoint is not None and self.checkpoint != last:
            link_atomically(self.checkpoint, last)

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write rank zero's summary to summary.json and return it. Called on every rank."""

        def write() -> dict[str, Any]:
            self.files.write_summary(summary)
            return summary

        return on_rank_zero(write)

    def log_standing(self) -> None:
        """Log what is continued, or that nothing is left to do."""
        if self.finished is not None:
            what = f"{self.finished['steps']} steps, {reached(self.finished)}"
            if stopped := self.finished.get("stopped"):
                what += f"; ended before its budget by {stopped}"
            log.info(
                "%s is already finished (%s); name=<new name> starts another run", self.path, what
            )
        elif self.checkpoint is not None:
            log.info("%s: continuing at step %s, from %s", self.path, self.step, self.checkpoint)
        elif self.recorded:
            log.info("%s: continuing at step 0: it has no checkpoint", self.path)


@contextlib.contextmanager
def open_run(
    config: Mapping[str, Any],
    device: torch.device,
    *,
    source_fingerprint: SourceFingerprint,
    may_extend: MayExtend,
) -> Iterator[Run]:
    """Join the ranks, lock the run's directory on rank zero, and find out where the run stands.

    `source_fingerprint` returns the fingerprint of the data's source; `may_extend(step, old_max,
    new_max)` whether the schedule lets the budget of a run at `step` change. A directory that was
    made here is removed where the run fails before its first step. Raises ValueError, with the ways
    on, where the directory holds another run or another process has it.
    """
    leave_with_launcher()
    ranks, files = Ranks.from_environment(), RunDirectory.from_config(config)
    with contextlib.ExitStack() as stack:
        if ranks.world_size > 1:
            join(device)
            stack.callback(dist.destroy_process_group)
        opening = _Opening(config, files, source_fingerprint, may_extend)
        run = Run(config, files, ranks, on_rank_zero(lambda: opening.open(stack)))
        if run.finished is not None and ranks.rank == 0:
            run.restore_last()
        run.log_standing()
        try:
            yield run
        except BaseException as error:
            if ranks.rank == 0 and not isinstance(error, SystemExit):
                files.log_error(error)
            raise


@dataclass
class _Opening:
    """What rank zero does to open a run."""

    config: Mapping[str, Any]
    files: RunDirectory
    source_fingerprint: SourceFingerprint
    may_extend: MayExtend

    def open(self, stack: contextlib.ExitStack) -> Standing:
        """Lock the directory, open the log, and find out where the run stands."""
        files, config = self.files, self.config
        missing = [path for path in (files.path, *files.path.parents) if not path.exists()]
        try:
            files.create()
            stack.enter_context(RunLock(files.path))
        except OSError as error:
            raise OSError(
                f"{files.path} cannot be written ({error.strerror}); pass another runs_dir"
            ) from error
        if missing:
            stack.push(lambda kind, *_: self._remove_unbegun(kind, missing))
        stack.callback(log_to(files.log_path))
        if not config["resume"] and (files.has_begun or files.config_path.is_file()):
            if not config["overwrite"]:
                raise ValueError(
                    f"{files.path} holds a run and resume=false; "
                    "pass overwrite=true to replace it, or name=<new name>"
                )
            return Standing(self.source_fingerprint(), replaced=True)
        recorded = files.recorded_config()
        if recorded is None or not files.has_begun:
            return Standing(self.source_fingerprint())
        return self._standing(recorded)

    def _standing(self, recorded: dict[str, Any]) -> Standing:
        """Return where a run stands that has begun; raise ValueError where it is another one."""
        files, config, resolved = self.files, self.config, recorded["resolved"]
        own = binding(recorded)
        identities = list(dict.fromkeys([*resolved.get("former_identities", []), own["identity"]]))
        recorded = upgrade(recorded)
        newest = self._newest_checkpoint(own["corpus"], identities)
        step = 0 if newest is None else int(newest[1]["global_step"])
        old_max, new_max = budget_steps(recorded), budget_steps(config)
        may_extend = self.may_extend(step, old_max, new_max)
        check_continues(files.path, recorded, config, may_extend=may_extend)
        standing = Standing(self._source(recorded), resolved, step=step, identities=identities)
        if newest is not None:
            standing.checkpoint, content = newest
            if config["init_from"] is None:
                check_shape(standing.checkpoint, content[KEY]["model"], config["model"])
        else:  # and so it starts from what init_from is now
            standing.recorded = {k: v for k, v in resolved.items() if k != "init_from"}
        summary = files.summary()
        same_source = standing.source in (None, resolved.get("source", standing.source))
        if summary is not None and same_source and old_max == new_max:
            standing.finished = summary if step in (0, summary["steps"]) else None
        for line in operational_differences(recorded, config):
            log.debug("changed: %s", line)
        return standing

    def _newest_checkpoint(
        self, corpus: str, identities: list[str]
    ) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest checkpoint that verifies, and its content; damaged ones are logged.

        Raises ValueError where all are damaged, or where it is another run's.
        """
        found = self.files.checkpoints()
        own = [{"identity": identity, "corpus": corpus} for identity in identities]
        foreign = ""
        for path in found:
            try:
                content = verify_checkpoint(path)
            except (ValueError, OSError) as error:
                log.warning("%s; an older checkpoint is used", error)
                continue
            is_own = content[KEY].get("run", own[0]) in own
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
        has_failed = kind is not None and issubclass(kind, Exception | KeyboardInterrupt)
        if has_failed and not self.files.has_begun:
            shutil.rmtree(made[0], ignore_errors=True)
            for parent in made[1:]:
                with contextlib.suppress(OSError):  # another run is there by now
                    parent.rmdir()


def adapt(start: Checkpoint, model: Mapping[str, Any], typed: Mapping[str, Any]) -> Checkpoint:
    """Return the model to start from with the model keys that may be typed beside it."""
    start = shorten(start, model["block_size"], typed)
    check_model_keys(start, model, typed)
    return with_dropout(start, model["dropout"]) if "model.dropout" in typed else start


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
        if (there := getattr(start.config, key, value)) != value:
            raise ValueError(
                f"{start.path} has {key}={there!r} but the command says model.{key}={value!r}; "
                "leave the model keys out: the model comes from init_from"
            )


def check_shape(path: Path, there: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ValueError where the run's checkpoint holds another model than its configuration.

    A key that the checkpoint lacks is null in it; `_target_` is no key of a model.
    """
    differences = [
        f"{key}={there.get(key)!r}"
        for key, value in expected.items()
        if key != "_target_" and there.get(key) != value
    ]
    if differences:
        raise ValueError(
            f"{path} holds another model than the run's config.yaml ({', '.join(differences)}); "
            "restore the run's own checkpoint"
        )
