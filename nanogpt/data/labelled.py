"""Labelled texts of one's own: TSV, CSV or JSON Lines, one example per row, any classes."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from nanogpt.command import expand_home
from nanogpt.data.records import BadRecord, check_text, decoded, json_records, kind_of, read_all
from nanogpt.data.source import Source, local_path
from nanogpt.data.splits import Example, Splits, examples_sha256, split
from nanogpt.tokenizer import SURROGATE
from nanogpt.values import CHECKED, Count, FilePath, Flag, Seed, Share, Text

Cells = Mapping[str, Any]  # by the names of the columns
Row = tuple[str, Cells | BadRecord]  # with its place, such as `line 3`

LONGEST_CELL = 2**27  # characters; csv's own limit of 131,072 is less than a long article


@dataclass(frozen=True, config=CHECKED)
class LabelledTexts(Source):
    """A labelled file, and how it is split for training.

    `balance` leaves out what a class has more than the smallest one; the left-over examples are
    tested on apart. `max_examples` bounds what is used of the rest, the classes in proportion. With
    `skip_bad`, rows that cannot be read are left out, and counted in the log. To stages that read
    text, an example is its text.
    """

    path: FilePath | None = None
    text_column: Text = "text"
    label_column: Text = "label"
    balance: Flag = False
    max_examples: Count | None = None
    val_fraction: Share = 0.1
    test_fraction: Share = 0.2
    split_seed: Seed = 0
    skip_bad: Flag | None = None
    name: Text = "labelled"

    def examples(self) -> list[Example]:
        """Return the examples in the order of the file."""
        path = local_path(self.path, self.name, "a .tsv, .csv or .jsonl file")
        columns = (self.text_column, self.label_column)
        return read_examples(path, *columns, skip_bad=bool(self.skip_bad))

    def splits(self) -> Splits:
        """Return the examples in splits that depend on them and on `split_seed` alone."""
        return split(
            self.examples(),
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            balance=self.balance,
            max_examples=self.max_examples,
            seed=self.split_seed,
        )

    def documents(self, skip: int = 0) -> Iterator[str | None]:
        """Yield the texts after the first `skip`, those of all splits."""
        for example in self.examples()[skip:]:
            yield example.text

    def fingerprint(self) -> str:
        return examples_sha256(self.examples())[:16]

    def description(self) -> dict[str, Any]:
        return {"path": str(self.path)}


def read_examples(
    path: str | Path,
    text_column: str = "text",
    label_column: str = "label",
    *,
    skip_bad: bool = False,
) -> list[Example]:
    """Return the examples of a labelled file, in its order.

    A .csv file has a header and quotes as in spreadsheets, a .jsonl file an object per line. Any
    other file is TSV, where a quote is a character like others; without a header that names both
    columns its rows are label, tab, text (as in the SMS Spam Collection). Labels are texts, whole
    numbers, or in JSON true and false.

    Raises ValueError, naming file and line, for rows without text or label, which are left out
    where `skip_bad`.
    """
    path = Path(expand_home(str(path)))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; pass a labelled .tsv, .csv or .jsonl file")
    columns = (text_column, label_column)
    read = partial(_example, text_column=text_column, label_column=label_column)
    examples = read_all(path, _rows(path, columns), read, skip_bad=skip_bad)
    if not examples:
        raise ValueError(f"{path} has no examples; pass a file with a text and a label per row")
    return examples


def _rows(path: Path, columns: tuple[str, str]) -> Iterator[Row]:
    """Yield the rows of a file, each with its place or what is wrong with it."""
    if path.suffix.lower() in (".jsonl", ".json"):
        yield from json_records(path)
        return
    check_text(path)
    read = _csv_rows if path.suffix.lower() == ".csv" else _tsv_rows
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        bad: dict[int, BadRecord] = {}
        yield from read(_noting(file, bad), bad, path, columns)


def _noting(lines: Iterable[str], bad: dict[int, BadRecord]) -> Iterator[str]:
    """Yield the lines, and note by number those that hold bytes other than UTF-8."""
    for number, line in enumerate(lines, start=1):
        if not line.isascii():
            text = decoded(line.encode("utf-8", "surrogateescape"))
            if isinstance(text, BadRecord):
                bad[number] = text
        yield line


def _csv_rows(
    lines: Iterator[str], bad: Mapping[int, BadRecord], path: Path, columns: tuple[str, str]
) -> Iterator[Row]:
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        reader = csv.reader(lines, strict=True)
        header: list[str] | None = None
        while True:
            first = reader.line_num + 1
            row: Mapping[str, str] | BadRecord | None = None
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if reader.line_num > first:  # other rows may be lost with it
                    raise ValueError(
                        f"{path}, line {first} opens a quote that ends nowhere up to line "
                        f"{reader.line_num} ({error}); close it"
                    ) from error
                row = BadRecord(f"is no CSV ({error})", "mend its quotes")
            else:
                if cells is None:
                    break
                if header is None:
                    header = _checked_header(cells, path, columns)
                    continue
                row = _named(cells, header) if cells else None
            number = next((n for n in range(first, reader.line_num + 1) if n in bad), first)
            row = bad.get(number, row)
            if row is not None:
                yield f"line {number}", row
        if header is None:
            _checked_header([], path, columns)
    finally:
        csv.field_size_limit(before)


def _tsv_rows(
    lines: Iterator[str], bad: Mapping[int, BadRecord], path: Path, columns: tuple[str, str]
) -> Iterator[Row]:
    header: list[str] = []
    for number, line in enumerate(lines, start=1):
        cells = line.rstrip("\r\n").split("\t")
        if not header:
            has_header = set(columns) <= set(cells)
            header = cells if has_header else [columns[1], columns[0]]  # label, text
            if has_header:
                continue
            if len(cells) != 2:
                _checked_header(cells, path, columns)
        if line.strip():
            yield f"line {number}", bad[number] if number in bad else _named(cells, header)


def _checked_header(header: list[str], path: Path, columns: tuple[str, str]) -> list[str]:
    for column in columns:
        if column not in header:
            names = ", ".join(header).encode("utf-8", "replace").decode()
            raise ValueError(
                f"{path} has no column {column!r} (its first line has {names}); name "
                f"the columns in the first line, or pass text_column and label_column"
            )
    return header


def _named(cells: list[str], header: list[str]) -> Mapping[str, str] | BadRecord:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    names = ", ".join(header)
    return BadRecord(f"has {len(cells)} cells and {len(header)} are expected ({names})")


def _example(row: Any, *, text_column: str, label_column: str) -> Example:
    if not isinstance(row, dict):
        raise BadRecord(f"is no JSON object but {kind_of(row)}", "write one object per line")
    for column in (text_column, label_column):
        if column not in row:
            raise BadRecord(
                f"has no {column!r} (it has {', '.join(row)})",
                "mend it, or pass text_column and label_column",
            )
    text, label = row[text_column], row[label_column]
    if not isinstance(text, str) or not text.strip():
        raise BadRecord(f"has no text under {text_column!r} ({_found(text)})")
    if isinstance(label, str):
        label = label.strip()
    elif isinstance(label, int):
        label = json.dumps(label)
    if not isinstance(label, str) or not label:
        raise BadRecord(
            f"has no label under {label_column!r} ({_found(label)}), a text or a whole number"
        )
    if SURROGATE.search(label):
        raise BadRecord(f"has no label under {label_column!r}: {label!r} has half a character")
    return Example(text, label)


def _found(value: Any) -> str:
    return "it is empty" if isinstance(value, str) else f"{kind_of(value)} is there"
