"""The documents of files, here or on the Hugging Face hub: parquet, JSON Lines and plain text.

Memory stays bounded whatever the size of a file: parquet is read by a few rows of the text column,
JSON Lines by the line. Only a plain text file, which is one document, is held whole.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from typing import IO, Any

from nanogpt.data.records import (
    BadRecord,
    decode,
    is_damage,
    lines,
    log_once,
    open_file,
    parse_json,
    text_under,
)
from nanogpt.hub import brief
from nanogpt.tokenizer import END_OF_TEXT
from nanogpt.values import Flag, Text

RECORDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
JSON = (".json", ".json.gz", ".json.zst")  # JSON Lines by another name, where a path names them
TEXTS = (".txt", ".md", ".py")
STRING_TYPES = ("string", "large_string", "string_view")  # of Arrow, dictionaries of them too
BATCH_ROWS = 64  # of parquet, decoded together
BUFFER_BYTES = 2**20  # of a parquet column or a plain text file, read together

Record = tuple[str, bytes | BadRecord]  # a document or line after its position, or its error
Block = tuple[int, Iterable[Record]]  # records that are skipped together, and their number


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads the documents of files one after the other.

    `text_column` is the column of parquet, and the key of JSON records, that holds the text. What
    cannot be read is a ValueError naming file and row or line, or None with `skip_bad`. A plain
    text file is one document, or several with a `separator` between them; line breaks next to it
    are not part of a document, and blank documents are left out.
    """

    text_column: Text = "text"
    skip_bad: Flag = False
    separator: Text | None = None

    def read(self, paths: Sequence[str], skip: int = 0) -> Iterator[str | None]:
        """Yield the documents after the first `skip`.

        Row groups of parquet are skipped by their footer, JSON Lines by counting lines. A file that
        cannot be opened as parquet is one record, the lost rows of a damaged row group are one
        each. Raises ValueError for a record that cannot be read, unless `skip_bad`.
        """
        for path in paths:
            is_json = not path.lower().endswith((*TEXTS, ".parquet"))
            for n_records, records in self._blocks(path):
                if n_records <= skip:
                    skip -= n_records
                    continue
                for where, data in islice(records, skip, None):
                    try:
                        yield self._json_text(data) if is_json else decode(data)
                    except BadRecord as error:
                        if not self.skip_bad:
                            raise error.at(where) from error
                        yield None
                skip = 0

    def _blocks(self, path: str) -> Iterator[Block]:
        with open_file(path) as file:
            if path.lower().endswith(".parquet"):
                yield from self._parquet_blocks(file, path)
            elif not path.lower().endswith(TEXTS):
                for number, line in lines(file, path):
                    yield 1, [(f"{path}, line {number}", line)]
            elif self.separator is None:
                yield 1, _whole(file, path)
            else:
                documents = filter(bytes.strip, _separated(file, self.separator.encode()))
                for number, data in enumerate(documents, start=1):
                    yield 1, [(f"{path}, document {number}", data.strip(b"\r\n"))]

    def _json_text(self, line: bytes | BadRecord) -> str:
        shape = f'write records such as {{"{self.text_column}": "..."}}'
        remedy = f"{shape}, or pass data.text_column=NAME"
        return text_under(parse_json(line), self.text_column, remedy)

    def _parquet_blocks(self, file: IO[bytes], path: str) -> Iterator[Block]:
        """Yield the row groups; raises ValueError where there is no such column of text."""
        import pyarrow
        import pyarrow.parquet

        try:
            parquet = pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
        except (OSError, pyarrow.ArrowException) as error:
            if not is_damage(error):
                raise
            found = f"is not a whole parquet file ({brief(error)})"
            yield 1, [(path, BadRecord(found, "fetch it again"))]
            return
        schema = parquet.schema_arrow
        if self.text_column not in (texts := [f.name for f in schema if _is_string(f.type)]):
            raise ValueError(
                f"{path} has no column {self.text_column!r} of text (columns of text: "
                f"{', '.join(texts) or 'none'}); pass data.text_column=NAME"
            )
        start = 0
        for group in range(parquet.num_row_groups):
            n_rows = parquet.metadata.row_group(group).num_rows
            yield n_rows, self._row_group(parquet, path, group, start, start + n_rows)
            start += n_rows

    def _row_group(
        self, parquet: Any, path: str, group: int, start: int, stop: int
    ) -> Iterator[Record]:
        """Yield the records from `start` up to `stop`: as many as the row group has rows."""
        import pyarrow

        row, reason = start, "they are missing"
        batches = parquet.iter_batches(
            BATCH_ROWS, row_groups=[group], columns=[self.text_column], use_threads=False
        )
        try:
            for batch in batches:
                for data in _as_bytes(batch.column(0)).to_pylist():
                    row += 1
                    null = BadRecord(f"is null under {self.text_column!r}")
                    yield f"{path}, row {row}", null if data is None else data
        except (OSError, pyarrow.ArrowException) as error:
            if not is_damage(error):
                raise
            reason = brief(error)
        if row < stop:
            rows = f"rows {row + 1} to {stop} ({reason})"
            lost = BadRecord(f"is damaged in row group {group}, {rows}", "fetch the file again")
            yield from repeat((path, lost), stop - row)


def _whole(file: IO[bytes], path: str) -> Iterator[Record]:
    data = b"".join(iter(partial(file.read, BUFFER_BYTES), b""))  # the hub repeats a failed part
    if END_OF_TEXT.encode() in data:
        log_once(
            f"text in {os.path.dirname(path)} holds {END_OF_TEXT}, which is read as plain text; "
            "where it separates documents, pass it as separator (data.separator, or --separator)"
        )
    yield path, data


def _separated(file: IO[bytes], separator: bytes) -> Iterator[bytes]:
    """Yield the bytes between the separators; the parts read grow with a document's length."""
    rest = b""
    while piece := file.read(max(BUFFER_BYTES, len(rest))):
        *whole, rest = (rest + piece).split(separator)
        yield from whole
    yield rest


def _as_bytes(column: Any) -> Any:
    """Return a column of text as bytes, which need not be UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary())


def _is_string(kind: Any) -> bool:
    import pyarrow

    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return str(value) in STRING_TYPES
