"""What a person sees of a preparation: an estimate, then a bar, or a line now and then."""

import logging
import shutil
import sys
import time
from pathlib import Path

from tqdm import tqdm

from nanogpt.data.source import Extent
from nanogpt.data.writer import Progress

ESTIMATE_AFTER_S = 2.0  # when the pace is known; what takes less needs no estimate
LOG_EVERY_S = 30.0  # where no terminal shows the bar
BAR_EVERY_S = 0.25

log = logging.getLogger(__name__)


class Meter:
    """Shows tokens, tokens/s and the time left, as a context around the work.

    `extent` says how much there is, where that is known; `limit` is the number of training tokens
    to stop after; `token_bytes` the size of a token in a shard.
    """

    def __init__(
        self,
        directory: Path,
        extent: Extent | None,
        progress: Progress,
        *,
        limit: int | None,
        token_bytes: int,
    ) -> None:
        self._directory = directory
        self._extent = extent
        self._progress = progress
        self._limit = limit
        self._token_bytes = token_bytes
        self._bar: tqdm | None = None

    def __enter__(self) -> "Meter":
        self._began, self._before = time.monotonic(), self._n_tokens
        self._due = self._began + ESTIMATE_AFTER_S
        self._estimated = False
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self) -> None:
        """Show how far the writing has come, if it is time to."""
        now = time.monotonic()
        if now < self._due:
            return
        pace = (self._n_tokens - self._before) / (now - self._began)
        if not self._estimated:
            self._estimated = True
            self._estimate(pace)
            if sys.stderr.isatty():
                self._bar = _bar(self._n_tokens)
        elif self._bar is None:
            log.info("%s tokens%s", _short(self._n_tokens), self._left(pace))
        if self._bar is not None:
            self._bar.total = self._total()
            self._bar.update(self._n_tokens - self._bar.n)
        self._due = now + (LOG_EVERY_S if self._bar is None else BAR_EVERY_S)

    def _estimate(self, pace: float) -> None:
        """Say what the whole will take, and warn where the disk is too small for it."""
        total = self._total()
        if total is None:
            return
        n_bytes = (total - self._n_tokens) * self._token_bytes
        free = shutil.disk_usage(self._directory).free
        log.info(
            "about %s tokens%s: %sB on the disk%s",
            _short(total),
            self._download(),
            _short(n_bytes),
            self._left(pace),
        )
        if n_bytes > free:
            log.warning(
                "%s has %sB free and needs about %sB: it will stop there, keep what it has, and go "
                "on when the command is issued again with more room",
                self._directory,
                _short(free),
                _short(n_bytes),
            )

    def _download(self) -> str:
        if self._extent is None or not self._extent.download_bytes:
            return ""
        return f" from {_short(self._extent.download_bytes)}B in {self._extent.files} files"

    def _left(self, pace: float) -> str:
        total = self._total()
        if total is None or not pace:
            return ""
        seconds = int((total - self._n_tokens) / pace)
        hours, minutes = seconds // 3600, seconds // 60 % 60
        left = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds % 60:02d} s"
        return f", {left} left at {_short(pace)} tokens/s"

    @property
    def _n_tokens(self) -> int:
        return sum(split.tokens for split in self._progress.splits.values())

    def _total(self) -> int | None:
        """Return how many tokens there will be, judged by those there are."""
        n_bytes = sum(split.bytes for split in self._progress.splits.values())
        totals = [] if self._limit is None else [self._limit]
        if self._extent is not None and n_bytes:
            totals.append(self._extent.text_bytes * self._n_tokens // n_bytes)
        return max(min(totals), self._n_tokens) if totals else None


def _bar(n_tokens: int) -> tqdm:
    return tqdm(
        initial=n_tokens, unit=" tokens", unit_scale=True, smoothing=0.05, dynamic_ncols=True
    )


def _short(number: float) -> str:
    """Return a number with three digits: 1.23 k, 45.6 M, 7.89 G."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.3g} {unit}".rstrip() if unit else f"{number:.0f} "
        number /= 1000
    return f"{number:.3g} G"
