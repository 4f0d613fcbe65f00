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

TAIL_BYTES = 2**14  # of the file whose rows are extended in place

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
        self._header_bytes = 0
        self._skipped: set[str] = set()

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Add metrics to the row of `step`; a column not seen before is added to the header.

        Values that are not numbers are skipped, with one warning per name. The rows from `step` on
        are written by one call, so that a kill leaves whole rows.
        """
        if not self._columns:
            self._rewrite(*_parse(self.path))
        cells = self._numbers(values)
        with naming(self.path), self.path.open("r+b") as file:
            start = max(self._header_bytes, self.path.stat().st_size - TAIL_BYTES)
            file.seek(start)
            if start > self._header_bytes:
                start += len(file.readline())  # the rest of a row
            lines = file.read().decode().splitlines()
            rows = [dict(zip(self._columns, row, strict=True)) for row in csv.reader(lines)]
            is_recent = start == self._header_bytes or (rows and step >= int(rows[0]["step"]))
            if cells.keys() <= set(self._columns) and is_recent:
                rows = _merged(rows, step, cells)
                tail = [_line([row.get(name, "") for name in self._columns]) for row in rows]
                first = next(i for i, row in enumerate(rows) if int(row["step"]) == step)
                file.seek(start + sum(map(len, tail[:first])))
                file.write(b"".join(tail[first:]))
                file.truncate()
                return
        columns, table = _parse(self.path)
        rows = [dict(zip(columns, row, strict=True)) for row in table]
        columns = list(dict.fromkeys([*columns, *cells]))
        rows = _merged(rows, step, cells)
        self._rewrite(columns, [[row.get(name, "") for name in columns] for row in rows])

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
        header, *lines = [_line(cells) for cells in (columns, *rows)]
        self._columns, self._header_bytes = columns, len(header)
        with replacing(self.path) as file:
            file.writelines([header, *lines])


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


def _merged(
    rows: Sequence[dict[str, str]], step: int, cells: Mapping[str, str]
) -> list[dict[str, str]]:
    """Return rows in the order of their steps, with cells added to that of `step`."""
    by_step = {int(row["step"]): row for row in rows}
    by_step.setdefault(step, {"step": str(step)}).update(cells)
    return [by_step[n] for n in sorted(by_step)]


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
    """Return whether a row is a step and numbers, or nothing where a metric was not measured."""
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
