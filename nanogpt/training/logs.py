"""The log without other libraries' advice."""

import logging
import warnings

# Lightning's advice that does not fit: the loader's items are steps, and checkpoints are ours.
MISFITTING = (
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*dataloader is not resumable.*",
    ".*was configured so validation will run.*",
    ".*exists and is not empty.*",
    ".*recommended to use `sync_dist=True`.*",
    ".*LeafSpec.*",
    ".*broadcast_buffers.*",
    ".*`broadcast_buffers` is deprecated.*",
)


def quieten_lightning() -> None:
    """Silence Lightning's progress notes and the advice that does not fit."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # their tables
    for message in MISFITTING:
        warnings.filterwarnings("ignore", message=message)
