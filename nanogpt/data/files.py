"""The documents of files, here or on the Hugging Face hub: parquet, JSON Lines and plain text.

Memory stays bounded whatever the size of a file: parquet is read by a few rows of the text column,
JSON Lines by the line. Only a plain text file, which is one document, is held whole.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from typing import Any

from nanogpt.data.records import (
    PASS_OVER,
    BadRecord,
    brief,
    decoded,
    is_damage,
    is_remote,
    lines,
    open_file,
    parsed,
    text_under,
)
from nanogpt.data.source import Extent
from nanogpt.tokenizer import END_OF_TEXT

RECORDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
JSON = (".json", ".json.gz", ".json.zst")  # JSON Lines by another name, where they are asked for
TEXTS = (".txt", ".md", ".py")
STRING_TYPES = ("string", "large_string", "string_view")  # of Arrow, dictionaries of them too
BATCH_ROWS = 64  # of parquet, decoded together
BUFFER_BYTES = 2**20  # of a parquet column or a plain text file, read together
MEASURED_FILES = 16  # looked into for an estimate of all
MEASURED_LINES = 200  # of each

log = logging.getLogger(__name__)
_marked_folders: set[str] = set()

# Each record of a file is its text, or what is wrong with it
Record = str | ValueError


@dataclass(frozen=True)
class Reader:
    """Reads the documents of files one after the other.

    `text_column` names the text among the columns of parquet and the names of JSON records. What
    cannot be read is a ValueError naming file and row or line, or None where `skip_bad`. Plain text
    files are one document each, or several where a `separator` stands between them; line breaks
    beside it are no part of a document, and blank documents are left out.
    """

    text_column: str = "text"
    skip_bad: bool = False
    separator: str | None = None

    def documents(self, paths: Sequence[str], skip: int = 0) -> Iterator[str | None]:
        """Yield the documents after the first `skip`.

        A parquet file is passed by the number of rows in its footer, JSON Lines by counting lines.
        A file that cannot be opened as parquet counts as one record, the lost rows of a damaged row
        group as one each.
        """
        for path in paths:
            if skip and (n_records := self._count(path)) <= skip:
                skip -= n_records
                continue
            for record in self._records(path, skip):
                if isinstance(record, ValueError) and not self.skip_bad:
                    raise record
                yield record if isinstance(record, str) else None
            skip = 0

    def extent(self, paths: Sequence[str]) -> Extent:
        """Estimate what is read of the files, and the text in it, from a look into some of them."""
        sizes = file_sizes(paths)
        measured = range(0, len(paths), -(-len(paths) // MEASURED_FILES))
        parts = [self._measure(paths[i], sizes[i]) for i in measured]
        scale = sum(sizes) / max(sum(sizes[i] for i in measured), 1)
        read_bytes, text_bytes = (round(scale * sum(part)) for part in zip(*parts, strict=True))
        remote = any(is_remote(path) for path in paths)
        return Extent(len(paths), read_bytes if remote else 0, text_bytes)

    def _records(self, path: str, skip: int) -> Iterator[Record]:
        if is_plain_text(path):
            return islice(self._text_records(path), skip, None)
        if path.lower().endswith(".parquet"):
            return self._parquet_records(path, skip)
        return self._json_records(path, skip)

    def _count(self, path: str) -> int:
        """Return the number of records, without reading their texts."""
        if is_plain_text(path):
            return 1 if self.separator is None else sum(1 for _ in self._text_records(path))
        if not path.lower().endswith(".parquet"):
            with open_file(path) as raw:
                return sum(1 for _ in lines(raw, path))
        try:
            with _opened_parquet(path) as parquet:
                return int(parquet.metadata.num_rows)
        except _Unreadable:
            return 1

    def _text_records(self, path: str) -> Iterator[Record]:
        with open_file(path) as file:
            pieces = iter(partial(file.read, BUFFER_BYTES), b"")  # asked for again where it fails
            if self.separator is None:
                data = b"".join(pieces)
                if END_OF_TEXT.encode() in data:
                    _log_marker(path)
                yield _at(path, decoded(data, data[:8]))
                return
            for number, data in enumerate(_separated(pieces, self.separator.encode()), start=1):
                if data.strip():
                    where = f"{path}, document {number}"
                    yield _at(where, decoded(data.strip(b"\r\n"), data[:8]))

    def _parquet_records(self, path: str, skip: int) -> Iterator[Record]:
        try:
            with _opened_parquet(path) as parquet:
                self._check_column(path, parquet.schema_arrow)
                start = 0
                for group in range(parquet.num_row_groups):
                    stop = start + parquet.metadata.row_group(group).num_rows
                    if skip < stop:
                        records = self._row_group(path, parquet, group, start, stop)
                        yield from islice(records, max(skip - start, 0), None)
                    start = stop
        except _Unreadable as error:
            if not skip:
                yield error

    def _row_group(
        self, path: str, parquet: Any, group: int, start: int, stop: int
    ) -> Iterator[Record]:
        """Yield the records from `start` up to `stop`: as many as the row group has rows."""
        import pyarrow

        row = start
        batches = parquet.iter_batches(
            BATCH_ROWS, row_groups=[group], columns=[self.text_column], use_threads=False
        )
        try:
            for batch in batches:
                for text in _texts(batch.column(0)):
                    row += 1
                    yield self._cell(text, f"{path}, row {row}")
        except (OSError, pyarrow.ArrowException) as error:
            if not is_damage(error):
                raise
            lost = ValueError(
                f"{path} is damaged in row group {group}, rows {row + 1} to {stop} "
                f"({brief(error)}); fetch the file again, {PASS_OVER}"
            )
            yield from repeat(lost, stop - row)

    def _cell(self, value: bytes | str | None, where: str) -> Record:
        if value is None:
            return ValueError(
                f"{where} is null under {self.text_column!r}; mend the file, {PASS_OVER}"
            )
        return value if isinstance(value, str) else _at(where, decoded(value))

    def _check_column(self, path: str, schema: Any) -> None:
        if self.text_column not in schema.names:
            raise ValueError(
                f"{path} has no column {self.text_column!r}; it has columns "
                f"{', '.join(schema.names)}; pass data.text_column=NAME"
            )
        kind = schema.field(self.text_column).type
        if not _is_string(kind):
            texts = [field.name for field in schema if _is_string(field.type)]
            raise ValueError(
                f"column {self.text_column!r} of {path} holds {kind} and not text; pass "
                f"data.text_column=NAME (text is in {', '.join(texts) or 'none of its columns'})"
            )

    def _json_records(self, path: str, skip: int) -> Iterator[Record]:
        with open_file(path) as raw:
            yield from self._values(path, islice(lines(raw, path), skip, None))

    def _values(
        self, path: str, numbered: Iterable[tuple[int, str | BadRecord]]
    ) -> Iterator[Record]:
        for number, line in numbered:
            yield _at(f"{path}, line {number}", self._value(line))

    def _value(self, line: str | BadRecord) -> str | BadRecord:
        record = parsed(line) if isinstance(line, str) else line
        if isinstance(record, BadRecord):
            return record
        try:
            return text_under(record, self.text_column)
        except BadRecord as error:
            named = isinstance(record, dict) and self.text_column not in record
            shape = f'write records such as {{"{self.text_column}": "..."}}'
            return BadRecord(str(error), "pass data.text_column=NAME" if named else shape)

    def _measure(self, path: str, n_bytes: int) -> tuple[int, int]:
        """Estimate how many bytes of a file are read, and of them, how many are text."""
        if is_plain_text(path):
            return n_bytes, n_bytes
        if path.lower().endswith(".parquet"):
            return self._measure_parquet(path)
        with open_file(path) as raw:
            texts = self._values(path, lines(raw, path))
            head = list(islice(texts, MEASURED_LINES))
            n_read = raw.tell() if len(head) == MEASURED_LINES else n_bytes
        n_text = sum(len(t.encode("utf-8", "surrogatepass")) for t in head if isinstance(t, str))
        return n_bytes, round(n_text * n_bytes / max(n_read, 1))

    def _measure_parquet(self, path: str) -> tuple[int, int]:
        try:
            with _opened_parquet(path) as parquet:
                self._check_column(path, parquet.schema_arrow)
                groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
                leaves = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
                column = leaves.index(self.text_column)
        except _Unreadable:
            return 0, 0
        chunks = [group.column(column) for group in groups]
        return (
            sum(chunk.total_compressed_size for chunk in chunks),
            sum(chunk.total_uncompressed_size for chunk in chunks),
        )


class _Unreadable(ValueError):
    """A file is damaged as a whole, so that nothing in it can be counted."""


def is_plain_text(path: str) -> bool:
    return path.lower().endswith(TEXTS)


def file_sizes(paths: Sequence[str]) -> list[int]:
    """Return the bytes of local or of remote files."""
    if not is_remote(paths[0]):
        return [os.stat(path).st_size for path in paths]
    import fsspec

    filesystem, _ = fsspec.core.url_to_fs(paths[0])
    for folder in dict.fromkeys(path.rpartition("/")[0] for path in paths):
        filesystem.ls(folder)  # one request instead of one for each file; it is remembered
    return [int(filesystem.size(path)) for path in paths]


@contextmanager
def _opened_parquet(path: str) -> Iterator[Any]:
    """Open a parquet file to be read in small pieces; raises _Unreadable where it is none."""
    import pyarrow
    import pyarrow.parquet

    with open_file(path) as file:
        try:
            parquet = pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
        except (OSError, pyarrow.ArrowException) as error:
            if not is_damage(error):
                raise
            raise _Unreadable(
                f"{path} is not a whole parquet file ({brief(error)}); fetch it again, {PASS_OVER}"
            ) from error
        yield parquet


def _separated(pieces: Iterable[bytes], separator: bytes) -> Iterator[bytes]:
    """Yield what stands between the separators; one may reach over two pieces."""
    begun: list[bytes] = []
    end = b""  # of the pieces so far, which may begin a separator
    for piece in pieces:
        *whole, rest = (end + piece).split(separator)
        for part in whole:
            yield b"".join([*begun, part])
            begun = []
        cut = max(len(rest) - len(separator) + 1, 0)
        begun.append(rest[:cut])
        end = rest[cut:]
    yield b"".join([*begun, end])


def _log_marker(path: str) -> None:
    """Log, for the first such file of a folder, that it holds the end-of-text marker."""
    folder = os.path.dirname(path)
    if folder in _marked_folders:
        return
    _marked_folders.add(folder)
    log.info(
        "%s holds %s, which is read as plain text; where it separates documents, pass it as "
        "separator (data.separator, or --separator)",
        path,
        END_OF_TEXT,
    )


def _at(where: str, found: str | BadRecord) -> Record:
    return found.at(where) if isinstance(found, BadRecord) else found


def _texts(column: Any) -> list[Any]:
    """Return the strings of a column, or all their bytes where one of them is not UTF-8."""
    import pyarrow

    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return list(column.cast(pyarrow.large_binary()).to_pylist())


def _is_string(kind: Any) -> bool:
    import pyarrow

    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return str(value) in STRING_TYPES
