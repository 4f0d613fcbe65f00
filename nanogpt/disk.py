"""Files and directories: locks, durable renames, bounded reads, the names of runs."""

import json
import logging
import os
import shutil
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any, BinaryIO

from filelock import AcquireReturnProxy, FileLock, Timeout

PATIENCE_S = 1.0  # a longer wait is logged
log = logging.getLogger("nanogpt")


def wait_for_lock(path: Path, work: str) -> AcquireReturnProxy:
    """Acquire the lock of a file; log the work of the process that holds it, if that takes long."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=PATIENCE_S)
    except Timeout:
        log.info("waiting for the process that %s", work)
        return lock.acquire()


@contextmanager
def replacing(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that replaces `path` as a whole once the block ends.

    A reader, also after a power cut, finds the old file or the new one: the content is synchronised
    to the disk, then renamed, then its directory is synchronised. A block that raises leaves `path`
    as it was. Text is UTF-8. An OSError names `path`.

    >>> with replacing(path) as file:
    ...     file.write(content)
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path):
            with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: object, indent: int | None = 2) -> None:
    """Write plain values as JSON; the file is replaced as a whole."""
    with replacing(path, "w") as file:
        json.dump(value, file, indent=indent)
        file.write("\n")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise the system's errors with the name of a file; that of a full disk has none."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_directory(directory: Path) -> None:
    """Put the names of a folder's files on the disk, where the system can: a rename then lasts."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def link_atomically(source: Path, target: Path) -> None:
    """Make `target` a second name of `source`; a copy where the file system has no hard links."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with source.open("rb") as old, replacing(target) as new:
            shutil.copyfileobj(old, new, 2**20)
    else:
        os.replace(temporary, target)
        sync_directory(target.parent)


def find_files(root: Path, *names: str) -> Iterator[Path]:
    """Yield every file of these names under a directory, but for links to other directories."""
    for directory, _, files in os.walk(root):
        yield from (Path(directory) / name for name in names if name in files)


def open_regular(path: Path, max_bytes: int) -> BinaryIO:
    """Open a file for reading. Raises ValueError for more than `max_bytes` and for devices, FIFOs.

    Opening a FIFO would block until another process writes to it.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > max_bytes:
        raise ValueError(f"{status.st_size:,} bytes; at most {max_bytes:,} are read")
    return path.open("rb")


def display_name(path: PurePath) -> str:
    """Return a path as text in NFC, with `/`; bytes that are not UTF-8 are written as `\\xe9`."""
    text = os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)
