"""Numbers, durations, lists and errors as text: formatted and printed in one way."""

import sys
from collections.abc import Sequence


def format_number(number: float, digits: int = 3) -> str:
    """Return a number in a few significant digits, with an SI prefix from a thousand on.

    >>> [format_number(n) for n in (7, 0.25, 1234, 124_439_808, 0.0003)]
    ['7', '0.25', '1.23k', '124M', '3e-4']
    """
    rounded = float(f"{number:.{digits}g}")  # 999,999 is 1M and not 1000k
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= scale:
            return f"{rounded / scale:.{digits}g}{prefix}"
    if 0 < abs(rounded) < 1e-3:
        mantissa, _, exponent = f"{rounded:.{digits - 1}e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{rounded:.{digits}g}"


def format_percent(fraction: float) -> str:
    """Return a fraction as a percentage, with a decimal below ten: `38 %`, `9.1 %`."""
    digits = 0 if 100 * abs(fraction) >= 9.95 else 1
    return f"{100 * fraction:.{digits}f} %"


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units: `45 s`, `1 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60:02} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"


def format_list(items: Sequence[str], separator: str = ", ", limit: int = 10) -> str:
    """Return the first items of a list and the number of the others.

    >>> format_list(["1", "2", "3", "4"], limit=2)
    '1, 2, and 2 more'
    """
    more = [f"and {len(items) - limit:,} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def print_line(text: str = "", end: str = "\n", *, flush: bool = False) -> None:
    """Print to standard output; characters that its encoding lacks become question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end=end, flush=flush)
