"""What the commands `python -m nanogpt....` share: how they end."""

import os
import sys
from collections.abc import Callable

INTERRUPTED = 130

# What bad input raises; torch says RuntimeError or AssertionError of a device that is not there.
EXPECTED: tuple[type[Exception], ...] = (
    ValueError,
    OSError,
    ImportError,
    RuntimeError,
    AssertionError,
)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def run_command(
    name: str,
    work: Callable[[], None],
    *,
    say: Callable[[Exception], str] = first_line,
    also: tuple[type[Exception], ...] = (),
    interrupted: str = "",
) -> int:
    """Do a command's work and return its exit code; what goes wrong is said in one sentence.

    `say` words an error, `also` are kinds that bad input raises besides `EXPECTED`, and
    `interrupted` is said on Ctrl+C. A reader who has seen enough of the output is no error.
    """
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except EXPECTED + also as error:
        sys.stdout.flush()
        print(f"{name}: {say(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if interrupted:
            print(f"{name}: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    return 0
