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

from nanogpt.command import make_parser, parse, run_command
from nanogpt.data.corpus import Corpus, open_corpus, read_manifest
from nanogpt.data.pretokenized import TokenShards, is_prepared
from nanogpt.data.writer import JOURNAL
from nanogpt.text import print_line
from nanogpt.tokenizer import byte_tokenizer, gpt2_tokenizer

BLOCK_TOKENS = 2**20  # read at a time
SAMPLE_CHARS = 300
SAMPLE_TOKENS = 4 * SAMPLE_CHARS  # hold that many characters even as bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = parse(parser(), arguments)
    return run_command("nanogpt.inspect", partial(show, options))


def show(options: argparse.Namespace) -> None:
    """Print what a corpus holds, or which there are."""
    for line in listing(options.data_dir) if options.path is None else report(options):
        print_line(line)


def report(options: argparse.Namespace) -> Iterator[str]:
    """Yield the facts of a corpus, samples and the state of its shards.

    Raises FileNotFoundError where there is no such path, and as `TokenShards.open` does.
    """
    path = options.path
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; pass a prepared folder, or a folder or file of token shards"
        )
    verified = "no SHA-256 is recorded for these shards; their sizes and token ids are in order"
    if options.tokenizer or not is_prepared(path):
        tokenizer = byte_tokenizer() if options.tokenizer == "byte" else gpt2_tokenizer()
        corpus = TokenShards(path).open(tokenizer, tokenizer.name)
    if is_prepared(path):
        corpus = open_corpus(path, verify=not options.no_verify)
        verified = "not verified" if options.no_verify else "all shards as recorded"
    yield str(path)
    yield from facts(corpus.manifest)
    yield from samples(corpus, options.samples)
    yield ""
    yield verified


def listing(data_dir: Path) -> Iterator[str]:
    """Yield a line for each corpus under the data directory."""
    folders = sorted(path for path in data_dir.glob("*") if path.is_dir())
    corpora = [path for path in folders if is_prepared(path) or (path / JOURNAL).exists()]
    if not corpora:
        yield f"no corpus under {data_dir}/; python -m nanogpt.prepare DATASET makes one"
    for path in corpora:
        if not is_prepared(path):
            yield f"{path}  not finished; the command that began it continues"
            continue
        manifest = read_manifest(path)
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
        tokens, n_shards = counts["tokens"], len(counts["shards"])
        text = f"{split:10} {n_shards} shard{'s' * (n_shards != 1)}, {tokens:,} tokens"
        if "documents" in counts:
            text += f", {counts['documents']:,} documents, {counts['bytes']:,} bytes of text"
            text += f", {counts['bytes'] / max(tokens, 1):.2f} bytes per token"
        yield text
    if bad := manifest.get("bad_records"):
        yield f"left out   {bad:,} records that could not be read"


def samples(corpus: Corpus, n: int) -> Iterator[str]:
    """Yield the beginnings of a few training documents, spread over the stream."""
    stream, eot_id = corpus.train, corpus.tokenizer.eot_id
    for i in range(n):
        start = len(stream) * i // n
        block = stream.read(start, min(start + BLOCK_TOKENS, len(stream)))
        ends = [*np.flatnonzero(block == eot_id).tolist(), len(block)]
        begin = ends.pop(0) + 1 if len(ends) > 1 and (start or ends[0] == 0) else 0
        text = corpus.tokenizer.decode(block[begin : ends[0]][:SAMPLE_TOKENS])
        shown = text[:SAMPLE_CHARS] + ("…" if len(text) > SAMPLE_CHARS else "")
        yield ""
        yield f"Training document at token {start + begin:,}"
        # control characters and those that turn the direction of writing could garble a terminal
        printable = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in shown)
        yield from ("  | " + line for line in printable.split("\n"))


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    what = "Show what a corpus holds, and check that its shards are as written."
    parser = make_parser("nanogpt.inspect", what, "--data-dir")
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
    return parser


if __name__ == "__main__":
    sys.exit(main())
