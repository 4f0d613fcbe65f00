"""Archives that claim what they do not hold are refused before they cost anything."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt.archive import PickleCheck, load_archive

Entries = list[tuple[zipfile.ZipInfo, bytes]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save({"a": torch.arange(6.0).view(2, 3), "b": [1, (2.5, None)]}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def rewritten(path: Path, change: Callable[[Entries], Entries], **options: Any) -> Path:
    """Write the archive's entries again, changed."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in change(entries):
            archive.writestr(entry.filename, content, **options)
    return path


def pickled(*opcodes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(opcodes) + b"."


def test_what_was_saved_comes_back(path: Path) -> None:
    content = load_archive(path)
    assert content["b"] == [1, (2.5, None)]
    assert torch.equal(content["a"], torch.arange(6.0).view(2, 3))


def test_an_archive_written_by_another_program_is_read(path: Path) -> None:
    assert load_archive(rewritten(path, lambda entries: entries))["b"] == [1, (2.5, None)]


def test_compressed_entries_are_refused(path: Path) -> None:
    rewritten(path, lambda entries: entries, compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed or encrypted"):
        load_archive(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_of_one_name_are_refused(path: Path) -> None:
    rewritten(path, lambda entries: [*entries, entries[-1]])
    with pytest.raises(ValueError, match="occurs twice"):
        load_archive(path)


def test_entries_that_differ_in_case_alone_are_refused(path: Path) -> None:
    def doubled(entries: Entries) -> Entries:
        other = zipfile.ZipInfo(entries[0][0].filename.replace("data.pkl", "DATA.PKL"))
        return [*entries, (other, entries[0][1])]

    with pytest.raises(ValueError, match="occurs twice"):
        load_archive(rewritten(path, doubled))


def test_an_entry_said_to_be_compressed_to_its_own_size_is_refused(path: Path) -> None:
    data = rewritten(path, lambda entries: entries).read_bytes()
    start, _ = directory(data)
    method = start + 10  # of the first entry in the directory
    path.write_bytes(data[:method] + struct.pack("<H", 8) + data[method + 2 :])
    with pytest.raises(ValueError, match="is compressed or encrypted"):
        load_archive(path)


def directory(data: bytes) -> tuple[int, int]:
    """Return where the directory of a small archive begins and ends."""
    size, start = struct.unpack("<II", data[-10:-2])
    return start, start + size


@pytest.mark.parametrize("n_copies", [2, 2000])
def test_entries_that_share_their_bytes_are_refused(path: Path, n_copies: int) -> None:
    data = rewritten(path, lambda entries: entries).read_bytes()
    start, end = directory(data)
    first = data[start : data.index(b"PK\1\2", start + 4)]
    copies = [first.replace(b"data.pkl", b"%08d" % i) for i in range(n_copies)]
    listed = data[start:end] + b"".join(copies)
    n = data[start:end].count(b"PK\1\2") + n_copies
    ending = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, n, n, len(listed), start, 0)
    path.write_bytes(data[:start] + listed + ending)
    with pytest.raises(ValueError, match="overlaps another one"):
        load_archive(path)


@pytest.mark.parametrize("size", [10**6, 2**32 - 1])
def test_an_entry_larger_than_the_file_is_refused(path: Path, size: int) -> None:
    data = bytearray(rewritten(path, lambda entries: entries).read_bytes())
    last = data.rindex(b"PK\1\2")
    data[last + 20 : last + 28] = struct.pack("<II", size, size)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"larger than the file|directory"):
        load_archive(path)


@pytest.mark.parametrize("before", [b"#!/bin/sh\n", b"PK\3\4"])
def test_an_archive_that_begins_later_is_refused(path: Path, before: bytes) -> None:
    path.write_bytes(before + path.read_bytes())
    with pytest.raises(ValueError, match="directory"):
        load_archive(path)


def test_a_comment_after_the_directory_is_refused(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-2] + b"\x03\x00abc")
    with pytest.raises(ValueError, match="directory"):
        load_archive(path)


def test_a_directory_out_of_proportion_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanogpt.archive.MAX_DIRECTORY_BYTES", 200)
    with pytest.raises(ValueError, match="its directory has"):
        load_archive(path)


def test_a_pickle_out_of_proportion_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanogpt.archive.MAX_PICKLE_BYTES", 20)
    with pytest.raises(ValueError, match="its pickle has more than 20 bytes"):
        load_archive(path)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="no regular file"):
        load_archive(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**6), torch.zeros(4).as_strided((3, 2), (1, 1))],
    ids=["stride 0", "rows that overlap"],
)
def test_tensors_of_more_values_than_their_storage_are_refused(
    tensor: torch.Tensor, tmp_path: Path
) -> None:
    torch.save([tensor], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="claim more values"):
        load_archive(tmp_path / "a.pt")


def test_many_tensors_over_one_storage_are_refused(tmp_path: Path) -> None:
    storage = torch.zeros(1000)
    torch.save([storage.view(1000) for _ in range(100)], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="claim more values"):
        load_archive(tmp_path / "a.pt")


def test_a_view_of_a_larger_tensor_is_read(tmp_path: Path) -> None:
    torch.save(torch.arange(100.0)[3:5], tmp_path / "a.pt")
    assert load_archive(tmp_path / "a.pt").tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
        lambda: torch.nn.Parameter(torch.zeros(3)),
        lambda: torch.zeros(3, dtype=torch.complex64),
    ],
    ids=["sparse", "meta", "quantised", "parameter", "complex"],
)
@pytest.mark.filterwarnings("ignore")
def test_other_kinds_of_tensors_are_refused(
    make: Callable[[], torch.Tensor], tmp_path: Path
) -> None:
    torch.save({"a": make()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="Python objects"):
        load_archive(tmp_path / "a.pt")


def test_a_storage_of_another_size_than_its_entry_is_refused(path: Path) -> None:
    def grown(entries: Entries) -> Entries:
        return [(e, c * 2 if e.filename.endswith("data/0") else c) for e, c in entries]

    with pytest.raises(ValueError, match="not of the size of its tensor"):
        load_archive(rewritten(path, grown))


SHARED_TUPLE = b")" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(60))
HOSTILE = {
    "an array of 10**12 bytes": b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    "an uninitialised tensor": b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R",
    "a tuple that shares its parts as a key": b"}" + SHARED_TUPLE + b"K\x01s",
    "a tuple nested deeply": b"}" + b")" + b"\x85" * 10**6 + b"K\x01s",
    "a long tuple": b"(" + b"K\x01" * 100 + b"t",
    "a call of a list that shares its parts": b"]" + b"q\x00a" * 3 + b")R",
    "an attribute of a dictionary": b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsNsb" * 9,
    "a state set on a tensor": b"}}b",
    "a dictionary made of a list": b"ccollections\nOrderedDict\n]\x85R",
    "an object made anew": b"ccollections\nOrderedDict\n)\x81",
    "a set": b"\x8f",
    "nothing on the stack": b"a",
    "an unknown place in the memo": b"hA",
    "a mark that is missing": b"Nt",
    "a long text that is cut": b"X\xff\xff\xff\x7fabc",
    "another protocol": b"\x80\x04N",
    "a name without an end": b"ctorch",
}


@pytest.mark.parametrize("opcodes", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_pickle_of_anything_else_is_refused(opcodes: bytes) -> None:
    with pytest.raises(ValueError, match=r"Python objects|malformed|tuple of more than"):
        PickleCheck({}).run(pickled(opcodes))


def test_attributes_of_a_dictionary_are_refused(tmp_path: Path) -> None:
    content: Any = OrderedDict(a=1)
    content.other = 5  # as well as items, which could not be saved
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="attributes of a dictionary"):
        load_archive(tmp_path / "a.pt")


def test_the_pickle_of_a_module_s_weights_passes() -> None:
    file = io.BytesIO()
    torch.save({"w": torch.nn.Linear(2, 2).state_dict(), "betas": (0.9, 0.95)}, file)
    with zipfile.ZipFile(file) as archive:
        sizes = {e.filename.partition("/")[2]: e.file_size for e in archive.infolist()}
        PickleCheck(sizes).run(archive.read("archive/data.pkl"))


def test_a_list_within_itself_is_read(tmp_path: Path) -> None:
    content: list[Any] = []
    content.append(content)
    torch.save(content, tmp_path / "a.pt")
    back = load_archive(tmp_path / "a.pt")
    assert back[0] is back


def test_pickles_alone_are_no_archives(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="another kind of file"):
        load_archive(tmp_path / "a.pt")


def test_tied_weights_are_read(tmp_path: Path) -> None:
    weight = torch.arange(6000.0)
    torch.save({"wte": weight, "lm_head": weight.detach()}, tmp_path / "a.pt")
    content = load_archive(tmp_path / "a.pt")
    assert torch.equal(content["wte"], weight)
    assert torch.equal(content["lm_head"], weight)
