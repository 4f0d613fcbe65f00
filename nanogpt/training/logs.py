"""The log without other libraries' advice."""

import logging
import warnings


def quieten_lightning() -> None:
    """Silence advice that does not fit: loader, steps and checkpoints are not Lightning's."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
