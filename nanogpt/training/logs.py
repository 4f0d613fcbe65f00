"""The log: to the terminal, to the run's train.log, and without other libraries' advice."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

from nanogpt.training.progress import ConsoleHandler

log = logging.getLogger("nanogpt")


def log_to(path: Path) -> Callable[[], None]:
    """Send the project's log to the terminal and to a file; return what undoes it."""
    console, file = ConsoleHandler(), logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.setLevel(logging.DEBUG)
    console.setLevel(logging.INFO)  # the hashes of checkpoints and the like are for the file
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
