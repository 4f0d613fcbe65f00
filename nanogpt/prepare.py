"""Prepare ahead of time what training needs: a corpus as token shards, or published weights.

    python -m nanogpt.prepare fineweb_edu --tokens 1B
    python -m nanogpt.prepare owner/name --subset en --text-column content
    python -m nanogpt.prepare --path pages.parquet --tokenizer gpt2 --out shards
    python -m nanogpt.prepare gpt2-medium

Killed, it continues where it was when the command is issued again. Training finds what is prepared
under the data directory by itself, also on another machine that the directory is copied to;
a corpus elsewhere is `data=shards data.path=DIR`.
"""

import argparse
import inspect
import logging
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nanogpt.command import make_parser, parse, run_command
from nanogpt.data.fineweb_edu import FineWebEdu
from nanogpt.data.hub import HubDataset
from nanogpt.data.preparing import MakeTokenizer, Preparation, prepare
from nanogpt.data.python_stdlib import PythonStdlib
from nanogpt.data.source import Source
from nanogpt.data.text import TextFiles
from nanogpt.pretrained import PUBLISHED, fetch_pretrained
from nanogpt.text import first_line
from nanogpt.tokenizer import bpe_tokenizer, byte_tokenizer, gpt2_tokenizer
from nanogpt.values import explain

SOURCES: dict[str, Callable[..., Source]] = {
    "fineweb_edu": FineWebEdu,
    "python_stdlib": PythonStdlib,
    "text": TextFiles,
}
# Options that only some sources have, under the names of their fields.
OF_SOURCES = (
    *("path", "text_column", "separator"),
    *("subset", "split", "revision", "val_fraction", "skip_bad"),
)
UNITS = {"k": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    options = parse(parser(), arguments)
    return run_command(
        "nanogpt.prepare",
        partial(prepare_dataset, options),
        explain=as_options,
        interrupted="stopped; the same command continues",
    )


def prepare_dataset(options: argparse.Namespace) -> None:
    """Prepare a corpus, or fetch published weights."""
    if options.dataset in PUBLISHED:
        path = fetch_pretrained(options.dataset, options.data_dir)
        print(f"{path}: train from it with init_from={options.dataset}")
        return
    tokenizer_key, make_tokenizer = choose_tokenizer(options.tokenizer, options.vocab_size)
    corpus = prepare(
        Preparation(
            choose_source(options),
            make_tokenizer,
            tokenizer_key,
            data_dir=options.data_dir,
            out=options.out,
            tokens=options.tokens,
            shard_tokens=options.shard_tokens,
            workers=options.workers,
        )
    )
    for split, counts in corpus.manifest["splits"].items():
        print(
            f"{split}: {counts['tokens']:,} tokens of {counts['documents']:,} documents "
            f"in {len(counts['shards'])} shard(s)"
        )
    if corpus.manifest["bad_records"]:
        print(f"left out: {corpus.manifest['bad_records']:,} records that could not be read")
    print(f"{corpus.directory}: train on it with data=shards data.path={corpus.directory}")


def as_options(error: Exception) -> str:
    """Return an error's sentence with this command's options in place of training's keys."""
    sentence = explain(error) if isinstance(error, ValidationError) else first_line(error)
    sentence = re.sub(r"\bdata=", "", sentence.replace("data.skip_bad=true", "--skip-bad"))
    keys = "|".join((*OF_SOURCES, "tokens", "shard_tokens", "workers"))
    return re.sub(rf"\b(?:data\.)?({keys})=", lambda m: f"--{m[1].replace('_', '-')} ", sentence)


def choose_source(options: argparse.Namespace) -> Source:
    """Return the source that the command names.

    Raises ValueError for a name that is none, and for an option that the source does not have.
    """
    name = options.dataset if options.dataset is not None else "text"
    given = {key: getattr(options, key) for key in OF_SOURCES if getattr(options, key) is not None}
    make: Callable[..., Source]
    if name in SOURCES:
        make = SOURCES[name]
    elif Path(name).exists():
        make, given = TextFiles, {"path": name, **given}
    elif name.count("/") == 1 and not name.startswith((".", "/")):
        make, given = HubDataset, {"repository": name, **given}
    else:
        known = ", ".join([*SOURCES, *PUBLISHED])
        raise ValueError(
            f"there is no data set {name}; pass one of {known}, a file or folder, or a repository "
            "of the Hugging Face hub as owner/name"
        )
    fields = inspect.signature(make).parameters
    if unknown := [key for key in given if key not in fields]:
        raise ValueError(f"{name} has no option --{unknown[0].replace('_', '-')}; leave it out")
    return make(**given)


def choose_tokenizer(name: str, vocab_size: int) -> tuple[str, MakeTokenizer]:
    """Return what names a tokenizer's table among prepared data, and what makes it."""
    if name == "bpe":
        return f"bpe-{vocab_size}", partial(bpe_tokenizer, vocab_size=vocab_size)
    return name, gpt2_tokenizer if name == "gpt2" else byte_tokenizer


def count(text: str) -> int:
    """Return a number of tokens as typed: 500000, 100M, 10B.

    Raises ArgumentTypeError for any other text.

    >>> count("1.5B")
    1500000000
    """
    try:
        number = float(text[:-1]) * UNITS[text[-1]] if text[-1:] in UNITS else float(text)
        if number >= 1 and number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(
        f"{text} is no whole number of tokens; pass one such as 500000, 100M or 10B"
    )


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    what = "Turn a corpus into token shards, or fetch published weights, ahead of time."
    parser = make_parser("nanogpt.prepare", what, "--data-dir")
    add: Any = parser.add_argument
    add(
        "dataset",
        nargs="?",
        help=f"{', '.join([*SOURCES, *PUBLISHED])}, a file or folder, or owner/name on the "
        "Hugging Face hub (default: text, with --path)",
    )
    add("--path", help="a file, folder or pattern of parquet, JSON Lines or text")
    add("--text-column", help="the column that holds the text (default text)")
    add("--separator", help="between documents of a plain text file, such as '<|endoftext|>'")
    add("--subset", help="the configuration of a data set on the hub")
    add("--split", help="of a data set on the hub (default train)")
    add("--revision", help="of a data set on the hub (default main)")
    add("--val-fraction", type=float, help="share of the documents held out")
    add("--skip-bad", action="store_true", default=None, help="leave out unreadable records")
    add("--tokenizer", default="gpt2", choices=("gpt2", "byte", "bpe"), help="default gpt2")
    add("--vocab-size", type=int, default=2048, help="of --tokenizer bpe (default 2048)")
    add("--tokens", type=count, help="stop after so many training tokens: 10B, 500M")
    add("--shard-tokens", type=count, default=Preparation.shard_tokens, help="default 100M")
    add("--workers", type=int, help="tokenizing threads (default: all cores)")
    add("--out", type=Path, help="the corpus's folder (default: one under the data directory)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
