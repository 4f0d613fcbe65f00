"""The documents of files, here or on the Hugging Face hub: parquet, JSON Lines and plain text.

Memory stays bounded whatever the size of a file: parquet is read by a few rows of the text column,
JSON Lines by the line. Only a plain text file, which is one document, is held whole.
"""

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from typing import IO, Any

from nanogpt.data.source import Extent

RECORDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
JSON = (".json", ".json.gz", ".json.zst")  # JSON Lines by another name, where they are asked for
TEXTS = (".txt", ".md", ".py")
STRING_TYPES = ("string", "large_string", "string_view")  # of Arrow, dictionaries of them too
BATCH_ROWS = 64  # of parquet, decoded together
BUFFER_BYTES = 2**20  # of a parquet column or a plain text file, read together
READ_AHEAD_BYTES = 8 * 2**20  # of a file on the hub, fetched by one request
MAX_LINE_BYTES = 256 * 2**20  # a longer line is taken for a file of something else
MEASURED_FILES = 16  # looked into for an estimate of all
MEASURED_LINES = 200  # of each
PASS_OVER = "or pass data.skip_bad=true to leave out what cannot be read"

# Each record of a file is its text, or what is wrong with it
Record = str | ValueError


@dataclass(frozen=True)
class Reader:
    """Reads the documents of files one after the other.

    `text_column` names the text among the columns of parquet and the names of JSON records. What
    cannot be read is a ValueError naming file and row or line, or None where `skip_bad`.
    """

    text_column: str = "text"
    skip_bad: bool = False

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
            return islice(_text_records(path), skip, None)
        if path.lower().endswith(".parquet"):
            return self._parquet_records(path, skip)
        return self._json_records(path, skip)

    def _count(self, path: str) -> int:
        """Return the number of records, without reading their texts."""
        if is_plain_text(path):
            return 1
        if not path.lower().endswith(".parquet"):
            with open_file(path) as raw:
                return sum(1 for _ in _lines(raw, path))
        try:
            with _opened_parquet(path) as parquet:
                return int(parquet.metadata.num_rows)
        except _Unreadable:
            return 1

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
            if not _is_damage(error):
                raise
            lost = ValueError(
                f"{path} is damaged in row group {group}, rows {row + 1} to {stop} "
                f"({_brief(error)}); fetch the file again, {PASS_OVER}"
            )
            yield from repeat(lost, stop - row)

    def _cell(self, value: bytes | str | None, where: str) -> Record:
        if value is None:
            return ValueError(
                f"{where} is null under {self.text_column!r}; mend the file, {PASS_OVER}"
            )
        return value if isinstance(value, str) else _decoded(value, where)

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
            yield from self._values(path, islice(_lines(raw, path), skip, None))

    def _values(
        self, path: str, lines: Iterable[tuple[int, bytes | ValueError]]
    ) -> Iterator[Record]:
        for number, line in lines:
            where = f"{path}, line {number}"
            text = _decoded(line, where) if isinstance(line, bytes) else line
            yield self._value(text, where) if isinstance(text, str) else text

    def _value(self, line: str, where: str) -> Record:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            return ValueError(
                f"{where} is not one JSON record ({error}); mend or remove the line, {PASS_OVER}"
            )
        if isinstance(record, dict) and isinstance(record.get(self.text_column), str):
            return record[self.text_column]
        names = ", ".join(sorted(record)) if isinstance(record, dict) else "no names"
        return ValueError(
            f"{where} has no text under {self.text_column!r} (it has {names or 'no names'}); pass "
            f"data.text_column=NAME, {PASS_OVER}"
        )

    def _measure(self, path: str, n_bytes: int) -> tuple[int, int]:
        """Estimate how many bytes of a file are read, and of them, how many are text."""
        if is_plain_text(path):
            return n_bytes, n_bytes
        if path.lower().endswith(".parquet"):
            return self._measure_parquet(path)
        with open_file(path) as raw:
            lines = self._values(path, _lines(raw, path))
            head = list(islice(lines, MEASURED_LINES))
            n_read = raw.tell() if len(head) == MEASURED_LINES else n_bytes
        texts = [text for text in head if isinstance(text, str)]
        n_text = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
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


def is_remote(path: str) -> bool:
    return "://" in path


def is_plain_text(path: str) -> bool:
    return path.lower().endswith(TEXTS)


def open_file(path: str) -> IO[bytes]:
    """Open a local path or a URL that fsspec knows, such as hf://datasets/..., for reading."""
    if not is_remote(path):
        return open(path, "rb")
    import fsspec

    filesystem, name = fsspec.core.url_to_fs(path)
    file = filesystem.open(name, "rb", block_size=READ_AHEAD_BYTES)
    return io.BufferedReader(file)  # whose readline takes a limit, unlike fsspec's


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
            if not _is_damage(error):
                raise
            raise _Unreadable(
                f"{path} is not a whole parquet file ({_brief(error)}); fetch it again, {PASS_OVER}"
            ) from error
        yield parquet


def _text_records(path: str) -> Iterator[Record]:
    with open_file(path) as file:
        pieces = iter(partial(file.read, BUFFER_BYTES), b"")  # each asked for again where it fails
        yield _decoded(b"".join(pieces), path)


def _lines(raw: IO[bytes], path: str) -> Iterator[tuple[int, bytes | ValueError]]:
    """Yield the number of each line that is not blank, and the line or what is wrong with it."""
    number = 0
    try:
        file = _decompressed(raw, path)
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) == MAX_LINE_BYTES:
                yield number, _too_long(file, f"{path}, line {number}")
            elif line.strip():
                yield number, line
    except (EOFError, zlib.error, OSError) as error:
        if not _is_damage(error):
            raise
        yield (
            number + 1,
            ValueError(
                f"{path} is damaged after line {number} ({_brief(error)}); fetch it again, "
                f"{PASS_OVER}"
            ),
        )


def _too_long(file: IO[bytes], where: str) -> ValueError:
    """Read to the end of a line and return what is wrong with it."""
    while (piece := file.readline(MAX_LINE_BYTES)) and not piece.endswith(b"\n"):
        pass
    return ValueError(
        f"{where} is longer than {MAX_LINE_BYTES // 2**20} MiB; write one record per line, "
        f"{PASS_OVER}"
    )


def _decompressed(raw: IO[bytes], path: str) -> IO[bytes]:
    if path.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if not path.lower().endswith(".zst"):
        return raw
    import pyarrow

    stream: Any = pyarrow.CompressedInputStream(raw, "zstd")
    return io.BufferedReader(stream, 2**16)


def _decoded(data: bytes, where: str) -> Record:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return ValueError(
            f"{where} is not UTF-8 at byte {error.start} (0x{data[error.start]:02x}); convert it, "
            f"{PASS_OVER}"
        )


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


def _is_damage(error: Exception) -> bool:
    """Whether the bytes are at fault (pyarrow says so by a bare OSError), not their reading."""
    return not isinstance(error, OSError) or (
        type(error) in (OSError, gzip.BadGzipFile) and error.errno is None
    )


def _brief(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")[:200]
