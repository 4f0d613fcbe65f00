"""Labelled texts in a local file: TSV, CSV or JSON Lines, one example per row, any classes."""

import csv
import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from nanogpt.data.records import BadRecord, decode, json_records, read_all, text_under
from nanogpt.data.source import Source, local_path
from nanogpt.data.splits import Example, Splits, examples_sha256, fill, shuffled_texts
from nanogpt.text import format_list
from nanogpt.tokenizer import SURROGATE
from nanogpt.values import CHECKED, Count, FilePath, Flag, Seed, Share, Text

REMEDY = "correct it, or pass text_column and label_column"
csv.field_size_limit(2**27)  # characters; the default of 131,072 is less than a long article


@dataclass(frozen=True, config=CHECKED)
class LabelledTexts(Source):
    """A labelled file, and its splits for training.

    A .csv file has a header and quotes as in spreadsheets, a .jsonl file an object per line. Any
    other file is TSV, where a quote is a character like others; without a header that names both
    columns its rows are label, tab, text (as in the SMS Spam Collection). Labels are texts, whole
    numbers, or in JSON true and false.

    `balance` uses as many examples of each class as the smallest has; the others are a test set of
    their own. `max_examples` bounds the number of used examples, the classes in proportion. With
    `skip_bad`, rows that cannot be read are left out, and their number is logged. To stages that
    read text, an example is its text.
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
        """Return the examples in the order of the file.

        Raises FileNotFoundError, and ValueError, naming file and line, for rows without text or
        label, unless `skip_bad`.
        """
        path = local_path(self.path, self.name, "a .tsv, .csv or .jsonl file")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file; pass a labelled .tsv, .csv or .jsonl file")
        columns = (self.text_column, self.label_column)
        read = partial(_example, columns=columns)
        examples = read_all(path, _rows(path, columns), read, skip_bad=bool(self.skip_bad))
        if not examples:
            raise ValueError(f"{path} has no examples; pass a file with a text and a label per row")
        return examples

    def splits(self) -> Splits:
        """Return the examples in splits that depend on them and on the fields alone.

        Texts that differ in case and white space only are one text, of the class of the first, and
        stay together. Of every class the test split gets `test_fraction`, validation `val_fraction`
        and training the others, as nearly as the copies allow.

        Raises ValueError where there are no two classes, or one is too small to be in all three.
        """
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"data.val_fraction={self.val_fraction} and data.test_fraction="
                f"{self.test_fraction} leave nothing to train on; pass smaller ones"
            )
        by_label = shuffled_texts(self.examples(), self.split_seed)
        if len(by_label) < 2:
            raise ValueError(
                f"all texts are of only one class, {min(by_label)!r}; pass two or more"
            )
        counts = {label: sum(map(len, texts)) for label, texts in by_label.items()}
        used = dict.fromkeys(counts, min(counts.values())) if self.balance else counts
        if self.max_examples is not None and self.max_examples < (total := sum(used.values())):
            used = {label: n * self.max_examples // total for label, n in used.items()}
        parts: list[list[Example]] = [[], [], [], []]
        rare: list[str] = []
        for label in sorted(by_label):
            n = used[label]
            n_test, n_val = round(self.test_fraction * n), round(self.val_fraction * n)
            filled = fill(by_label[label], [n_test, n_val, n - n_test - n_val, counts[label]])
            if not all(filled[:3]):
                n_test, n_val, n_train, _ = map(len, filled)
                rare.append(
                    f"class {label!r} has {counts[label]} examples, which gives {n_test} to test, "
                    f"{n_val} to validation, {n_train} to training"
                )
            for part, more in zip(parts, filled, strict=True):
                part += more
        if rare:
            raise ValueError(
                f"{format_list(rare, '; ')}; add examples of them, remove them, or change "
                "data.val_fraction, data.test_fraction and data.max_examples"
            )
        test, val, train, rest = parts
        return Splits(train, val, test, rest if self.balance else [])

    def documents(self, skip: int = 0) -> Iterator[str | None]:
        """Yield the texts after the first `skip`, those of all splits."""
        for example in self.examples()[skip:]:
            yield example.text

    def fingerprint(self) -> str:
        return examples_sha256(self.examples())[:16]

    def description(self) -> dict[str, Any]:
        return {"path": str(self.path)}


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield the position of each row, `line 3`, and its cells by column or a BadRecord."""
    if path.suffix.lower() in (".jsonl", ".json"):
        yield from json_records(path)
        return
    is_csv = path.suffix.lower() == ".csv"
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        tsv: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        rows = _cells(csv.reader(file, **({"strict": True} if is_csv else tsv)), path)
        start, first = next(rows, (1, []))
        if isinstance(first, BadRecord):
            raise ValueError(f"{path}, line {start} {first}; {first.remedy}")
        has_header = is_csv or set(columns) <= set(first) or len(first) != 2
        header = first if has_header else [columns[1], columns[0]]  # label, text
        if missing := [column for column in columns if column not in header]:
            raise ValueError(
                f"{path} has no column {missing[0]!r} (its first line has {', '.join(header)}); "
                "name the columns in the first line, or pass text_column and label_column"
            )
        for line, cells in rows if has_header else chain([(start, first)], rows):
            row: Any = cells
            if isinstance(cells, list):
                row = dict(zip(header, cells, strict=False))
                if len(cells) != len(header):
                    names = f"{len(header)} are expected ({', '.join(header)})"
                    row = BadRecord(f"has {len(cells)} cells and {names}")
            yield f"line {line}", row


def _cells(reader: Any, path: Path) -> Iterator[tuple[int, list[str] | BadRecord]]:
    """Yield the first line of each row that is not blank, and the row's cells or its error."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
            decode("\t".join(cells).encode("utf-8", "surrogateescape"))
            if "".join(cells).strip():
                yield line, cells
        except StopIteration:
            return
        except BadRecord as error:
            yield line, error
        except csv.Error as error:
            if reader.line_num > line:  # other rows may be lost with it
                raise ValueError(
                    f"{path}, line {line} opens a quote that ends nowhere up to line "
                    f"{reader.line_num} ({error}); close it"
                ) from error
            yield line, BadRecord(f"is not CSV ({error})", "correct its quotes")


def _example(row: Any, columns: tuple[str, str]) -> Example:
    text_column, label_column = columns
    text, label = text_under(row, text_column, REMEDY), row.get(label_column)
    if not text.strip():
        raise BadRecord(f"has no text under {text_column!r} (it is empty)")
    name = label.strip() if isinstance(label, str) else json.dumps(label)
    if not isinstance(label, str | int) or not name or SURROGATE.search(name):
        raise BadRecord(
            f"has no label under {label_column!r}, a text or a whole number "
            f"({json.dumps(label)} is there)",
            REMEDY,
        )
    return Example(text, name)
