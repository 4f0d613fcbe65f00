"""Show what a corpus holds, and check that its shards are as they were written.

    python -m nanogpt.inspect data/fineweb_edu-gpt2-0123abcd
    python -m nanogpt.inspect edu_fineweb10B --tokenizer gpt2 --samples 5
    python -m nanogpt.inspect

PATH is a prepared folder, or a folder or file of token shards made elsewhere. Without it the
corpora under data/ are listed.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nanogpt.command import add_shared, guard_output, parse, run_command
from nanogpt.data.corpus import Corpus, open_corpus, read_json
from nanogpt.data.pretokenized import TokenShards, is_prepared
from nanogpt.data.shards import REMEDY
from nanogpt.data.source import file_sha256
from nanogpt.data.windows import Tokens
from nanogpt.data.writer import JOURNAL
from nanogpt.text import print_line
from nanogpt.tokenizer import byte_tokenizer, gpt2_tokenizer

BLOCK_TOKENS = 2**20  # read at a time
COUNTED_TOKENS = 100_000_000  # of longer splits, blocks spread over them are counted
COUNTED_BLOCKS = 64
SAMPLE_CHARS = 300
SAMPLE_TOKENS = 4 * SAMPLE_CHARS  # hold that many characters even as bytes
BAR_WIDTH = 40


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    guard_output(raises=True)
    options = parse(parser(), arguments)
    return run_command("nanogpt.inspect", partial(show, options))


def show(options: argparse.Namespace) -> None:
    """Print what a corpus holds, or which there are."""
    if options.path is None:
        lines = listing(options.data_dir)
    else:
        corpus = open_any(options.path, options.tokenizer)
        lines = report(options.path, corpus, options.samples, with_shards=not options.no_verify)
    for line in lines:
        print_line(line)


def report(path: Path, corpus: Corpus, n_samples: int, *, with_shards: bool) -> Iterator[str]:
    """Yield the facts of a corpus, its document lengths, samples and the state of its shards."""
    yield str(path)
    yield from facts(corpus.manifest)
    yield from histogram(corpus.train, corpus.tokenizer.eot_id)
    yield from samples(corpus, n_samples)
    yield ""
    yield verify(corpus) if with_shards else "not verified"


def open_any(path: Path, tokenizer: str | None) -> Corpus:
    """Open a prepared corpus with its own tokenizer, and shards of others with the one named.

    Raises FileNotFoundError where there is no such path.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; pass a prepared folder, or a folder or file of token shards"
        )
    if tokenizer is None and is_prepared(path):
        return open_corpus(path)
    made = byte_tokenizer() if tokenizer == "byte" else gpt2_tokenizer()
    return TokenShards(path).open(made, made.name)


def listing(data_dir: Path) -> Iterator[str]:
    """Yield a line for each corpus under the data directory."""
    folders = [path for path in sorted(data_dir.glob("*")) if path.is_dir()]
    corpora = [path for path in folders if is_prepared(path) or (path / JOURNAL).exists()]
    if not corpora:
        yield f"no corpus under {data_dir}/; python -m nanogpt.prepare DATASET makes one"
    for path in corpora:
        if not is_prepared(path):
            yield f"{path}  not finished; the command that began it continues"
            continue
        manifest = read_json(path / "manifest.json")
        tokens = {split: counts["tokens"] for split, counts in manifest["splits"].items()}
        yield (
            f"{path}  {manifest['tokenizer']['key']}, {tokens['train']:,} training and "
            f"{tokens['val']:,} validation tokens"
        )


def facts(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the source, the tokenizer and the splits of a manifest, a line each."""
    source, tokenizer = manifest["source"], manifest["tokenizer"]
    keys = [
        f"{key}={value}"
        for key, value in source.items()
        if key not in ("name", "fingerprint") and value is not None
    ]
    yield f"source     {', '.join([source['name'], *keys])}"
    yield f"tokenizer  {tokenizer['key']}, {tokenizer['vocab_size']:,} ids"
    for split, counts in manifest["splits"].items():
        yield f"{split:10} {_counts(counts)}"
    if bad := manifest.get("bad_records"):
        yield f"left out   {bad:,} records that could not be read"


def histogram(stream: Tokens, eot_id: int) -> Iterator[str]:
    """Yield how many documents of the stream have which length, in powers of two."""
    counts = document_lengths(stream, eot_id)
    whole = len(stream) <= COUNTED_TOKENS
    read = len(stream) if whole else COUNTED_BLOCKS * BLOCK_TOKENS
    yield ""
    yield (
        f"Length in tokens of {counts.sum():,} training documents"
        + ("" if whole else f", sampled: those that lie whole in {read:,} of the tokens")
    )
    powers = np.flatnonzero(counts)
    for power in range(powers.min(), powers.max() + 1) if len(powers) else ():
        bar = "#" * -(-BAR_WIDTH * int(counts[power]) // int(counts.max()))
        yield f"{2**power:>11,} .. {2 ** (power + 1) - 1:<11,} {counts[power]:>11,} {bar}".rstrip()


def document_lengths(stream: Tokens, eot_id: int) -> np.ndarray:
    """Return how many documents have 2**k up to 2**(k+1) - 1 tokens, (64,) int64 by k.

    A document is what lies between two `<|endoftext|>`. Of a stream above `COUNTED_TOKENS` only
    evenly spaced blocks are read, and what reaches over their edges is not counted.
    """
    counts = np.zeros(64, dtype=np.int64)
    n_tokens = len(stream)
    if n_tokens > COUNTED_TOKENS:
        for start in np.linspace(0, n_tokens - BLOCK_TOKENS, COUNTED_BLOCKS).astype(int).tolist():
            ends = np.flatnonzero(stream.read(start, start + BLOCK_TOKENS) == eot_id)
            counts += _by_power(np.diff(ends) - 1)
        return counts
    starts = range(0, n_tokens, BLOCK_TOKENS)
    blocks = (stream.read(start, min(start + BLOCK_TOKENS, n_tokens)) for start in starts)
    found = [start + np.flatnonzero(b == eot_id) for start, b in zip(starts, blocks, strict=True)]
    ends = np.concatenate([[-1], *found, [n_tokens]])
    return counts + _by_power(np.diff(ends) - 1)


def samples(corpus: Corpus, n: int) -> Iterator[str]:
    """Yield the beginnings of a few training documents, spread over the stream."""
    for i in range(n):
        start = _next_document(corpus.train, len(corpus.train) * i // n, corpus.tokenizer.eot_id)
        yield ""
        yield f"Training document at token {start:,}"
        yield from ("  | " + line for line in _beginning(corpus, start).split("\n"))


def verify(corpus: Corpus) -> str:
    """Compare the SHA-256 of every shard with the manifest's; return what was found.

    Raises ValueError, naming the files, where some are not as they were written.
    """
    shards = [
        (corpus.directory / shard["file"], shard.get("sha256"))
        for split in corpus.manifest["splits"].values()
        for shard in split["shards"]
    ]
    if any(sha256 is None for _, sha256 in shards):
        return "no SHA-256 is recorded for these shards; their sizes and token ids are in order"
    n_bytes = sum(path.stat().st_size for path, _ in shards)
    with tqdm(total=n_bytes, desc="verifying", unit="B", unit_scale=True, disable=None) as bar:
        damaged = [path.name for path, sha256 in shards if file_sha256(path, bar.update) != sha256]
    if damaged:
        raise ValueError(
            f"{', '.join(damaged)} in {corpus.directory} changed since written: not the SHA-256 "
            f"in the manifest; {REMEDY}"
        )
    return f"{len(shards)} shard{'s' * (len(shards) != 1)} as recorded"


def _counts(counts: Mapping[str, Any]) -> str:
    tokens, n_bytes, documents = counts["tokens"], counts["bytes"], counts["documents"]
    n_shards = len(counts["shards"])
    parts = [f"{n_shards} shard{'s' * (n_shards != 1)}", f"{tokens:,} tokens"]
    if documents is not None:
        parts.append(f"{documents:,} documents")
    if n_bytes is not None:
        parts.append(f"{n_bytes:,} bytes of text, {n_bytes / max(tokens, 1):.2f} bytes per token")
    return ", ".join(parts)


def _by_power(lengths: np.ndarray) -> np.ndarray:
    exponents = np.frexp(lengths[lengths > 0])[1]  # 2**(e-1) <= length < 2**e
    return np.bincount(exponents - 1, minlength=64)


def _next_document(stream: Tokens, position: int, eot_id: int) -> int:
    """Return where the first document after a position begins, or the position if none does."""
    if position == 0:
        return int(stream.read(0, 1)[0] == eot_id) if len(stream) else 0
    stop = min(position + BLOCK_TOKENS, len(stream))
    ends = np.flatnonzero(stream.read(position, stop) == eot_id)
    return position + int(ends[0]) + 1 if len(ends) else position


def _beginning(corpus: Corpus, start: int) -> str:
    ids = corpus.train.read(start, min(start + SAMPLE_TOKENS, len(corpus.train)))
    ends = np.flatnonzero(ids == corpus.tokenizer.eot_id)
    text = corpus.tokenizer.decode(ids[: ends[0]] if len(ends) else ids)
    shown = text[:SAMPLE_CHARS] + ("…" if len(text) > SAMPLE_CHARS else "")
    # control characters and those that turn the direction of writing could garble a terminal
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in shown)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m nanogpt.inspect",
        description="Show what a corpus holds, and check that its shards are as written.",
    )
    parser.add_argument(
        "path",
        nargs="?",
        type=Path,
        help="a prepared folder, or a folder or file of token shards (default: list all)",
    )
    parser.add_argument(
        "--tokenizer",
        choices=("gpt2", "byte"),
        help="that made the shards (default: the recorded one, or gpt2)",
    )
    parser.add_argument("--samples", type=int, default=3, help="documents to show (default 3)")
    parser.add_argument("--no-verify", action="store_true", help="read no shard as a whole")
    add_shared(parser, "--data-dir")
    return parser


if __name__ == "__main__":
    sys.exit(main())
