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
from nanogpt.runs.directory import NEW_OR_ANEW, RunDirectory, cut_samples, lock_run, reached
from nanogpt.runs.identity import (
    binding,
    budget_steps,
    check_continues,
    upgrade,
)
from nanogpt.runs.log import log_to
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
        recorded: what was resolved when the run began, empty for a new one until `begin`.
        checkpoint: the newest intact checkpoint, None to start at step 0.
        step: its optimizer step, 0 without one.
        finished: the summary of a run that has nothing left to do, else None.
        identities: the hashes that the run's checkpoints may carry.
        replaces: whether an older run in the directory is removed.
        max_steps: the budget in optimizer steps.
    """

    config: Mapping[str, Any]
    files: RunDirectory
    source: str | None = None
    recorded: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    step: int = 0
    finished: dict[str, Any] | None = None
    identities: list[str] = field(default_factory=list)
    replaces: bool = False
    started_from: dict[str, str] | None = None  # on rank zero, until `begin`

    def __post_init__(self) -> None:
        self.path = self.files.path
        self.max_steps = budget_steps(self.config)

    @property
    def ranks(self) -> Ranks:
        """This process among those of the run."""
        return Ranks.from_environment()

    @property
    def prepared(self) -> str | None:
        """Fingerprint of the prepared corpus that replaces a missing source, else None."""
        return self.recorded.get("corpus") if self.source is None else None

    @property
    def binding(self) -> dict[str, str]:
        """What binds this run's checkpoints to it."""
        return binding(self._as_recorded(self.recorded))

    @property
    def init_from(self) -> dict[str, str] | None:
        """Path of what the run started from, and the sha256 of its weights."""
        return self.recorded.get("init_from")

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
            init_from=self.init_from,
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
            self.started_from = {"path": path, "sha256": sha256}
        return start

    def begin(self, resolved: Mapping[str, Any]) -> None:
        """Write config.yaml with `resolved` in it, after removing a run that is replaced.

        `resolved` has the fingerprint of the data, `corpus`, and the settings that were left to the
        machine. Called on every rank. Raises ValueError where the corpus is not the one that the
        run began with.
        """
        is_new = not self.recorded
        before, now = self.recorded.get("corpus", resolved["corpus"]), resolved["corpus"]
        if before != now:
            raise ValueError(
                f"{self.path} was trained on another corpus (fingerprint {before}, now {now}); "
                "restore the data, pass name=<new name>, or resume=false overwrite=true"
            )
        self.recorded = on_rank_zero(lambda: self._begin(resolved))
        if is_new:
            log.info("%s: a new run", self.path)

    def _begin(self, resolved: Mapping[str, Any]) -> dict[str, Any]:
        before = self.recorded
        recorded = {
            "corpus": resolved["corpus"],
            "source": self.source or before.get("source"),
            "wandb_id": before.get("wandb_id", secrets.token_hex(4)),
            "local_world_size": self.ranks.local_world_size,
            **resolved,
        }
        if init_from := before.get("init_from") or self.started_from:
            recorded["init_from"] = init_from
        identity = binding(self._as_recorded(recorded))["identity"]
        if former := [other for other in self.identities if other != identity]:
            recorded["former_identities"] = former
        if self.replaces:
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
        """Link the newest intact checkpoint as `last.ckpt`, where that is missing or damaged."""
        last = self.files.last_checkpoint
        if self.checkpoint is not None and self.checkpoint != last:
            link_atomically(self.checkpoint, last)

    def log_state(self) -> None:
        """Log the point to continue from, or that the run is finished."""
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

    def find_state(
        self, recorded: dict[str, Any], source: SourceFingerprint, may_extend: MayExtend
    ) -> None:
        """Find the checkpoint to continue from, and whether the run is finished.

        `recorded` is the run's config.yaml. Raises ValueError, with the ways on, where it records
        another run than the configured one.
        """
        files, config, resolved = self.files, self.config, recorded["resolved"]
        own = binding(recorded)
        former = resolved.get("former_identities", [])
        self.identities = list(dict.fromkeys([*former, own["identity"]]))
        recorded = upgrade(recorded)
        newest = self._newest_checkpoint(own["corpus"], self.identities)
        self.step = 0 if newest is None else int(newest[1]["global_step"])
        old_max = budget_steps(recorded)
        extends = may_extend(self.step, old_max, self.max_steps)
        check_continues(files.path, recorded, config, may_extend=extends)
        try:
            self.source = source()
        except (ValueError, FileNotFoundError) as error:
            path = config["data"].get("path")
            if path is None or recorded["data"].get("path") != path:
                raise  # it never was this run's
            log.warning("%s; the run's prepared data replaces it", error)
        self.recorded = resolved
        if newest is None:  # and so it starts from the present init_from
            self.recorded = {key: resolved[key] for key in resolved if key != "init_from"}
        else:
            self.checkpoint, content = newest
            if config["init_from"] is None:
                check_shape(self.checkpoint, content[KEY]["model"], config["model"])
        summary = files.summary()
        same_source = self.source in (None, resolved.get("source", self.source))
        if summary is not None and same_source and old_max == self.max_steps:
            self.finished = summary if self.step in (0, summary["steps"]) else None

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
        if run.finished is not None and run.ranks.rank == 0:
            run.restore_last()
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
    stack.callback(log_to(files.log_path))
    run = Run(config, files)
    if not config["resume"] and (files.has_begun or files.config_path.is_file()):
        if not config["overwrite"]:
            raise ValueError(
                f"{files.path} holds a run and resume=false; "
                "pass overwrite=true to replace it, or name=<new name>"
            )
        run.replaces, run.source = True, source()
    elif (recorded := files.recorded_config()) is None or not files.has_begun:
        run.source = source()
    else:
        run.find_state(recorded, source, may_extend)
    return run


def _remove_unbegun(
    kind: type[BaseException] | None, files: RunDirectory, made: list[Path]
) -> None:
    """Remove the directories that a failed command made, unless steps were taken."""
    has_failed = kind is not None and issubclass(kind, Exception | KeyboardInterrupt)
    if has_failed and not files.has_begun:
        shutil.rmtree(made[0], ignore_errors=True)
        for parent in made[1:]:
            with contextlib.suppress(OSError):  # another run is there by now
                parent.rmdir()


def adapt(start: Checkpoint, model: Mapping[str, Any], typed: Mapping[str, Any]) -> Checkpoint:
    """Return the model to start from with the typed dropout and shorter block_size.

    Raises ValueError for any other typed model key that differs.
    """
    length = start.config.block_size
    if "model.block_size" in typed and model["block_size"] < length:
        log.info(
            "%s: block_size cut from %s to %s, with the position embeddings beyond it",
            start.path,
            length,
            model["block_size"],
        )
        start = with_block_size(start, model["block_size"])
    for key, value in model.items():
        if key == "dropout" or not {"model", f"model.{key}"} & typed.keys():
            continue
        if (there := getattr(start.config, key, value)) != value:
            raise ValueError(
                f"{start.path} has {key}={there!r} but the command has model.{key}={value!r}; "
                "leave the model keys out: the model comes from init_from"
            )
    return with_dropout(start, model["dropout"]) if "model.dropout" in typed else start


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
