"""The directory of a run: its files, and the lock that gives it to one process."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from nanogpt.disk import write_atomically
from nanogpt.runs.identity import NEW_OR_ANEW

RECORDED = {  # what a continued run needs of its config.yaml, with the types
    "tokens_per_step": int,
    "max_steps": (int, type(None)),
    "max_tokens": (int, type(None)),
    "resolved": dict,
}
RESOLVED = {
    "corpus": str,
    "precision": str,
    "compile": bool,
    "micro_batch": int,
    "threads": int,
    "local_world_size": int,
    "wandb_id": str,
}

log = logging.getLogger("nanogpt")


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
        """Whether steps were taken: there is a checkpoint, or what is written after it."""
        files = [*self.checkpoints_dir.glob("*.ckpt"), self.metrics_path, self.summary_path]
        return any(path.is_file() for path in files)

    def recorded_config(self) -> dict[str, Any] | None:
        """Return the configuration that the run was last started with, None for a new one.

        Raises ValueError, with the ways on, where it is missing from a run that has begun, is not
        YAML of plain values, or lacks what continuing needs.
        """
        if not self.config_path.is_file():
            if self.has_begun:
                raise ValueError(
                    f"{self.path} has checkpoints or metrics but no {self.config_path.name}; "
                    f"restore it, or pass {NEW_OR_ANEW}"
                )
            return None
        try:
            config = read_config(self.config_path)
            mistyped = [*_mistyped(config, RECORDED), *_mistyped(config["resolved"], RESOLVED)]
        except (ValueError, KeyError, TypeError) as error:
            mistyped = [str(error)]
        if mistyped:
            raise ValueError(
                f"{self.config_path} is damaged ({mistyped[0]}); restore it, or pass {NEW_OR_ANEW}"
            )
        return config

    def write_config(self, config: Mapping[str, Any]) -> None:
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        write_atomically(self.config_path, text.encode())

    def summary(self) -> dict[str, Any] | None:
        """Return the summary of a finished run, None before; a damaged one is to be made anew."""
        if not self.summary_path.is_file():
            return None
        try:
            return read_summary(self.summary_path)
        except ValueError as error:
            log.warning("%s; it is made anew", error)
            return None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_atomically(self.summary_path, (json.dumps(summary, indent=2) + "\n").encode())

    def log_error(self, error: BaseException) -> None:
        """Append an error's traceback to train.log alone."""
        with contextlib.suppress(OSError), open(self.log_path, "a", encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)))

    def create(self) -> None:
        self.checkpoints_dir.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Remove what an earlier run wrote here (`overwrite=true`), but for its log."""
        for directory in (self.checkpoints_dir, self.path / "tensorboard", self.path / "wandb"):
            shutil.rmtree(directory, ignore_errors=True)
        for file in vars(self).values():
            if file.is_file() and file != self.log_path:
                file.unlink()
        self.create()


def read_config(path: Path) -> dict[str, Any]:
    """Return a run's config.yaml. Raises ValueError where it is no mapping of plain values."""
    try:
        config = yaml.safe_load(path.read_bytes())
        json.dumps(config)  # refuses dates, and an anchor inside itself
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"not YAML of plain values: {reason}") from error
    if not isinstance(config, dict):
        raise ValueError(f"a {type(config).__name__} in place of a mapping")
    return config


def read_summary(path: Path) -> dict[str, Any]:
    """Return a run's summary.json. Raises ValueError, naming the file, where it is damaged."""
    try:
        summary: dict[str, Any] = json.loads(path.read_bytes())
        mistyped = [*_mistyped({"val_loss": 0.0, **summary}, {"steps": int, "val_loss": float})]
    except (ValueError, TypeError, RecursionError) as error:
        mistyped = [str(error)]
    if mistyped:
        raise ValueError(f"{path} is damaged ({mistyped[0]})")
    return summary


def reached(summary: Mapping[str, Any]) -> str:
    """Return the figures that the stage is about."""
    if "test_accuracy" in summary:
        words = summary["baseline_bag_of_words_test_accuracy"]
        return (
            f"test accuracy {100 * summary['test_accuracy']:.2f} %, macro-F1 "
            f"{summary['test_macro_f1']:.4f} (a bag of words reaches {100 * words:.2f} %); "
            f"validation accuracy {100 * summary['val_accuracy']:.2f} %"
        )
    bits, gzip = summary.get("val_bits_per_byte"), summary.get("gzip_bits_per_byte")
    per_byte = "" if bits is None else f", {bits:.3f} bits per byte"
    beside = f" (gzip -9 needs {gzip:.3f})" if bits is not None and gzip is not None else ""
    if (loss := summary.get("val_loss")) is None:
        return "no validation loss is in metrics.csv"
    return f"validation loss {loss:.4f}{per_byte}{beside}"


def _mistyped(values: Mapping[str, Any], types: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the values of the keys that are needed."""
    if not isinstance(values, dict):
        raise TypeError(f"a {type(values).__name__} in place of a mapping")
    for key, kind in types.items():
        if key not in values:
            yield f"it lacks {key}"
            continue
        value = values[key]
        is_typed = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not is_typed or (type(value) is int and value < 1):
            yield f"{key} is {value!r}"[:80]


def cut_samples(path: Path, step: int) -> None:
    """Drop from samples.txt what was written after `step`; the rest need not be text."""
    if not path.is_file():
        return
    content = path.read_bytes()
    for heading in re.finditer(rb"^=== step ([0-9]{1,18}) ===$", content, re.MULTILINE):
        if int(heading[1]) > step:
            write_atomically(path, content[: heading.start()])
            return


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

    def __exit__(self, *_: object) -> None:
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
