"""The run's `metrics.csv`: one row per logged optimizer step, floats unrounded."""

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from nanogpt.disk import naming, replacing

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

TAIL_ROWS = 8  # at the end of the file, which are extended in place

Rows = dict[int, dict[str, str]]  # cells by column, by step

log = logging.getLogger("nanogpt")


class MetricsFile:
    """Write a `metrics.csv`; nothing is read or written before the first call.

    A row may come in parts (the training metrics of a step, later those of its validation), also
    after rows of later steps: Lightning labels what callbacks log one step back. The last rows are
    extended in place; an earlier row or a new column replaces the file as a whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._columns: list[str] = []
        self._tail: Rows = {}
        self._tail_start = 0  # bytes
        self._skipped: set[str] = set()

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Add metrics to the row of `step`; a column not seen before is added to the header.

        Values that are not numbers are skipped, with one warning per name. The last rows are
        written by one call, so that a kill leaves whole rows.
        """
        if not self._columns:
            self._rewrite(*_parse(self.path))
        cells = {**self._numbers(values), "step": str(step)}
        if step < min(self._tail, default=step) or not cells.keys() <= set(self._columns):
            columns, rows = _parse(self.path)
            rows.setdefault(step, {}).update(cells)
            self._rewrite(list(dict.fromkeys([*columns, *cells])), rows)
            return
        self._tail.setdefault(step, {}).update(cells)
        steps = sorted(self._tail)
        lines = [self._line(self._tail[n]) for n in steps]
        with naming(self.path), self.path.open("r+b") as file:
            file.seek(self._tail_start)
            file.write(b"".join(lines))
            file.truncate()
        if len(steps) > TAIL_ROWS:
            del self._tail[steps[0]]
            self._tail_start += len(lines[0])

    def _numbers(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Return the cells of the values that are numbers, under names that fit in a header."""
        cells = {}
        for name, value in values.items():
            try:  # of the shortest text that reads back as the same number
                cell = repr(int(value) if isinstance(value, int) else float(value))
            except (TypeError, ValueError, RuntimeError):  # the last of tensors
                cell = ""
            if cell and name.isprintable() and not isinstance(value, str):
                cells[name] = cell
            elif name not in self._skipped:
                self._skipped.add(name)
                log.warning("%s: %r is left out, it is not a number", self.path, name)
        return cells

    def cut_after(self, step: int) -> None:
        """Drop the rows after `step`, the restored one, and damaged lines.

        Raises ValueError for a file without a header.
        """
        if self.path.exists():
            columns, rows = _parse(self.path)
            self._rewrite(columns, {n: row for n, row in rows.items() if n <= step})

    def flush(self) -> None:
        """Force what was appended to the disk itself; call it before a checkpoint is written."""
        if self.path.exists():
            with naming(self.path), self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _rewrite(self, columns: list[str], rows: Rows) -> None:
        self._columns, steps = columns, sorted(rows)
        self._tail = {n: rows[n] for n in steps[-TAIL_ROWS:]}
        with replacing(self.path) as file:
            file.write(self._line(dict(zip(columns, columns, strict=True))))
            file.writelines(self._line(rows[n]) for n in steps[:-TAIL_ROWS])
            self._tail_start = file.tell()
            file.writelines(map(self._line, self._tail.values()))

    def _line(self, row: Mapping[str, str]) -> bytes:
        text = StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerow(row)
        return text.getvalue().encode()


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return `(step, value)` pairs by column, columns that were never measured left out.

    Damaged lines are skipped, with a warning. Raises ValueError for a file without a header.
    """
    columns, rows = _parse(path)
    points = {
        name: [(step, float(row[name])) for step, row in rows.items() if row[name]]
        for name in columns[1:]
    }
    return {name: values for name, values in points.items() if values}


def _parse(path: Path) -> tuple[list[str], Rows]:
    """Return the header (the fixed columns for a missing or empty file) and the rows."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    header, *lines = text.split("\n")[:-1] or [",".join(COLUMNS)]  # the last may be torn
    if header.split(",")[0] != "step":
        raise ValueError(
            f"{path} begins with {header.split(',')[:1]}, a metrics file with ['step']; "
            "move it elsewhere"
        )
    columns = next(csv.reader([header]))
    sound = [row for row in (line.split(",") for line in lines) if _is_sound(row, len(columns))]
    if len(sound) < len(lines):
        log.warning("%s has %s damaged line(s), which are skipped", path, len(lines) - len(sound))
    return columns, {int(row[0]): dict(zip(columns, row, strict=True)) for row in sound}


def _is_sound(row: Sequence[str], n_columns: int) -> bool:
    """Return whether a row is a step and numbers, or nothing where a metric was not measured."""
    try:
        [float(cell) for cell in row[1:] if cell]
    except ValueError:
        return False
    return len(row) == n_columns and len(row[0]) < 19 and row[0].isdecimal()
