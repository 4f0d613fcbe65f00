"""Read the archives of `torch.save`, after comparing what they claim with what they hold.

Such an archive is a zip file: a pickle, and an entry for the storage of each tensor. Loading one
takes memory and time in proportion to its size, whatever it claims: before anything is unpickled,
its entries are known to be stored, distinct and inside the file, and its pickle to build plain
values and tensors over whole entries. Errors are ValueErrors that say what was found, without the
path.
"""

import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

MAX_DIRECTORY_BYTES = 2**24  # some 100,000 entries; GPT-2 XL with its optimizer has 2,300
MAX_PICKLE_BYTES = 2**25  # unpickled, a pickle takes up to some 100 times its size
MAX_TUPLE_SIZE = 64  # hashing a tuple takes time in proportion, shared parts counted each time
MAX_BUILDS = 8  # state_dict has one, for its _metadata

DIRECTORY_END, DIRECTORY_END_64, LOCATOR_64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
LOCAL_HEADER_BYTES = 30

ITEM_BYTES = {  # of storages by the global that names their type
    b"torch DoubleStorage": 8,
    b"torch FloatStorage": 4,
    b"torch HalfStorage": 2,
    b"torch BFloat16Storage": 2,
    b"torch LongStorage": 8,
    b"torch IntStorage": 4,
    b"torch ShortStorage": 2,
    b"torch CharStorage": 1,
    b"torch ByteStorage": 1,
    b"torch BoolStorage": 1,
}
ORDERED_DICT = b"collections OrderedDict"
REBUILD_TENSOR = b"torch._utils _rebuild_tensor_v2"
GLOBALS = {ORDERED_DICT, REBUILD_TENSOR, *ITEM_BYTES}
PYTHON_OBJECTS = "it holds Python objects, which can run code when loaded"

# The opcodes of plain values, of tensors, and of what contains them.
PROTOCOL = 2
MARK, STOP, GLOBAL, REDUCE, BUILD, BINPERSID, TUPLE = b"(.cRbQt"
GETS, PUTS, TO_MARK = set(b"hj"), set(b"qr"), set(b"eut")
SCALARS = set(b"N\x88\x89KMJ\x8aGXc]}")  # empty lists and dictionaries, too: none has a hash
TUPLES = dict(zip(b")\x85\x86\x87", range(4), strict=True))
POPS = dict(zip(b"\x80a.s", (0, 1, 1, 2), strict=True))
LENGTHS = set(b"X\x8a")
FORMS = {
    **dict.fromkeys(b"Kqh\x80\x8a", struct.Struct("<B")),
    **dict.fromkeys(b"rjX", struct.Struct("<I")),
    ord("M"): struct.Struct("<H"),
    ord("J"): struct.Struct("<i"),
    ord("G"): struct.Struct(">d"),
}
GLOBAL_LINES = re.compile(rb"([^\n]*)\n([^\n]*)\n")


def load_archive(path: Path, *, verify: bool = True) -> Any:
    """Return what an archive holds; its tensors are memory-mapped.

    With `verify`, the CRC-32 sum of every entry is compared, so that every byte is read.
    """
    n_bytes = path.stat().st_size
    if not path.is_file():
        raise ValueError("it is no regular file")
    try:
        with open(path, "rb") as file:
            _check_end(file, n_bytes)
            with zipfile.ZipFile(file) as archive:
                sizes = _check_entries(archive)
                if verify and (broken := archive.testzip()):
                    raise ValueError(f"its entry {broken[:80]!r} is truncated or altered")
                root = archive.infolist()[0].filename.partition("/")[0]
                pickled = archive.read(f"{root}/data.pkl")
    except (zipfile.BadZipFile, RuntimeError, KeyError, IndexError, EOFError) as error:
        what = "its directory is truncated or altered, or it is another kind of file"
        raise ValueError(what) from error
    PickleCheck(sizes).run(pickled)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # whatever a file can do to its reader
        raise ValueError(f"it cannot be unpickled ({type(error).__name__})") from error
    _check_tensors(content, n_bytes)
    return content


def _check_end(file: BinaryIO, n_bytes: int) -> None:
    """Check that the directory and its end close the file, so that all readers find the same."""
    file.seek(max(0, n_bytes - 98))
    tail = file.read(98).rjust(98, b"\0")
    end = n_bytes - 22
    size, start, comment_bytes = struct.unpack("<IIH", tail[-10:])
    if tail[56:60] == LOCATOR_64:
        end -= 76
        size, start = struct.unpack("<QQ", tail[40:56])
        (end_64,) = struct.unpack("<Q", tail[64:72])
        if end_64 != end or not tail.startswith(DIRECTORY_END_64):
            raise zipfile.BadZipFile
    if tail[-22:-18] != DIRECTORY_END or comment_bytes or start + size != end:
        raise zipfile.BadZipFile
    if size > MAX_DIRECTORY_BYTES:
        raise ValueError(f"its directory has {size:,} bytes, more than {MAX_DIRECTORY_BYTES:,}")


def _check_entries(archive: zipfile.ZipFile) -> dict[str, int]:
    """Return the size of each entry by its name below the archive's own name."""
    sizes: dict[str, int] = {}
    end = 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        name, shown = entry.filename.partition("/")[2].lower(), repr(entry.filename[:80])
        is_plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
        if not is_plain or entry.compress_size != entry.file_size:
            raise ValueError(f"its entry {shown} is compressed or encrypted")
        if name in sizes:  # torch ignores case
            raise ValueError(f"its entry {shown} occurs twice")
        if entry.header_offset < end:
            raise ValueError(f"its entry {shown} overlaps another one")
        end = entry.header_offset + LOCAL_HEADER_BYTES + entry.file_size
        sizes[name] = entry.file_size
    if end > archive.start_dir:
        raise ValueError("its entries are larger than the file")
    if sizes.get("data.pkl", 0) > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle has more than {MAX_PICKLE_BYTES:,} bytes")
    return sizes


class Value(NamedTuple):
    """What is known of a value that a pickle builds: how large it is as a tree of tuples."""

    size: int = 1
    content: Any = None  # of a scalar, a tuple, or a global's name


BUILT = Value(content="an ordered dictionary")


class PickleCheck:
    """Follows a pickle without building what it describes.

    Only what `torch.save` writes for plain values and tensors passes: no other opcode or global,
    no tuple that takes long to hash, no storage that differs in size from its entry.
    """

    def __init__(self, entry_sizes: dict[str, int]) -> None:
        self.entry_sizes = entry_sizes
        self.stack: list[Value] = []
        self.marks: list[int] = []
        self.memo: dict[int, Value] = {}
        self.n_builds = 0

    def run(self, pickled: bytes) -> None:
        """Raise ValueError for a pickle that does not pass."""
        try:
            for opcode, argument in _opcodes(pickled):
                if opcode in SCALARS:
                    self.stack.append(Value(1, argument))
                elif opcode in PUTS:
                    self.memo[argument] = self.stack[-1]
                else:
                    self._follow(opcode, argument)
        except (IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ValueError("its pickle is malformed") from error

    def _follow(self, opcode: int, argument: Any) -> None:
        if opcode in GETS:
            self.stack.append(self.memo[argument])
        elif opcode == MARK:
            self.marks.append(len(self.stack))
        elif opcode in TO_MARK:
            values = self._pop(len(self.stack) - self.marks.pop())
            if opcode == TUPLE:
                self._tuple(values)
        elif opcode in TUPLES:
            self._tuple(self._pop(TUPLES[opcode]))
        elif opcode in POPS and argument in (None, PROTOCOL):
            self._pop(POPS[opcode])
        elif opcode == BINPERSID:
            self._storage(*self._pop(1))
        elif opcode == REDUCE:
            self._reduce(*self._pop(2))
        elif opcode == BUILD:
            self._build(*self._pop(2))
        else:
            raise ValueError(PYTHON_OBJECTS)

    def _pop(self, n: int) -> list[Value]:
        start = len(self.stack) - n
        if not 0 <= start <= len(self.stack):
            raise IndexError
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _tuple(self, values: list[Value]) -> None:
        size = sum(value.size for value in values) + bool(values)
        if size > MAX_TUPLE_SIZE:
            raise ValueError(f"its pickle has a tuple of more than {MAX_TUPLE_SIZE} values")
        self.stack.append(Value(size, values))

    def _storage(self, reference: Value) -> None:
        kind, storage, key, _, n_items = (value.content for value in reference.content)
        if kind != b"storage" or type(key) is not bytes or type(n_items) is not int:
            raise TypeError
        name = f"data/{key[:80].decode('latin-1')}".lower()
        if self.entry_sizes.get(name) != n_items * ITEM_BYTES[storage]:
            raise ValueError(f"its entry {name!r} is missing or not of the size of its tensor")
        self.stack.append(Value())

    def _reduce(self, function: Value, arguments: Value) -> None:
        if function.content == REBUILD_TENSOR:
            self.stack.append(Value())
        elif function.content == ORDERED_DICT and arguments.size == 0:
            self.stack.append(BUILT)
        else:
            raise ValueError(PYTHON_OBJECTS)

    def _build(self, instance: Value, _: Value) -> None:
        self.n_builds += 1
        if instance is not BUILT or self.n_builds > MAX_BUILDS:
            raise ValueError(PYTHON_OBJECTS)
        self.stack.append(instance)


def _opcodes(pickled: bytes) -> Iterator[tuple[int, Any]]:
    """Yield each opcode of a pickle and its argument."""
    position, opcode = 0, 0
    while opcode != STOP:
        argument: Any = None
        opcode, position = pickled[position], position + 1
        if form := FORMS.get(opcode):
            (argument,) = form.unpack_from(pickled, position)
            position += form.size
        if opcode in LENGTHS:
            start, position = position, position + argument
            argument = pickled[start:position]
        if opcode == GLOBAL:
            lines = GLOBAL_LINES.match(pickled, position)
            position, argument = lines.end(), b" ".join(lines.groups())  # type: ignore[union-attr]
            if argument not in GLOBALS:
                raise ValueError(PYTHON_OBJECTS)
        yield opcode, argument


def _check_tensors(content: Any, n_bytes: int) -> None:
    """Check that tensors have the bytes that they claim, together at most twice the file's."""
    seen: set[int] = set()
    todo = [content]
    n_claimed = 0
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            if isinstance(value, OrderedDict) and vars(value).keys() - {"_metadata"}:
                raise ValueError("its pickle changes the attributes of a dictionary")
            todo += dict.values(value)
        elif isinstance(value, list | tuple):
            todo += value
        elif isinstance(value, Tensor):
            n_claimed += value.nbytes
            # Tied weights are two tensors over one storage.
            if value.nbytes > value.untyped_storage().nbytes() or n_claimed > 2 * n_bytes:
                raise ValueError("its tensors claim more values than it has")
