"""The directory of a run: its files, their readers, and the lock that gives it to one process.

Training, reports, evaluation and the server read runs through this module, which imports neither
torch nor Lightning (the reader of `metrics.csv` is `nanogpt.runs.metrics.read_metrics`):

    for run in find_runs(Path("runs")):                     # newest first
        config, summary = read_config(run.config_path), read_summary(run.summary_path)
        metrics = read_metrics(run.metrics_path)            # {"val/loss": [(step, value), ...]}
        samples = read_samples(run.samples_path)            # [(step, text), ...]
        checkpoints = run.checkpoints()                     # newest first
    find_checkpoint("latest"), find_checkpoint("run1")      # what a command's CHECKPOINT names

Readers raise OSError, or ValueError for damage.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from pydantic import StrictFloat, StrictInt
from typing_extensions import NotRequired

from nanogpt.disk import find_files, open_regular, replacing
from nanogpt.runs.identity import NEW_OR_ANEW
from nanogpt.text import first_line
from nanogpt.values import Count, Flag, Text, check

MAX_BYTES = 16 * 2**20  # of a config.yaml or summary.json

log = logging.getLogger("nanogpt")


SUMMARY = {"steps": StrictInt, "val_loss": NotRequired[StrictFloat]}
# What continuing a run needs of config.yaml, and under its key `resolved`.
RECORDED = {
    "tokens_per_step": Count,
    "max_steps": Count | None,
    "max_tokens": Count | None,
    "resolved": dict,
}
RESOLVED = {
    "corpus": Text,
    "precision": Text,
    "compile": Flag,
    "activation_checkpointing": NotRequired[Flag],  # since version 0.2
    "micro_batch": Count,
    "threads": Count,
    "local_world_size": Count,
    "wandb_id": Text,
}


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.yaml"
        self.metrics_path = path / "metrics.csv"
        self.log_path = path / "train.log"
        self.samples_path = path / "samples.txt"
        self.validation_path = path / "validation.csv"
        self.summary_path = path / "summary.json"
        self.report_path = path / "report.html"
        self.evaluations_path = path / "evaluations.json"
        self.checkpoints_dir = path / "checkpoints"
        self.last_checkpoint = self.checkpoints_dir / "last.ckpt"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "RunDirectory":
        """Return the directory of a configured run, `runs_dir/name`.

        Raises ValueError for a name that leaves `runs_dir`.
        """
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
            config = _read(self.config_path, yaml.safe_load, RECORDED)
            check(config["resolved"], RESOLVED, f"{self.config_path} is damaged: resolved")
        except ValueError as error:
            raise ValueError(f"{error}; restore it, or pass {NEW_OR_ANEW}") from error
        return config

    def write_config(self, config: Mapping[str, Any]) -> None:
        with replacing(self.config_path, "w") as file:
            yaml.safe_dump(dict(config), file, sort_keys=False, allow_unicode=True)

    def summary(self) -> dict[str, Any] | None:
        """Return the summary of a finished run; None, with a warning, for a damaged one."""
        if not self.summary_path.is_file():
            return None
        try:
            return read_summary(self.summary_path)
        except ValueError as error:
            log.warning("%s; it is written again", error)
            return None

    def log_error(self, error: BaseException) -> None:
        """Append an error's traceback to train.log alone."""
        with contextlib.suppress(OSError), open(self.log_path, "a", encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)))

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, the newest first; two names of one file are `last.ckpt`."""
        last, steps = self.last_checkpoint, [*step_checkpoints(self.checkpoints_dir).values()][::-1]
        if not last.is_file():
            return steps
        twins = [path for path in steps if path.samefile(last)]
        return [last if path in twins else path for path in steps] if twins else [last, *steps]

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


def find_runs(runs_dir: Path) -> list[RunDirectory]:
    """Return the runs under a directory that have metrics, the most recently logged first."""
    found = []
    for path in find_files(runs_dir, "metrics.csv"):
        with contextlib.suppress(OSError):  # removed meanwhile
            found.append((os.lstat(path).st_mtime_ns, path.parent))
    return [RunDirectory(path) for _, path in sorted(found, reverse=True)]


def read_config(path: Path) -> dict[str, Any]:
    """Return a run's config.yaml. Raises ValueError unless it is a mapping of plain values."""
    return _read(path, yaml.safe_load, {})


def read_summary(path: Path) -> dict[str, Any]:
    """Return a run's summary.json. Raises ValueError, naming the file, where it is damaged."""
    return _read(path, json.load, SUMMARY)


def _read(path: Path, load: Callable[[BinaryIO], Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    try:
        with open_regular(path, MAX_BYTES) as file:
            content: dict[str, Any] = load(file)
        json.dumps(content)  # refuses dates, and an anchor inside itself
        check(content, kinds)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)})") from error
    return content


def read_samples(path: Path) -> list[tuple[int, str]]:
    """Return (step, text) pairs of a samples.txt, ascending; the later text of a step counts."""
    text = path.read_text(encoding="utf-8", errors="replace")
    parts = re.split(r"^=== step ([0-9]{1,18}) ===\n", text, flags=re.MULTILINE)
    by_step = dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))
    return [(step, by_step[step].strip("\n")) for step in sorted(by_step)]


def step_checkpoints(directory: Path) -> dict[int, Path]:
    """Return the files `step_<number>.ckpt` of a directory by their number, ascending."""
    numbered = {path.stem.removeprefix("step_"): path for path in directory.glob("step_*.ckpt")}
    found = {int(n): path for n, path in numbered.items() if n.isdecimal() and path.is_file()}
    return dict(sorted(found.items()))


def find_checkpoint(reference: str | Path, runs_dir: str | Path = "runs") -> Path:
    """Return the file of a `.ckpt` path, a run directory, a run's name, or `latest`.

    `latest` is the last checkpoint of the newest finished pretraining run. The directory of a
    Hugging Face model is itself one. Raises FileNotFoundError.
    """
    if str(reference) == "latest":
        return _latest_pretraining(Path(runs_dir))
    path = find_path(reference, runs_dir)
    if (path / "config.json").is_file():
        return path
    for file in (path, RunDirectory(path).last_checkpoint, path / "last.ckpt"):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{path} holds no checkpoint (no checkpoints/last.ckpt, no config.json); pass a .ckpt "
        "file, or the directory of a run that has written one or of a Hugging Face model"
    )


def find_path(reference: str | Path, runs_dir: str | Path) -> Path:
    """Return the file or directory of a path or of a run's name. Raises FileNotFoundError."""
    for path in (Path(reference), Path(runs_dir) / reference):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"there is no checkpoint {str(reference)!r}: neither a file, nor a run directory, "
        f"nor a run under {runs_dir}; pass one of these"
    )


def _latest_pretraining(runs_dir: Path) -> Path:
    finished = []
    for path in find_files(runs_dir, "summary.json"):
        last = RunDirectory(path.parent).last_checkpoint
        try:
            if read_summary(path)["stage"] == "pretrain" and last.is_file():
                finished.append((path.stat().st_mtime_ns, last))
        except Exception as error:  # whatever a file can do to its reader
            log.warning("skipping a run: %s is damaged (%s)", path, type(error).__name__)
    if not finished:
        raise FileNotFoundError(
            f"init_from=latest found no finished pretraining run under {runs_dir}; "
            "pretrain first (python train.py) or pass init_from=PATH"
        )
    return max(finished)[1]


def reached(summary: Mapping[str, Any]) -> str:
    """Return the headline metrics of a stage as text."""
    if "test_accuracy" in summary:
        words = summary["baseline_bag_of_words_test_accuracy"]
        return (
            f"test accuracy {100 * summary['test_accuracy']:.2f} %, macro-F1 "
            f"{summary['test_macro_f1']:.4f} (a bag of words reaches {100 * words:.2f} %); "
            f"validation accuracy {100 * summary['val_accuracy']:.2f} %"
        )
    bits, gzip = summary.get("val_bits_per_byte"), summary.get("gzip_bits_per_byte")
    per_byte = "" if bits is None else f", {bits:.3f} bits per byte"
    baseline = f" (gzip -9 needs {gzip:.3f})" if bits is not None and gzip is not None else ""
    if (loss := summary.get("val_loss")) is None:
        return "no validation loss is in metrics.csv"
    return f"validation loss {loss:.4f}{per_byte}{baseline}"


def cut_samples(path: Path, step: int) -> None:
    """Drop from samples.txt what was written after `step`; the rest need not be text."""
    content = path.read_bytes() if path.is_file() else b""
    for heading in re.finditer(rb"^=== step ([0-9]{1,18}) ===$", content, re.MULTILINE):
        if int(heading[1]) > step:
            os.truncate(path, heading.start())
            return


@contextlib.contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Hold a run's lock, which the kernel releases when its holder dies.

    Forked children (data workers) close their copy, so an orphan never keeps the run locked. Raises
    ValueError where another process holds it.
    """
    with (run_dir / ".lock").open("ab") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.register_at_fork(after_in_child=file.close)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(
                f"{run_dir} is in use by another process; wait for it, or pass name=<new name>"
            ) from error
        yield
