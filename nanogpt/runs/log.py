"""The log of a run: to the terminal and to its train.log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from nanogpt.text import print_line

# Control characters, which a young byte model samples freely, as their visible pictures.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)

log = logging.getLogger("nanogpt")


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send the project's log to the terminal and to a file."""
    console, file = ConsoleHandler(), logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.setLevel(logging.DEBUG)
    console.setLevel(logging.INFO)  # the hashes of checkpoints and the like are for the file
    for handler in (console, file):
        log.addHandler(handler)
    try:
        yield
    finally:
        for handler in (console, file):
            log.removeHandler(handler)
            handler.close()


class ConsoleHandler(logging.Handler):
    """Print log records above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print_text(self.format(record))
        except Exception:
            self.handleError(record)


def print_text(text: str) -> None:
    """Print text above the progress bar; control characters are shown, not sent.

    An output that cannot be written is no error.
    """
    with tqdm.external_write_mode(), suppress(OSError):
        print_line(visible(text), flush=True)


def visible(text: str) -> str:
    """Return text with its control characters, but for newline and tab, as visible pictures."""
    return text.translate(_VISIBLE)
