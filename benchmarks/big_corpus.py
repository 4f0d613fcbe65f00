"""What 10 billion tokens cost: opening, the first batch, random rows, memory, and the shuffle.

    python benchmarks/big_corpus.py [--dir DIR] [--shards 100] [--steps 5000]

The set is 100 shards of 100 million uint16 tokens with llm.c's header, as sparse files (20 GB that
take no room on the disk), with a few marked tokens at the very end. Every row of the table is a
process of its own; memory is what a process has resident above what it had after its imports.

On two busy cores: opening 0.73 s where ids have to be checked and 0.01 s where a manifest vouches
for them, the first batch 0.02 s, 6 MB. 32,000 random rows, in rows/s and MB held at the end:
os.pread 64,000 to 84,000 and 0, TokenStream 23,000 to 25,000 and 0, batches of CorpusDataModule
7,000 to 8,000 and 4. A pass of 9.67 million rows is shuffled at 4 to 7 million rows/s and holds
each once.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from nanogpt.data.corpus import FORMAT, Corpus
from nanogpt.data.module import CorpusDataModule, TokenizerChoice
from nanogpt.data.order import permute
from nanogpt.data.pretokenized import TokenShards
from nanogpt.data.shards import HEADER_BYTES, HEADER_INTS, MAGIC_AND_VERSION, UINT16
from nanogpt.tokenizer import byte_tokenizer

SHARD_TOKENS = 100_000_000
BLOCK_SIZE = 1024
ROWS_PER_STEP = 16
MARKS = np.array([11, 22, 33, 44, 55], dtype=np.uint16)
CHUNK = 100_000  # positions permuted at a time


def main() -> int:
    options = _parser().parse_args()
    with _directory(options.dir) as directory:
        make_set(directory, options.shards)
        n_tokens = options.shards * SHARD_TOKENS
        print(
            f"{n_tokens:,} tokens in {options.shards} shards, {2 * n_tokens / 1e9:.0f} GB, sparse"
        )
        for name in ("shards of others", "prepared here"):
            if name == "prepared here":
                write_manifest(directory, options.shards)
            _show(f"open, {name}, first batch", _alone(first_batch, directory, options.steps))
        print(f"{options.steps:,} steps of {ROWS_PER_STEP} random rows of {BLOCK_SIZE + 1} tokens:")
        _alone(read_by_pread, directory, options.steps)  # brings the pages into the system's cache
        for name, read in READERS.items():
            _show(f"  {name}", _alone(read, directory, options.steps))
        _show("a whole pass shuffled", _alone(whole_pass, directory, options.steps))
    return 0


def make_set(directory: Path, n_shards: int) -> None:
    """Write the shards, empty but for their headers and the marks at the end of the last."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = (*MAGIC_AND_VERSION[UINT16], SHARD_TOKENS)
    for path in _paths(directory, n_shards):
        path.write_bytes(header.tobytes())
        os.truncate(path, HEADER_BYTES + 2 * SHARD_TOKENS)
    with path.open("r+b") as file:
        file.seek(-MARKS.nbytes, os.SEEK_END)
        file.write(MARKS.tobytes())


def write_manifest(directory: Path, n_shards: int) -> None:
    """Let the shards pass for a corpus that was prepared here; their hashes are made up."""
    recorded = [
        {"file": path.name, "n_tokens": SHARD_TOKENS, "sha256": "0" * 64}
        for path in _paths(directory, n_shards)
    ]
    tokenizer = byte_tokenizer()
    manifest = {
        "format": FORMAT,
        "source": {"name": "sparse", "fingerprint": "0"},
        "split": {"val_fraction": 0.001},
        "tokenizer": {"key": "byte", "fingerprint": tokenizer.fingerprint},
        "splits": {"train": {"shards": recorded[:-1]}, "val": {"shards": recorded[-1:]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer.record()))
    (directory / "manifest.json").write_text(json.dumps(manifest))


def first_batch(directory: Path, steps: int) -> str:
    """Open the set, take the first batch, and read the marks at the end."""
    began, before = time.perf_counter(), _resident_mb()
    corpus = _open(directory)
    opened = time.perf_counter()
    next(iter(_module(corpus).train_dataloader()))
    batch = time.perf_counter()
    marks = corpus.val.read(len(corpus.val) - len(MARKS), len(corpus.val))
    read = time.perf_counter()
    assert marks.tolist() == MARKS.tolist()
    return (
        f"open {opened - began:.2f} s, first batch {batch - opened:.2f} s, "
        f"the very end {1e3 * (read - batch):.1f} ms, {_resident_mb() - before:.0f} MB"
    )


def read_by_module(directory: Path, steps: int) -> str:
    """Take batches as training does: order, windows, stream, tensors."""
    batches = iter(_module(_open(directory), max_steps=steps).train_dataloader())
    return _timed(lambda step: next(batches), steps)


def read_by_stream(directory: Path, steps: int) -> str:
    """Read the stream alone."""
    stream = _open(directory).train
    return _read_rows(lambda start: stream.read(start, start + BLOCK_SIZE + 1), steps, len(stream))


def read_by_pread(directory: Path, steps: int) -> str:
    """Read with os.pread into the same array type: the yardstick."""
    files = [os.open(path, os.O_RDONLY) for path in sorted(directory.glob("*.bin"))]

    def read(start: int) -> np.ndarray:
        shard, offset = divmod(start, SHARD_TOKENS)  # the few rows over a border are cut
        data = os.pread(files[shard], 2 * (BLOCK_SIZE + 1), HEADER_BYTES + 2 * offset)
        return np.frombuffer(data, UINT16).astype(np.int64)

    return _read_rows(read, steps, len(_open(directory).train))


def whole_pass(directory: Path, steps: int) -> str:
    """Permute every position of a pass, in chunks, and see that every row comes once."""
    n_rows = len(_module(_open(directory)).train_rows)
    seen = np.zeros(n_rows, dtype=bool)
    began = time.perf_counter()
    for start in range(0, n_rows, CHUNK):
        seen[permute(np.arange(start, min(start + CHUNK, n_rows)), n_rows, "0/corpus/0")] = True
    took_s = time.perf_counter() - began
    assert seen.all()
    return f"{n_rows:,} rows, each once, {n_rows / took_s / 1e6:.1f} M rows/s"


READERS: dict[str, Callable[[Path, int], str]] = {
    "os.pread": read_by_pread,
    "TokenStream": read_by_stream,
    "batches of CorpusDataModule": read_by_module,
}


def _read_rows(read: Callable[[int], object], steps: int, n_tokens: int) -> str:
    rows = np.random.default_rng(0).integers(0, n_tokens // BLOCK_SIZE - 1, (steps, ROWS_PER_STEP))
    starts = (rows * BLOCK_SIZE).tolist()
    return _timed(lambda step: [read(start) for start in starts[step]], steps)


def _timed(take: Callable[[int], object], steps: int) -> str:
    began, before = time.perf_counter(), _resident_mb()
    most = before
    for step in range(steps):
        take(step)
        if step % 20 == 0:
            most = max(most, _resident_mb())
    rows_per_s = steps * ROWS_PER_STEP / (time.perf_counter() - began)
    return (
        f"{rows_per_s:,.0f} rows/s, resident {before:.0f} MB before, "
        f"{most - before:+.0f} at most, {_resident_mb() - before:+.0f} after"
    )


def _open(directory: Path) -> Corpus:
    tokenizer = byte_tokenizer()
    return TokenShards(directory).open(tokenizer, tokenizer.name)


def _module(corpus: Corpus, max_steps: int = 1) -> CorpusDataModule:
    module = CorpusDataModule(
        source=TokenShards(corpus.directory),
        data_dir=corpus.directory,
        block_size=BLOCK_SIZE,
        tokens_per_step=ROWS_PER_STEP * BLOCK_SIZE,
        seed=0,
    )
    module.use_tokenizer(TokenizerChoice.from_tokenizer(corpus.tokenizer))
    module.micro_batch = ROWS_PER_STEP
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=0, max_steps=max_steps, global_rank=0, world_size=1, strategy=strategy
    )
    return module


def _alone(function: Callable[[Path, int], str], directory: Path, steps: int) -> str:
    """Call a function in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (directory, steps))


def _resident_mb() -> float:
    """Return the memory of this process, Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def _paths(directory: Path, n_shards: int) -> list[Path]:
    return [directory / f"train_{i:06d}.bin" for i in range(n_shards)]


def _show(name: str, values: str) -> None:
    print(f"{name:38} {values}", flush=True)


@contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(dir=given))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dir", type=Path, help="where to put the set (default: the system's)")
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--steps", type=int, default=5000)
    return parser


if __name__ == "__main__":
    sys.exit(main())
