"""Runs that end as by a power cut: killed at a call of a function, in a process of their own.

The process is a fork of one that has imported what a run needs, which takes longer than the run.
"""

import functools
import importlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import nanogpt.data.module
import nanogpt.training.trainer  # noqa: F401, as the line before: for the forks
import train

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def kill_run(where: str, count: int, arguments: list[str], folder: Path) -> None:
    """Run `train.py` in a folder until the count-th call of a function kills it."""
    process = CONTEXT.Process(target=_run, args=(where, count, arguments, folder))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL


def _run(where: str, count: int, arguments: list[str], folder: Path) -> None:
    module, _, name = where.rpartition(".")
    owner = importlib.import_module(module)
    function, calls = getattr(owner, name), iter(range(1, count))

    @functools.wraps(function)
    def dying(*args: Any, **keys: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **keys)

    setattr(owner, name, dying)
    os.chdir(folder)
    sys.argv = [str(Path(train.__file__)), *arguments]
    sys.exit(train.main(arguments))
