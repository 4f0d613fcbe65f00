"""What all commands share: their paths, their options, and how they end."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any

from nanogpt.text import first_line

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
# Options and configuration keys that name a file or directory, as *path and *dir do.
PATHS = ("checkpoint", "checkpoints", "dataset", "init_from", "models", "pretokenized")

# Of bad input; torch raises RuntimeError or AssertionError for a device that is not there.
EXPECTED: tuple[type[Exception], ...] = (
    ValueError,
    OSError,
    ImportError,
    RuntimeError,
    AssertionError,
    MemoryError,
)


OUT_OF_MEMORY = re.compile(
    "out of memory|not enough memory|n.t allocate memory|cannot allocate|ALLOC_FAILED", re.I
)


def out_of_memory(error: BaseException) -> str:
    """Return a description of the error where memory ran out, of a machine or device, else ""."""
    message = first_line(error)
    known = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and OUT_OF_MEMORY.search(message)
    )
    if not known:
        return ""
    detail = re.split(r"(?<=\.) (?=[A-Z])", message.rpartition("DefaultCPUAllocator: ")[2])[:2]
    return f"out of memory ({' '.join(detail).rstrip('.')})"


def is_path(key: str) -> bool:
    """Return whether the value of an option or a configuration key names a file or directory."""
    last = key.rpartition(".")[2]
    return last.endswith(("path", "dir")) or last in PATHS


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line, with `~` expanded in paths, defaults from the environment included."""
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, Path):
            setattr(options, name, Path(expanduser(value)))
        elif value and is_path(name):
            many = isinstance(value, list)
            setattr(options, name, [*map(expanduser, value)] if many else expanduser(value))
    return options


def make_parser(command: str, description: str, *shared: str) -> argparse.ArgumentParser:
    """Return the parser of a command, with arguments that several have, which are named.

    The environment sets some defaults.
    """
    runs_dir, data_dir = (
        {"type": Path, "default": Path(os.environ.get(variable, default))}
        for variable, default in (("NANOGPT_RUNS_DIR", "runs"), ("NANOGPT_DATA_DIR", "data"))
    )
    known: dict[str, dict[str, Any]] = {
        "checkpoint": {"help": "a .ckpt, a run directory, or the name of a run"},
        "--device": {"default": "cpu", "choices": ("cpu", "cuda", "mps")},
        "--allow-module": {
            "action": "append",
            "default": [],
            "metavar": "NAME",
            "help": "import this package where a checkpoint names a block of it (model.block)",
        },
        "--runs-dir": {**runs_dir, "help": "of runs (default runs, or NANOGPT_RUNS_DIR)"},
        "--data-dir": {**data_dir, "help": "of data (default data, or NANOGPT_DATA_DIR)"},
    }
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=description)
    for name in shared:
        parser.add_argument(name, **known[name])
    return parser


def check_files(options: argparse.Namespace, *names: str) -> None:
    """Raise ValueError for an option whose file cannot be written, before any work."""
    for name in names:
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"--{name} {path} is no file of an existing folder; name one")


def flush_output() -> None:
    """Flush standard output and standard error.

    One that cannot be written leads to the null device from then on: Python, which flushes again
    when it exits, would end with another exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_command(
    name: str,
    work: Callable[[], None],
    *,
    explain: Callable[[Exception], str] = first_line,
    also: tuple[type[Exception], ...] = (),
    interrupted: str = "",
) -> int:
    """Run a command's work and return its exit code; an error is printed as one sentence.

    `explain` words an error, `also` are classes of bad input in addition to `EXPECTED`, and
    `interrupted` is printed on Ctrl+C. A reader of the output that leaves ends the work early,
    which is no error.
    """
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:
        flush_output()
    except EXPECTED + also as error:
        flush_output()
        if short := out_of_memory(error):
            message = f"{short}; pass a smaller model, batch or file, or free memory"
        else:
            message = explain(error)
        print(f"{name}: {message}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        if interrupted:
            print(f"{name}: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    return 0
