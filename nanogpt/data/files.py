"""The documents of files, here or on the Hugging Face hub: parquet, JSON Lines and plain text.

Memory stays bounded whatever the size of a file: parquet is read by a few rows of the text column,
JSON Lines by the line. Only a plain text file, which is one document, is held whole.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice, repeat
from typing import IO, Any

from nanogpt.data.records import (
    BadRecord,
    decode,
    is_damage,
    is_remote,
    lines,
    open_file,
    parse_json,
    text_under,
)
from nanogpt.data.source import Extent
from nanogpt.hub import brief
from nanogpt.tokenizer import END_OF_TEXT

RECORDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
JSON = (".json", ".json.gz", ".json.zst")  # JSON Lines by another name, where a path names them
TEXTS = (".txt", ".md", ".py")
STRING_TYPES = ("string", "large_string", "string_view")  # of Arrow, dictionaries of them too
BATCH_ROWS = 64  # of parquet, decoded together
BUFFER_BYTES = 2**20  # of a parquet column or a plain text file, read together
MEASURED_FILES = 16  # read in part for an estimate of all
MEASURED_LINES = 200  # of each

log = logging.getLogger(__name__)

Record = str | ValueError  # a document, or its error
Block = tuple[int, Iterable[Record]]  # records that are skipped together, and their number


@dataclass(frozen=True)
class Reader:
    """Reads the documents of files one after the other.

    `text_column` is the column of parquet, and the key of JSON records, that holds the text. What
    cannot be read is a ValueError naming file and row or line, or None with `skip_bad`. A plain
    text file is one document, or several with a `separator` between them; line breaks next to it
    are not part of a document, and blank documents are left out.
    """

    text_column: str = "text"
    skip_bad: bool = False
    separator: str | None = None

    def documents(self, paths: Sequence[str], skip: int = 0) -> Iterator[str | None]:
        """Yield the documents after the first `skip`.

        Row groups of parquet are skipped by their footer, JSON Lines by counting lines. A file that
        cannot be opened as parquet is one record, the lost rows of a damaged row group are one
        each. Raises ValueError for a record that cannot be read, unless `skip_bad`.
        """
        for path in paths:
            for n_records, records in self._blocks(path):
                if n_records <= skip:
                    skip -= n_records
                    continue
                for record in islice(records, skip, None):
                    if isinstance(record, ValueError) and not self.skip_bad:
                        raise record
                    yield record if isinstance(record, str) else None
                skip = 0

    def extent(self, paths: Sequence[str]) -> Extent:
        """Estimate the bytes to read, and those of text in them, from parts of some files."""
        sizes = file_sizes(paths)
        measured = range(0, len(paths), -(-len(paths) // MEASURED_FILES))
        parts = [self._measure(paths[i], sizes[i]) for i in measured]
        scale = sum(sizes) / max(sum(sizes[i] for i in measured), 1)
        read_bytes, text_bytes = (round(scale * sum(part)) for part in zip(*parts, strict=True))
        remote = any(is_remote(path) for path in paths)
        return Extent(len(paths), read_bytes if remote else 0, text_bytes)

    def _blocks(self, path: str) -> Iterator[Block]:
        with open_file(path) as file:
            if path.lower().endswith(TEXTS):
                yield from self._text_blocks(file, path)
            elif path.lower().endswith(".parquet"):
                yield from self._parquet_blocks(file, path)
            else:
                yield from self._json_blocks(file, path)

    def _text_blocks(self, file: IO[bytes], path: str) -> Iterator[Block]:
        pieces = iter(partial(file.read, BUFFER_BYTES), b"")  # the hub repeats each where it fails
        if self.separator is None:
            yield 1, _whole(pieces, path)
            return
        for number, data in enumerate(_separated(pieces, self.separator.encode()), start=1):
            if data.strip():
                yield 1, _document(data.strip(b"\r\n"), f"{path}, document {number}")

    def _json_blocks(self, file: IO[bytes], path: str) -> Iterator[Block]:
        for number, line in lines(file, path):
            yield 1, self._json_text(line, f"{path}, line {number}")

    def _json_text(self, line: bytes | BadRecord, where: str) -> Iterator[Record]:
        shape = f'write records such as {{"{self.text_column}": "..."}}'
        try:
            remedy = f"{shape}, or pass data.text_column=NAME"
            yield text_under(parse_json(line), self.text_column, remedy)
        except BadRecord as error:
            yield error.at(where)

    def _parquet_blocks(self, file: IO[bytes], path: str) -> Iterator[Block]:
        try:
            parquet = self._open_parquet(file, path)
        except BadRecord as error:
            yield 1, [error.at(path)]
            return
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
                    where = f"{path}, row {row}"
                    if data is None:
                        yield BadRecord(f"is null under {self.text_column!r}").at(where)
                    else:
                        yield from _document(data, where)
        except (OSError, pyarrow.ArrowException) as error:
            if not is_damage(error):
                raise
            reason = brief(error)
        if row < stop:
            rows = f"rows {row + 1} to {stop} ({reason})"
            lost = BadRecord(f"is damaged in row group {group}, {rows}", "fetch the file again")
            yield from repeat(lost.at(path), stop - row)

    def _open_parquet(self, file: IO[bytes], path: str) -> Any:
        """Open a parquet file to be read in small pieces.

        Raises BadRecord where it is none, and ValueError where it has no such column of text.
        """
        import pyarrow
        import pyarrow.parquet

        try:
            parquet = pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
        except (OSError, pyarrow.ArrowException) as error:
            if not is_damage(error):
                raise
            found = f"is not a whole parquet file ({brief(error)})"
            raise BadRecord(found, "fetch it again") from error
        schema = parquet.schema_arrow
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
        return parquet

    def _measure(self, path: str, n_bytes: int) -> tuple[int, int]:
        """Estimate how many bytes of a file are read, and of them, how many are text."""
        if path.lower().endswith(TEXTS):
            return n_bytes, n_bytes
        with open_file(path) as file:
            if path.lower().endswith(".parquet"):
                return self._measure_parquet(file, path)
            every = self._json_blocks(file, path)  # whose end closes a compressed file
            blocks = list(islice(every, MEASURED_LINES))
            n_read = file.tell() if len(blocks) == MEASURED_LINES else n_bytes
            texts = [t for _, records in blocks for t in records if isinstance(t, str)]
        n_text = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        return n_bytes, round(n_text * n_bytes / max(n_read, 1))

    def _measure_parquet(self, file: IO[bytes], path: str) -> tuple[int, int]:
        try:
            parquet = self._open_parquet(file, path)
        except BadRecord:
            return 0, 0
        leaves = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
        column = leaves.index(self.text_column)
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        chunks = [group.column(column) for group in groups]
        return (
            sum(chunk.total_compressed_size for chunk in chunks),
            sum(chunk.total_uncompressed_size for chunk in chunks),
        )


def file_sizes(paths: Sequence[str]) -> list[int]:
    """Return the bytes of local or of remote files."""
    if not is_remote(paths[0]):
        return [os.stat(path).st_size for path in paths]
    import fsspec

    filesystem, _ = fsspec.core.url_to_fs(paths[0])
    for folder in dict.fromkeys(path.rpartition("/")[0] for path in paths):
        filesystem.ls(folder)  # one request instead of one for each file; it is cached
    return [int(filesystem.size(path)) for path in paths]


def _document(data: bytes, where: str) -> Iterator[Record]:
    try:
        yield decode(data)
    except BadRecord as error:
        yield error.at(where)


def _whole(pieces: Iterable[bytes], path: str) -> Iterator[Record]:
    data = b"".join(pieces)
    if END_OF_TEXT.encode() in data:
        _log_marker(os.path.dirname(path))
    yield from _document(data, path)


def _separated(pieces: Iterable[bytes], separator: bytes) -> Iterator[bytes]:
    """Yield the bytes between the separators; one may reach over two pieces."""
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


@cache
def _log_marker(folder: str) -> None:
    """Log, once for each folder, that its files hold the end-of-text marker."""
    log.info(
        "text in %s holds %s, which is read as plain text; where it separates documents, pass it "
        "as separator (data.separator, or --separator)",
        folder,
        END_OF_TEXT,
    )


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
