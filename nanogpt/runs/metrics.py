"""The run's `metrics.csv`: one row per logged optimizer step, floats unrounded."""

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

from nanogpt.disk import naming, write_atomically

COLUMNS = (
    "step",
    "tokens",
    "train/loss",
    "train/grad_norm",
    "learning_rate",
    "tokens_per_s",
    "mfu",
    "wall_s",
    "val/loss",
    "val/bits_per_byte",
)

log = logging.getLogger("nanogpt")


class MetricsFile:
    """Keep a `metrics.csv`; nothing is read or written before the first call.

    A row may come in parts (the training figures of a step, later the validation figures): it is
    extended in place as long as it is the last one.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._columns: list[str] = []
        self._row: dict[str, str] = {}  # the last row of the file
        self._row_at = 0  # byte offset of that row

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add figures to the row of `step`; a column not seen before is added to the header.

        Raises ValueError for a step before the last row's: `cut_after` comes first then.
        """
        if not self._columns:
            self._rewrite(*_parse(self.path))
        last_step = int(self._row.get("step", -1))
        if step < last_step:
            raise ValueError(
                f"{self.path} already reaches step {last_step}, got a row for step {step}; "
                f"cut_after({step}) drops the later rows"
            )
        cells = {name: _cell(value) for name, value in values.items() if name != "step"}
        if not cells.keys() <= set(self._columns):
            _, rows = _parse(self.path)
            self._rewrite(list(dict.fromkeys([*self._columns, *cells])), rows)
        if step > last_step:
            self._row = {"step": str(step)}
            self._row_at = self.path.stat().st_size
        self._row.update(cells)
        with naming(self.path), self.path.open("r+b") as file:
            file.seek(self._row_at)
            file.write(_line([self._row.get(name, "") for name in self._columns]))
            file.truncate()

    def cut_after(self, step: int) -> None:
        """Drop the rows after `step`, the restored one, and damaged lines.

        A file whose header is damaged is moved aside, to `metrics.csv.damaged`.
        """
        if self.path.exists():
            try:
                columns, rows = _parse(self.path)
            except ValueError:
                aside = self.path.with_name(f"{self.path.name}.damaged")
                log.warning("%s is damaged: it is moved to %s and begun anew", self.path, aside)
                self.path.replace(aside)
                return
            self._rewrite(columns, [row for row in rows if int(row[0]) <= step])

    def flush(self) -> None:
        """Force what was appended to the disk itself; call it before a checkpoint is written."""
        if self.path.exists():
            with naming(self.path), self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _rewrite(self, columns: list[str], rows: list[list[str]]) -> None:
        self._columns = columns
        width = len(columns)
        lines = [_line(columns), *(_line([*row, *[""] * (width - len(row))]) for row in rows)]
        write_atomically(self.path, b"".join(lines))
        self._row = dict(zip(columns, rows[-1], strict=False)) if rows else {}
        self._row_at = sum(map(len, lines[:-1])) if rows else 0


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return `(step, value)` pairs by column, columns that were never measured left out.

    Damaged lines are skipped, with a warning. Raises ValueError for a file without a header.
    """
    columns, rows = _parse(path)
    metrics: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, cell in zip(columns[1:], row[1:], strict=True):
            if cell:
                metrics.setdefault(name, []).append((int(row[0]), float(cell)))
    return metrics


def _parse(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the header (the fixed columns for a missing or empty file) and the rows of cells."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    whole, _, _ = text.rpartition("\n")
    if not whole:
        return list(COLUMNS), []
    columns, *rows = map(_cells, whole.split("\n"))
    if columns[:1] != ["step"]:
        raise ValueError(
            f"{path} begins with {columns[:1]}, a metrics file with ['step']; move it elsewhere"
        )
    sound = [_is_sound(row, len(columns)) for row in rows]
    if n_damaged := sound[:-1].count(False):  # a kill may tear the last row, which is extended
        log.warning("%s has %s damaged line(s), which are skipped", path, n_damaged)
    return columns, [row for row, is_sound in zip(rows, sound, strict=True) if is_sound]


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:  # a NUL, a cell without end
        return []


def _is_sound(row: Sequence[str], n_columns: int) -> bool:
    """Return whether a row is a step and figures, or nothing where a figure was not measured."""
    try:
        [float(cell) for cell in row[1:] if cell]
    except ValueError:
        return False
    return len(row) == n_columns and len(row[0]) < 19 and row[0].isdecimal()


def _line(cells: Sequence[str]) -> bytes:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _cell(value: float) -> str:
    """Return the shortest text that reads back as the same number."""
    return repr(int(value)) if isinstance(value, int) else repr(float(value))
