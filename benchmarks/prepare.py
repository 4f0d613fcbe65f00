"""Tokenizing a corpus: ours against tiktoken's own batch call and Hugging Face's tokenizers.

    python benchmarks/prepare.py --text PAGES.parquet [--megabytes 200] [--threads 2] [--rounds 3]
    python benchmarks/prepare.py --text PAGES.parquet --memory 50,500

The text is that of a parquet file's `text` column, repeated in another order until it is large
enough. The rivals take turns, several rounds, in one process. What is timed of ours is everything:
reading parquet, splitting, tokenizing, writing shards and their hashes, the manifest. tiktoken's
`encode_ordinary_batch` and tokenizers' `encode_batch` get the texts in memory and keep lists of
ids in memory. With `--memory`, the peak of a process that prepares that many megabytes.

GPT-2's vocabulary comes from TIKTOKEN_CACHE_DIR.
"""

import argparse
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nanogpt.data.preparing import Preparation, prepare
from nanogpt.data.text import TextFiles
from nanogpt.tokenizer import gpt2_tokenizer

BATCH_DOCUMENTS = 1000  # of a call of the rivals
# The kernel's own mark: getrusage counts what the parent held before the child became a program.
MEASURED = """
import sys
from nanogpt.prepare import main
assert main(sys.argv[1:]) == 0
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def main() -> None:
    options = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.memory:
            for megabytes in (int(size) for size in options.memory.split(",")):
                path, _ = write_text(options.text, megabytes, Path(folder))
                print(
                    f"{megabytes} MB of text: {peak_of(path, options.threads):.0f} MB at the peak"
                )
        else:
            compare(options, Path(folder))


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Time the rivals in turns and print the rates of all rounds and ours over tiktoken's."""
    path, texts = write_text(options.text, options.megabytes, folder)
    rivals: dict[str, Callable[[], int]] = {
        "nanogpt.prepare": lambda: prepared(path, folder / "data", options.threads),
        "tiktoken encode_ordinary_batch": lambda: by_tiktoken(texts, options.threads),
    }
    if options.tokenizers:
        rivals["tokenizers encode_batch"] = lambda: by_tokenizers(texts, options.tokenizers)
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(options.rounds):
        for name, rival in rivals.items():
            began = time.perf_counter()
            n_tokens = rival()
            rates[name].append(n_tokens / (time.perf_counter() - began) / 1e6)
            print(f"{name}: {rates[name][-1]:.2f} M tokens/s", flush=True)
    ours, theirs = list(rates.values())[:2]
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(
        f"ours over tiktoken's: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f}-{max(ratios):.2f}) on {options.threads} threads"
    )


def write_text(source: Path, megabytes: int, folder: Path) -> tuple[Path, list[str]]:
    """Write a parquet file of so much text; return it and its texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pages = pq.read_table(source, columns=["text"]).column("text").to_pylist()
    order, n_bytes = random.Random(0), 0
    texts: list[str] = []
    path = folder / f"text-{megabytes}.parquet"
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        while n_bytes < megabytes * 10**6:
            order.shuffle(pages)
            # a number makes each text one of its own, as hashes decide on the split
            batch = [f"{len(texts) + i}. {page}" for i, page in enumerate(pages)]
            writer.write_table(pa.table({"text": batch}))
            texts += batch
            n_bytes += sum(len(text.encode()) for text in batch)
    return path, texts


def prepared(path: Path, data_dir: Path, threads: int) -> int:
    """Prepare the file anew; return the number of tokens."""
    shutil.rmtree(data_dir, ignore_errors=True)
    corpus = prepare(
        Preparation(TextFiles(path), gpt2_tokenizer, "gpt2", data_dir, workers=threads)
    )
    return len(corpus.train) + len(corpus.val)


def by_tiktoken(texts: list[str], threads: int) -> int:
    import tiktoken

    encode = tiktoken.get_encoding("gpt2").encode_ordinary_batch
    batches = range(0, len(texts), BATCH_DOCUMENTS)
    return sum(
        len(ids)
        for i in batches
        for ids in encode(texts[i : i + BATCH_DOCUMENTS], num_threads=threads)
    )


def by_tokenizers(texts: list[str], file: Path) -> int:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    batches = range(0, len(texts), BATCH_DOCUMENTS)
    return sum(
        len(encoding.ids)
        for i in batches
        for encoding in tokenizer.encode_batch(texts[i : i + BATCH_DOCUMENTS])
    )


def peak_of(path: Path, threads: int) -> float:
    """Return the megabytes that a process held at most while it prepared the file (Linux)."""
    with tempfile.TemporaryDirectory() as out:
        words = [str(path), "--out", out, "--workers", str(threads)]
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *words], check=True, text=True, capture_output=True
        )
    return int(done.stdout.split()[-2]) / 1024


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time the preparation of a corpus.")
    parser.add_argument("--text", type=Path, required=True, help="a parquet file with column text")
    parser.add_argument("--megabytes", type=int, default=200, help="of text (default 200)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizers", type=Path, help="GPT-2's tokenizer.json, as a third rival")
    parser.add_argument("--memory", help="megabytes of text, such as 50,500: measure peaks instead")
    return parser


if __name__ == "__main__":
    main()
