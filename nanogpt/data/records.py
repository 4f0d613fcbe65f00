"""Lines and records of files: decompressed, decoded and parsed, each with its position or error."""

import codecs
import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar

from nanogpt.hub import brief
from nanogpt.text import format_list

PASS_OVER = "or pass data.skip_bad=true to leave out what cannot be read"

T = TypeVar("T")

log = logging.getLogger(__name__)


class BadRecord(ValueError):
    """An error in a record, without its file and line, and its remedy."""

    def __init__(self, found: str, remedy: str = "correct it or remove it") -> None:
        super().__init__(found)
        self.remedy = remedy

    def at(self, where: str) -> ValueError:
        """Return the error with the record's file and position."""
        return ValueError(f"{where} {self}; {self.remedy}, {PASS_OVER}")


def open_file(path: str) -> IO[bytes]:
    """Open a local path or a URL that fsspec knows, such as hf://datasets/..., for reading."""
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    return io.BufferedReader(fsspec.open(path, "rb").open())  # reads lines faster than fsspec


def decode(data: bytes | BadRecord) -> str:
    """Return UTF-8 bytes as text; raises BadRecord for others, or the one passed."""
    if isinstance(data, BadRecord):
        raise data
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        found = f"is not UTF-8 at byte {error.start} (0x{data[error.start]:02x})"
        encoding = "UTF-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin1"
        remedy = f"unpack it, or convert it with iconv -f ENCODING -t UTF-8 (often {encoding})"
        raise BadRecord(found, remedy) from error


def lines(raw: IO[bytes], path: str) -> Iterator[tuple[int, bytes | BadRecord]]:
    """Yield the number and the bytes of each line that is not blank, or its error."""
    number = 0
    try:
        for number, line in enumerate(_decompressed(raw, path), start=1):
            if line.strip():
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except (EOFError, zlib.error, OSError) as error:
        if not is_damage(error):
            raise
        yield number + 1, BadRecord(f"is damaged ({brief(error)})", "fetch the file again")


def parse_json(line: bytes | BadRecord) -> Any:
    """Return the value of a line of JSON; raises BadRecord where there is none."""
    text = decode(line)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"is not JSON ({brief(error)})", "write one record per line") from error


def json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the position of each line of JSON Lines, `line 3`, and its value or a BadRecord.

    Raises FileNotFoundError where there is no such file.
    """
    with open_file(str(path)) as raw:
        for number, line in lines(raw, str(path)):
            try:
                yield f"line {number}", parse_json(line)
            except BadRecord as error:
                yield f"line {number}", error


def read_all(
    path: Path,
    records: Iterable[tuple[str, Any]],
    read: Callable[[Any], T],
    *,
    skip_bad: bool = False,
    limit: int | None = None,
) -> list[T]:
    """Return the results of `read` for the records, the first `limit` good ones.

    `read` raises BadRecord. With `skip_bad`, bad records are left out and their number is logged;
    without it they raise a ValueError that lists the first ten.
    """
    good: list[T] = []
    bad: list[tuple[str, BadRecord]] = []
    for position, record in records:
        if len(good) == limit:
            break
        try:
            if isinstance(record, BadRecord):
                raise record
            good.append(read(record))
        except BadRecord as error:
            bad.append((position, error))
    if bad and skip_bad:
        log_once(f"{path}: {len(bad):,} records that cannot be read were left out")
    elif bad:
        found = format_list([f"{position} {error}" for position, error in bad], "; ")
        remedies = ", ".join(dict.fromkeys(error.remedy for _, error in bad))
        raise ValueError(f"{path}, {found}; {remedies}, {PASS_OVER}")
    return good


@cache
def log_once(text: str) -> None:
    """Log a message that each pass over the same data repeats."""
    log.info("%s", text)


def text_under(record: Any, key: str, remedy: str = "correct it or remove it") -> str:
    """Return the text under a key of a JSON object; raises BadRecord where there is none."""
    if isinstance(record, dict) and isinstance(record.get(key), str):
        return record[key]
    if not isinstance(record, dict):
        found = f"it is {shown(record)} and not an object"
    elif key in record:
        found = f"{shown(record[key])} is there"
    else:
        found = f"it has {', '.join(record) or 'no names'}"
    raise BadRecord(f"has no text under {key!r} ({found})", remedy)


def shown(value: object) -> str:
    """Return the beginning of a value as JSON."""
    return json.dumps(value, default=repr)[:40]


def is_damage(error: Exception) -> bool:
    """Whether an error is one of content (for pyarrow a bare OSError), not of access to it."""
    return not isinstance(error, OSError) or (
        type(error) in (OSError, gzip.BadGzipFile) and error.errno is None
    )


def _decompressed(raw: IO[bytes], path: str) -> IO[bytes]:
    if path.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if not path.lower().endswith(".zst"):
        return raw
    import pyarrow

    stream: Any = pyarrow.CompressedInputStream(raw, "zstd")
    return io.BufferedReader(stream, 2**16)
