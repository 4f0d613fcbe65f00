"""The log of a run: to the terminal and to its train.log."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

# control characters, which a young byte model samples freely, as their visible pictures
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)

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


class ConsoleHandler(logging.Handler):
    """Send log records through `say`, so that they and the bar leave each other whole."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(self.format(record))
        except Exception:
            self.handleError(record)


def say(text: str) -> None:
    """Print text to standard output, above the bar where there is one.

    Control characters are shown, not sent, and what the terminal's encoding lacks is escaped:
    generated text neither disturbs a terminal nor stops a run.
    """
    encoding = sys.stdout.encoding or "utf-8"
    tqdm.write(visible(text).encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def visible(text: str) -> str:
    """Return text with its control characters, but for newline and tab, as visible pictures."""
    return text.translate(_VISIBLE)
