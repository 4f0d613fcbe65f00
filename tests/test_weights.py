"""Files of weights: what is damaged, or holds more than weights, is refused in one sentence."""

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt.model import GPT, GPTConfig
from nanogpt.weights import check_weights, load_archive

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


def test_what_was_saved_comes_back(path: Path) -> None:
    content = load_archive(path)
    assert content["b"] == [1, (2.5, None)]
    assert torch.equal(content["a"], torch.arange(6.0).view(2, 3))


def test_an_archive_written_by_another_program_is_read(path: Path) -> None:
    assert load_archive(rewritten(path, lambda entries: entries))["b"] == [1, (2.5, None)]


def test_compressed_entries_are_refused(path: Path) -> None:
    rewritten(path, lambda entries: entries, compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="are compressed"):
        load_archive(path)


def test_a_small_file_of_large_entries_is_refused(path: Path) -> None:
    def grown(entries: Entries) -> Entries:
        return [(entry, bytes(2**20)) for entry, _ in entries]

    rewritten(path, grown, compress_type=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**16
    with pytest.raises(ValueError, match="larger than the file"):
        load_archive(path)


@pytest.mark.parametrize("size", [10**6, 2**32 - 1])
def test_an_entry_larger_than_the_file_is_refused(path: Path, size: int) -> None:
    data = bytearray(rewritten(path, lambda entries: entries).read_bytes())
    last = data.rindex(b"PK\1\2")
    data[last + 20 : last + 28] = struct.pack("<II", size, size)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is truncated, altered"):
        load_archive(path)


def test_a_file_that_lost_bytes_is_refused(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:100] + content[140:])
    with pytest.raises(ValueError, match="truncated, altered"):
        load_archive(path)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="no regular file"):
        load_archive(tmp_path / "a.pt")


def test_a_view_of_a_larger_tensor_is_read(tmp_path: Path) -> None:
    torch.save(torch.arange(100.0)[3:5], tmp_path / "a.pt")
    assert load_archive(tmp_path / "a.pt").tolist() == [3.0, 4.0]


MODULE = b"cos\nsystem\n"
HOSTILE = {
    "a call": MODULE + b"X\x0b\x00\x00\x00touch pwned\x85R",
    "a call by name": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch pwned\x85R",
    "an instance": MODULE + b"(X\x0b\x00\x00\x00touch pwnedo",
    "an object made anew": b"cpathlib\nPath\n)\x81",
    "a function of torch": b"ctorch\nload\nX\x04\x00\x00\x00a.pt\x85R",
    "a state set on a value": b"}}b",
    "nothing on the stack": b"a",
    "an unknown place in the memo": b"hA",
    "a mark that is missing": b"Nt",
    "a text that is cut": b"X\xff\xff\xff\x7fabc",
    "a name without an end": b"ctorch",
}


@pytest.mark.parametrize("opcodes", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_pickle_of_anything_else_is_refused(
    opcodes: bytes, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(entries: Entries) -> Entries:
        pickled = b"\x80\x02" + opcodes + b"."
        return [(e, pickled if e.filename.endswith("data.pkl") else c) for e, c in entries]

    monkeypatch.chdir(path.parent)
    with pytest.raises(ValueError, match="holds Python objects"):
        load_archive(rewritten(path, replaced))
    assert not Path("pwned").exists()


def test_a_list_within_itself_is_read(tmp_path: Path) -> None:
    content: list[Any] = []
    content.append(content)
    torch.save(content, tmp_path / "a.pt")
    back = load_archive(tmp_path / "a.pt")
    assert back[0] is back


def test_pickles_alone_are_no_archives(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="of another kind"):
        load_archive(tmp_path / "a.pt")


def test_tied_weights_are_read(tmp_path: Path) -> None:
    weight = torch.arange(6000.0)
    torch.save({"wte": weight, "lm_head": weight.detach()}, tmp_path / "a.pt")
    content = load_archive(tmp_path / "a.pt")
    assert torch.equal(content["wte"], weight)
    assert torch.equal(content["lm_head"], weight)


CONFIG = GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=1, n_embd=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: torch.zeros(1).expand(t.shape), "more values than it stores"),
        (lambda t: t.to_sparse(), "for wte.weight where numbers are floating-point"),
        (lambda t: t.to("meta"), "for wte.weight where numbers are floating-point"),
        (lambda t: t.to(torch.complex64), "has torch.complex64 for wte.weight"),
        (lambda t: t.to(torch.int64), "has torch.int64 for wte.weight"),
    ],
    ids=["repeated", "sparse", "meta", "complex", "int64"],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_of_another_kind_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], message: str, tmp_path: Path
) -> None:
    weights = GPT(CONFIG).state_dict()
    weights["wte.weight"] = change(weights["wte.weight"])
    torch.save(dict(weights), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        check_weights(load_archive(tmp_path / "a.pt"), CONFIG, None)


def test_many_weights_over_one_storage_are_refused() -> None:
    config = replace(CONFIG, n_layer=9)
    shared = torch.zeros(config.vocab_size * config.n_embd)
    weights = {
        name: shared[: tensor.numel()].view(tensor.shape)
        for name, tensor in GPT(config).state_dict().items()
    }
    with pytest.raises(ValueError, match="more values than it stores"):
        check_weights(weights, config, None)
