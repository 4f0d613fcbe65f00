"""The run's `metrics.csv`: one row per logged optimizer step, floats unrounded."""

import csv
import logging
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

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

TAIL = 8  # rows that are extended in place

log = logging.getLogger("nanogpt")


@dataclass
class _Row:
    step: int
    at: int  # byte offset in the file
    cells: dict[str, str]


class MetricsFile:
    """Keep a `metrics.csv`; nothing is read or written before the first call.

    A row may come in parts (the training figures of a step, later the validation figures), also
    after rows of later steps: Lightning labels what callbacks log one step back. The last rows are
    extended in place; an earlier row or a new column replaces the file as a whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._columns: list[str] = []
        self._tail: list[_Row] = []  # the last rows of the file, ascending
        self._skipped: set[str] = set()

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Add figures to the row of `step`; a column not seen before is added to the header.

        Values that are not numbers are skipped, with one warning per name.
        """
        if not self._columns:
            self._rewrite(*_parse(self.path))
        cells = self._numbers(values)
        if not cells.keys() <= set(self._columns) or (self._tail and step < self._tail[0].step):
            self._merge(step, cells)
        else:
            self._extend(step, cells)

    def _extend(self, step: int, cells: Mapping[str, str]) -> None:
        """Add cells to the row of a step among the last ones, or make that row."""
        index = bisect_left(self._tail, step, key=lambda row: row.step)
        if index == len(self._tail) or self._tail[index].step > step:
            at = self._tail[index].at if index < len(self._tail) else self.path.stat().st_size
            self._tail.insert(index, _Row(step, at, {"step": str(step)}))
        self._tail[index].cells.update(cells)
        self._write_from(index)

    def _numbers(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Return the cells of the values that are numbers, under names that fit in a header."""
        cells = {}
        for name, value in values.items():
            cell = _cell(value) if name.isprintable() else None
            if cell is not None and name != "step":
                cells[name] = cell
            elif cell is None and name not in self._skipped:
                self._skipped.add(name)
                log.warning("%s: %r is left out, it is not a number", self.path, name)
        return cells

    def _write_from(self, index: int) -> None:
        """Write the last rows from one on, by one call, so that a kill leaves whole rows."""
        rows = self._tail[index:]
        lines, at = [], rows[0].at
        for row in rows:
            row.at = at
            lines.append(_line([row.cells.get(name, "") for name in self._columns]))
            at += len(lines[-1])
        with naming(self.path), self.path.open("r+b") as file:
            file.seek(rows[0].at)
            file.write(b"".join(lines))
            file.truncate()
        del self._tail[:-TAIL]

    def _merge(self, step: int, cells: Mapping[str, str]) -> None:
        """Add cells to a row anywhere in the file; it is replaced as a whole."""
        columns, rows = _parse(self.path)
        by_step = {int(row[0]): dict(zip(columns, row, strict=True)) for row in rows}
        by_step.setdefault(step, {"step": str(step)}).update(cells)
        columns = list(dict.fromkeys([*columns, *cells]))
        self._rewrite(
            columns, [[by_step[n].get(name, "") for name in columns] for n in sorted(by_step)]
        )

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
        self._columns, self._tail = columns, []
        header, *lines = [_line(cells) for cells in (columns, *rows)]
        write_atomically(self.path, b"".join([header, *lines]))
        at = len(header) + sum(map(len, lines[:-TAIL]))
        for row, line in zip(rows[-TAIL:], lines[-TAIL:], strict=True):
            self._tail.append(_Row(int(row[0]), at, dict(zip(columns, row, strict=True))))
            at += len(line)


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


def _cell(value: Any) -> str | None:
    """Return the shortest text that reads back as the same number, None for what is no number."""
    if isinstance(value, int):
        return repr(int(value))
    try:
        return None if isinstance(value, str) else repr(float(value))
    except (TypeError, ValueError, RuntimeError):  # the last of tensors
        return None
