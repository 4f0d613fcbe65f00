"""Lines and records of files: decompressed, decoded and parsed, or what is wrong with them."""

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

READ_AHEAD_BYTES = 8 * 2**20  # of a file on the hub, fetched by one request
MAX_LINE_BYTES = 256 * 2**20  # a longer line is taken for a file of something else
MAX_LISTED = 10  # bad records in one error
PASS_OVER = "or pass data.skip_bad=true to leave out what cannot be read"
# First bytes of files that are no UTF-8 text
FORMATS = {
    b"\x1f\x8b": ("gzip", "unpack it with gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unpack it with unzstd"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or save the table as CSV"),
    b"\xd0\xcf\x11\xe0": ("a document of an office program", "save it as text or CSV"),
    b"PAR1": ("parquet", "let its name end in .parquet"),
    b"%PDF": ("PDF", "save it as text"),
    b"\xff\xfe": ("UTF-16", "convert it with iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16", "convert it with iconv -f UTF-16 -t UTF-8"),
}

T = TypeVar("T")

log = logging.getLogger(__name__)


class BadRecord(ValueError):
    """What is wrong with a record, without the file and line, and how a user mends it."""

    def __init__(self, found: str, remedy: str = "mend it or take it out") -> None:
        super().__init__(found)
        self.remedy = remedy

    def at(self, where: str) -> ValueError:
        """Return the error that names the record's place."""
        return ValueError(f"{where} {self}; {self.remedy}, {PASS_OVER}")


def is_remote(path: str) -> bool:
    return "://" in path


def open_file(path: str) -> IO[bytes]:
    """Open a local path or a URL that fsspec knows, such as hf://datasets/..., for reading."""
    if not is_remote(path):
        return open(path, "rb")
    import fsspec

    filesystem, name = fsspec.core.url_to_fs(path)
    file = filesystem.open(name, "rb", block_size=READ_AHEAD_BYTES)
    return io.BufferedReader(file)  # whose readline takes a limit, unlike fsspec's


def check_text(path: Path) -> None:
    """Raise ValueError for a file whose first bytes are those of a format other than text."""
    with path.open("rb") as file:
        head = file.read(8)
    if found := _format(head):
        raise ValueError(f"{path}, line 1 {found[0]}; {found[1]}")


def decoded(data: bytes, head: bytes = b"") -> str | BadRecord:
    """Return UTF-8 bytes as text; `head` are the first bytes of their file."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        found = f"is not UTF-8 at byte {error.start} (0x{data[error.start]:02x})"
        remedy = "convert the file with iconv -f ENCODING -t UTF-8 (often latin1, or gb18030)"
        return BadRecord(*(_format(head) or (found, remedy)))


def lines(raw: IO[bytes], path: str) -> Iterator[tuple[int, str | BadRecord]]:
    """Yield the number of each line that is not blank, and the line or what is wrong with it."""
    number = 0
    head = b""
    try:
        file = _decompressed(raw, path)
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if number == 1:
                head = line[:8]
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) == MAX_LINE_BYTES:
                yield number, _too_long(file)
            elif line.strip():
                yield number, decoded(line, head)
    except (EOFError, zlib.error, OSError) as error:
        if not is_damage(error):
            raise
        yield number + 1, BadRecord(f"is damaged ({brief(error)})", "fetch the file again")


def parsed(line: str) -> Any:
    """Return the value of a line of JSON, or what is wrong with the line."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        array = line.lstrip().startswith("[")
        found = str(error)
        if isinstance(error, json.JSONDecodeError):
            found = f"{error.msg} at character {error.pos + 1}"
        remedy = "write one record per line, as jq -c '.[]' does" if array else "mend the line"
        return BadRecord(f"is not JSON ({found})", remedy)


def json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place of each line of JSON Lines, such as `line 3`, and its value or a BadRecord.

    Raises ValueError where the file is none of text, and FileNotFoundError where there is none.
    """
    if not path.name.lower().endswith((".gz", ".zst")):
        check_text(path)
    with open_file(str(path)) as raw:
        for number, line in lines(raw, str(path)):
            yield f"line {number}", parsed(line) if isinstance(line, str) else line


def read_all(
    path: Path,
    records: Iterable[tuple[str, Any]],
    read: Callable[[Any], T],
    *,
    skip_bad: bool = False,
    limit: int | None = None,
) -> list[T]:
    """Return what `read` makes of the records, the first `limit` good ones.

    `read` raises BadRecord. Bad records are left out and counted in the log where `skip_bad`;
    without it they are a ValueError that lists the first ten.
    """
    good: list[T] = []
    bad: list[tuple[str, BadRecord]] = []
    for place, record in records:
        if len(good) == limit:
            break
        try:
            if isinstance(record, BadRecord):
                raise record
            good.append(read(record))
        except BadRecord as error:
            bad.append((place, error))
    if bad and not skip_bad:
        raise _listed(path, bad)
    if bad:
        log_once(f"{path}: {len(bad):,} records that cannot be read were left out")
    return good


@cache
def log_once(text: str) -> None:
    """Log what each pass over the same data would log again."""
    log.info("%s", text)


def text_under(record: Any, key: str) -> str:
    """Return the text under a key of a JSON object; raises BadRecord where there is none."""
    if isinstance(record, dict) and isinstance(record.get(key), str):
        return record[key]
    if not isinstance(record, dict):
        found = f"it is {kind_of(record)} and not an object"
    elif key in record:
        found = f"{kind_of(record[key])} is there"
    else:
        found = f"it has {', '.join(sorted(record)) or 'no names'}"
    raise BadRecord(f"has no text under {key!r} ({found})")


def kind_of(value: Any) -> str:
    """Return what JSON calls a value."""
    kinds = {type(None): "null", bool: "a truth value", str: "a text", list: "an array"}
    return kinds.get(type(value), "an object" if isinstance(value, dict) else "a number")


def is_damage(error: Exception) -> bool:
    """Whether the bytes are at fault (pyarrow says so by a bare OSError), not their reading."""
    return not isinstance(error, OSError) or (
        type(error) in (OSError, gzip.BadGzipFile) and error.errno is None
    )


def brief(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")[:200]


def _format(head: bytes) -> tuple[str, str] | None:
    """Return what is found where first bytes are another format's, and the remedy."""
    for magic, (name, remedy) in FORMATS.items():
        if head.startswith(magic):
            shown = " ".join(f"0x{byte:02x}" for byte in magic)
            return f"begins with the bytes {shown}: it is {name} and not UTF-8 text", remedy
    return None


def _listed(path: Path, bad: list[tuple[str, BadRecord]]) -> ValueError:
    if len(bad) == 1:
        return bad[0][1].at(f"{path}, {bad[0][0]}")
    found = "; ".join(f"{place} {error}" for place, error in bad[:MAX_LISTED])
    more = f"; and {len(bad) - MAX_LISTED:,} more" if len(bad) > MAX_LISTED else ""
    remedies = ", ".join(dict.fromkeys(error.remedy for _, error in bad[:MAX_LISTED]))
    return ValueError(
        f"{path} has {len(bad):,} bad records: {found}{more}; {remedies}, {PASS_OVER}"
    )


def _too_long(file: IO[bytes]) -> BadRecord:
    """Read to the end of a line and return what is wrong with it."""
    while (piece := file.readline(MAX_LINE_BYTES)) and not piece.endswith(b"\n"):
        pass
    return BadRecord(f"is longer than {MAX_LINE_BYTES // 2**20} MiB", "write one record per line")


def _decompressed(raw: IO[bytes], path: str) -> IO[bytes]:
    if path.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if not path.lower().endswith(".zst"):
        return raw
    import pyarrow

    stream: Any = pyarrow.CompressedInputStream(raw, "zstd")
    return io.BufferedReader(stream, 2**16)
