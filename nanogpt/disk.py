"""What a power cut must not undo."""

import os
from pathlib import Path


def sync_directory(directory: Path) -> None:
    """Put the names of a folder's files on the disk, where the system can: a rename then lasts."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
