"""Token shards: written whole or not at all, read across their borders, refused by name."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.data.shards import (
    UINT16,
    UINT32,
    Part,
    TokenStream,
    naming_damage,
    shard_part,
    token_dtype,
)
from nanogpt.data.writer import CorpusWriter


def _write(
    directory: Path, tokens: np.ndarray, dtype: np.dtype = UINT16, shard_tokens: int = 100
) -> list[Path]:
    return _write_arrays(directory, [tokens], dtype, shard_tokens)


def _write_arrays(
    directory: Path, arrays: list[np.ndarray], dtype: np.dtype, shard_tokens: int
) -> list[Path]:
    nothing = np.empty(0, dtype=dtype)
    writer = CorpusWriter(directory, dtype, shard_tokens, settled={})
    for array in arrays:
        writer.append({"train": array, "val": nothing})
    writer.finish()
    shards = writer.progress.splits["train"].shards
    assert sum(shard.n_tokens for shard in shards) == sum(map(len, arrays))
    return [directory / shard.file for shard in shards]


def test_layout_is_that_of_llm_c(tmp_path: Path) -> None:
    (path,) = _write(tmp_path, np.array([7, 65535, 3]))
    data = path.read_bytes()
    header = np.frombuffer(data[:1024], dtype="<i4")
    assert header[:3].tolist() == [20240520, 1, 3]
    assert not header[3:].any()
    assert np.frombuffer(data[1024:], dtype="<u2").tolist() == [7, 65535, 3]


def test_wide_tokens_have_the_header_of_llm_c_for_uint32(tmp_path: Path) -> None:
    (path,) = _write(tmp_path, np.array([7, 100_000]), UINT32)
    data = path.read_bytes()
    assert np.frombuffer(data[:12], dtype="<i4").tolist() == [20240801, 7, 2]
    assert np.frombuffer(data[1024:], dtype="<u4").tolist() == [7, 100_000]
    assert TokenStream([shard_part(path)]).read(0, 2).tolist() == [7, 100_000]


def test_the_narrower_type_is_taken_where_it_holds_every_id() -> None:
    assert token_dtype(65536) == UINT16
    assert token_dtype(65537) == UINT32


@settings(deadline=None, max_examples=30)  # every shard waits for the disk
@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    shard_tokens=st.integers(8, 50),
    bounds=st.tuples(st.integers(0, 400), st.integers(0, 400)),
)
def test_stream_reads_what_was_written_over_any_border(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    shard_tokens: int,
    bounds: tuple[int, int],
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    arrays = [np.arange(n) + 1000 * i for i, n in enumerate(lengths)]
    tokens = np.concatenate([np.empty(0, dtype=np.int64), *arrays])
    paths = _write_arrays(directory, arrays, UINT16, shard_tokens)
    assert len(paths) == max(1, -(-len(tokens) // shard_tokens))
    stream = TokenStream(map(shard_part, paths))
    assert len(stream) == len(tokens)
    start, stop = sorted(min(bound, len(tokens)) for bound in bounds)
    read = stream.read(start, stop)
    assert read.dtype == np.int64
    assert read.tolist() == tokens[start:stop].tolist()


def test_stream_refuses_to_read_past_its_end(tmp_path: Path) -> None:
    stream = TokenStream(map(shard_part, _write(tmp_path, np.arange(10))))
    for start, stop in ((-1, 3), (5, 4), (0, 11)):
        with pytest.raises(IndexError):
            stream.read(start, stop)


def test_stream_travels_to_another_process_without_its_tokens(tmp_path: Path) -> None:
    stream = TokenStream(
        map(shard_part, _write(tmp_path, np.zeros(100_000, dtype=np.uint16), shard_tokens=10**6))
    )
    stream.read(0, 10)
    pickled = pickle.dumps(stream)
    assert len(pickled) < 5_000
    assert pickle.loads(pickled).read(0, 3).tolist() == [0, 0, 0]


@settings(deadline=None, max_examples=50)
@given(
    runs=st.lists(
        st.tuples(
            st.sampled_from(["<u2", "<u4", ">i2", "u1", "<i8"]),
            st.integers(0, 9),  # bytes before the run, often no multiple of a token
            st.integers(0, 30),
        ),
        max_size=5,
    ),
    bounds=st.tuples(st.integers(0, 150), st.integers(0, 150)),
)
def test_a_stream_of_parts_reads_runs_of_any_type_at_any_offset(
    tmp_path_factory: pytest.TempPathFactory,
    runs: list[tuple[str, int, int]],
    bounds: tuple[int, int],
) -> None:
    directory = tmp_path_factory.mktemp("parts")
    parts, expected = [], []
    for i, (dtype, offset_bytes, n_tokens) in enumerate(runs):
        tokens = np.arange(n_tokens) + 10 * i
        path = directory / str(i)
        path.write_bytes(b"\xff" * offset_bytes + tokens.astype(dtype).tobytes() + b"\xff" * 3)
        parts.append(Part(path, np.dtype(dtype), offset_bytes, n_tokens))
        expected += tokens.tolist()
    stream = TokenStream(parts)
    assert len(stream) == len(expected)
    start, stop = sorted(min(bound, len(expected)) for bound in bounds)
    assert stream.read(start, stop).tolist() == expected[start:stop]


def test_an_unfinished_shard_does_not_have_its_name(tmp_path: Path) -> None:
    some = np.arange(10)
    writer = CorpusWriter(tmp_path, UINT16, shard_tokens=100, settled={})
    writer.append({"train": some, "val": some})
    assert list(tmp_path.glob("*.bin")) == []
    writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "train_000000.bin",
        "val_000000.bin",
    ]


def _overwrite(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b""), "not a token shard: begins with 0"),
        (
            lambda path: _overwrite(path, b"\x80\x02ab"),
            "not a token shard: begins with",
        ),
        (lambda path: _overwrite(path, np.array([20240520, 2], "<i4").tobytes()), "version 2"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            "1043 bytes, which are not the 10 tokens",
        ),
        (
            lambda path: path.write_bytes(path.read_bytes() + b"\0\0"),
            "1046 bytes, which are not the 10 tokens",
        ),
        (
            lambda path: _overwrite(path, np.array([20240520, 1, -1], "<i4").tobytes()),
            "not the -1 tokens",
        ),
    ],
)
def test_damaged_shards_are_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    (path,) = _write(tmp_path, np.arange(10))
    damage(path)
    with pytest.raises(ValueError, match=words) as error, naming_damage(path, "fetch it again"):
        shard_part(path)
    assert str(error.value).startswith(f"{path} cannot be read (")
    assert str(error.value).endswith("; fetch it again")
    assert "\n" not in str(error.value)
