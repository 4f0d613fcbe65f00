"""Labelled texts of one's own: TSV, CSV or JSON Lines, one example per row, any classes."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nanogpt.data.source import Source
from nanogpt.data.splits import Example, Splits, examples_sha256, split

LONGEST_CELL = 2**27  # characters; csv's own limit of 131,072 is less than a long article


@dataclass(frozen=True)
class LabelledTexts(Source):
    """A labelled file, and how it is split for training.

    `balance` leaves out what a class has more than the smallest one; the left-over examples are
    tested on apart. `max_examples` bounds what is used of the rest, the classes in proportion. To
    stages that read text, an example is its text.
    """

    path: str | Path | None = None
    text_column: str = "text"
    label_column: str = "label"
    balance: bool = False
    max_examples: int | None = None
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0
    name: str = "labelled"

    def examples(self) -> list[Example]:
        """Return the examples in the order of the file."""
        if self.path is None:
            raise ValueError(f"data={self.name} needs data.path=<a .tsv, .csv or .jsonl file>")
        return read_examples(self.path, self.text_column, self.label_column)

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
    path: str | Path, text_column: str = "text", label_column: str = "label"
) -> list[Example]:
    """Return the examples of a labelled file, in its order.

    A .csv file has a header and quotes as in spreadsheets, a .jsonl file an object per line. Any
    other file is TSV, where a quote is a character like others; without a header that names both
    columns its rows are label, tab, text (as in the SMS Spam Collection). Labels are texts, whole
    numbers, or in JSON true and false.

    Raises ValueError, naming file and line, for a row without text or label.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; pass a labelled .tsv, .csv or .jsonl file")
    columns = (text_column, label_column)
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            examples = [_example(row, where, *columns) for where, row in _rows(file, path, columns)]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error.reason}); convert it") from error
    if not examples:
        raise ValueError(f"{path} has no examples; pass a file with a text and a label per row")
    return examples


def _rows(
    file: IO[str], path: Path, columns: tuple[str, str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each row by column names, and where it stands."""
    if path.suffix.lower() in (".jsonl", ".json"):
        return _json_rows(file, path)
    if path.suffix.lower() == ".csv":
        return _csv_rows(file, path, columns)
    return _tsv_rows(file, path, columns)


def _json_rows(file: IO[str], path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(file, start=1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is no JSON ({error.msg}); mend it") from error
        if isinstance(row, dict):
            yield where, row
        elif line.strip():
            raise ValueError(f"{where} is no JSON object; write one object per line")


def _csv_rows(
    file: IO[str], path: Path, columns: tuple[str, str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        _check_header(header, path, columns)
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if cells:
                yield where, _named(cells, header, where)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is no CSV ({error}); mend it") from error
    finally:
        csv.field_size_limit(before)


def _tsv_rows(
    file: IO[str], path: Path, columns: tuple[str, str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    header: list[str] = []
    for number, line in enumerate(file, start=1):
        cells = line.rstrip("\r\n").split("\t")
        where = f"{path}, line {number}"
        if not header:
            has_header = set(columns) <= set(cells)
            header = cells if has_header else [columns[1], columns[0]]  # label, text
            if has_header:
                continue
            if len(cells) != 2:
                _check_header(cells, path, columns)
        if line.strip():
            yield where, _named(cells, header, where)


def _check_header(header: list[str], path: Path, columns: tuple[str, str]) -> None:
    for column in columns:
        if column not in header:
            raise ValueError(
                f"{path} has no column {column!r} (its first line has {', '.join(header)}); name "
                f"the columns in the first line, or pass text_column and label_column"
            )


def _named(cells: list[str], header: list[str], where: str) -> Mapping[str, str]:
    if len(cells) != len(header):
        raise ValueError(
            f"{where} has {len(cells)} cells and {len(header)} are expected "
            f"({', '.join(header)}); mend it"
        )
    return dict(zip(header, cells, strict=True))


def _example(row: Mapping[str, Any], where: str, text_column: str, label_column: str) -> Example:
    for column in (text_column, label_column):
        if column not in row:
            raise ValueError(
                f"{where} has no {column!r} (it has {', '.join(row)}); mend it, or pass "
                f"text_column and label_column"
            )
    text, label = row[text_column], row[label_column]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} has no text under {text_column!r}; mend it or take it out")
    if isinstance(label, str):
        label = label.strip()
    elif isinstance(label, int):
        label = json.dumps(label)
    if not isinstance(label, str) or not label:
        raise ValueError(f"{where} has no label under {label_column!r}; mend it or take it out")
    return Example(text, label)
