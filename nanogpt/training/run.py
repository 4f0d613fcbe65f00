"""A run: its identity, the directory that it names, and the lock that gives it to one process.

Issuing a command again finds the same directory and continues it: nothing here is dated or random,
so all ranks agree without talking.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from nanogpt.disk import write_atomically

# What may change between two starts of one run; every other key is part of its identity.
OPERATIONAL = (
    "name",
    "runs_dir",
    "data_dir",
    "resume",
    "overwrite",
    "debug",
    "compile",
    "micro_batch",
    "threads",
    "remeasure",
    "data.workers",
    "data.prompts",
    "data.path",  # the corpus fingerprint stands for it
    "logger",
    "callbacks",
    "trainer",
    "command",
    "typed",
    "resolved",
)
IDENTITY_WITHIN_OPERATIONAL = ("trainer.precision",)
NAMED_BY_CHOICE = ("stage", "model", "data")  # groups that the name begins with


def run_name(choices: Mapping[str, str | None], typed: Mapping[str, Any]) -> str:
    """Return `<stage>-<model>-<data>`, and a slug and 8 hex digits where identity keys were typed.

    `choices` are the selected options of the config groups; `typed` the keys given on the command
    line with their values. `data.path` is typed identity too: another file is another run.
    """
    name = "-".join(str(choices[group]) for group in NAMED_BY_CHOICE)
    changed = {
        key: value
        for key, value in sorted(typed.items())
        if key not in NAMED_BY_CHOICE and (is_identity(key) or key == "data.path")
    }
    if not changed:
        return name
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
    return f"{name}-{_slug(changed)}-{digest}"


def is_identity(key: str) -> bool:
    """Return whether a change of this dotted key makes another run."""
    if any(_under(key, root) for root in IDENTITY_WITHIN_OPERATIONAL):
        return True
    return not any(_under(key, root) for root in OPERATIONAL)


def _under(key: str, root: str) -> bool:
    return key == root or key.startswith(root + ".")


def _slug(changed: Mapping[str, Any]) -> str:
    parts = []
    for key, value in changed.items():
        text = Path(str(value)).name if key.endswith("path") else str(value)
        last = key.rpartition(".")[2]
        parts.append(text if last in ("experiment", "path") else f"{last}-{text}")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts))[:48].strip("-._") or "run"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested mapping under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def identity_differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return one line per identity key in which two configurations differ.

    `auto` agrees with whatever it became when the run began.
    """
    return _differences(recorded, wanted, is_identity)


def operational_differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return one line per key that may change between two starts of a run, and did."""
    return _differences(
        recorded, wanted, lambda key: not is_identity(key) and not _under(key, "resolved")
    )


def _differences(
    recorded: Mapping[str, Any], wanted: Mapping[str, Any], counts: Callable[[str], bool]
) -> list[str]:
    old, new = flatten(recorded), flatten(wanted)
    return [
        f"{key}: {old.get(key)!r} is recorded, {new.get(key)!r} was asked for"
        for key in sorted(old.keys() | new.keys())
        if counts(key) and old.get(key) != new.get(key) and new.get(key) != "auto"
    ]


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.yaml"
        self.metrics_path = path / "metrics.csv"
        self.log_path = path / "train.log"
        self.samples_path = path / "samples.txt"
        self.summary_path = path / "summary.json"
        self.report_path = path / "report.html"
        self.evaluations_path = path / "evaluations.json"
        self.checkpoints_dir = path / "checkpoints"
        self.last_checkpoint = self.checkpoints_dir / "last.ckpt"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "RunDirectory":
        """Return the directory of a configured run: `runs_dir/name`."""
        name = Path(str(config["name"]))
        if name.is_absolute() or not name.parts or ".." in name.parts:
            raise ValueError(
                f"name={config['name']!r} is no directory under runs_dir; "
                "pass a plain name such as run1 or group/run1"
            )
        return cls(Path(config["runs_dir"]) / name)

    @property
    def has_begun(self) -> bool:
        """Whether there is a checkpoint to continue from."""
        return self.last_checkpoint.is_file()

    def recorded_config(self) -> dict[str, Any] | None:
        """Return the configuration that the run was last started with, None for a new one."""
        if not self.config_path.is_file():
            return None
        loaded = yaml.safe_load(self.config_path.read_text(encoding="utf-8"))
        if not isinstance(loaded, dict):
            raise ValueError(
                f"{self.config_path} is damaged; restore it, or start anew with "
                "resume=false overwrite=true"
            )
        return loaded

    def write_config(self, config: Mapping[str, Any]) -> None:
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        write_atomically(self.config_path, text.encode())

    def summary(self) -> dict[str, Any] | None:
        """Return the summary of a finished run, None before."""
        if not self.summary_path.is_file():
            return None
        return json.loads(self.summary_path.read_text(encoding="utf-8"))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_atomically(self.summary_path, (json.dumps(summary, indent=2) + "\n").encode())

    def create(self) -> None:
        self.checkpoints_dir.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Remove what an earlier run wrote here (`overwrite=true`), and nothing else."""
        for directory in (self.checkpoints_dir, self.path / "tensorboard", self.path / "wandb"):
            shutil.rmtree(directory, ignore_errors=True)
        for file in vars(self).values():
            if file.is_file():
                file.unlink()
        self.create()


def check_continues(
    run: RunDirectory, config: Mapping[str, Any], *, may_extend: bool = False
) -> None:
    """Refuse to continue a run whose identity is another than what was asked for.

    `may_extend` says that the schedule lets `max_steps` and `max_tokens` grow. Raises ValueError
    that lists the differences and the ways on.
    """
    recorded = run.recorded_config()
    if recorded is None:
        return
    differences = identity_differences(recorded, config)
    if may_extend:
        differences = [d for d in differences if not d.startswith(("max_steps:", "max_tokens:"))]
    if differences:
        raise ValueError(
            f"{run.path} holds another run ({'; '.join(differences)}); "
            "pass name=<new name> for a new run, or resume=false overwrite=true to replace this one"
        )


class RunLock:
    """One process (group) per run: a lock on a file that the kernel releases when its holder dies.

    Forked children (data workers) close their copy, so an orphan never keeps the run locked.
    """

    FILE_NAME = ".lock"

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / self.FILE_NAME
        self._handle: int | None = None

    def __enter__(self) -> "RunLock":
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle)
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise
            raise ValueError(
                f"{self._path.parent} is in use by another process; "
                "wait for it, or pass name=<new name>"
            ) from error
        self._handle = handle
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


if os.name == "nt":
    import msvcrt

    def _lock(handle: int) -> None:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]

else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
