"""From a source to a corpus: one thread reads, all cores tokenize, one thread writes in order.

Neither the number of workers nor where an earlier process was killed changes a byte, and memory
does not grow with the source.
"""

import errno
import gzip
import io
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nanogpt.data.corpus import (
    FORMAT,
    MANIFEST,
    TOKENIZER,
    Corpus,
    describe_tokenizer,
    digest,
    open_corpus,
    read_tokenizer,
)
from nanogpt.data.shards import MAX_SHARD_TOKENS, SHARD_TOKENS, TokenStream, shard_part, token_dtype
from nanogpt.data.source import Source
from nanogpt.data.tokenizing import Split, batches, choose_split, n_cores, tokenized
from nanogpt.data.writer import JOURNAL, SPLITS, CorpusWriter, Progress, read_journal, write_journal
from nanogpt.disk import wait_for_lock, write_json
from nanogpt.tokenizer import BPE_PATTERN, Tokenizer

COMMIT_EVERY_S = 5.0  # at most this much work is repeated after a kill
LOG_EVERY_S = 30.0  # where no terminal shows the bar
GZIPPED_BYTES = 16 * 2**20  # the validation text is gzipped, for comparison, up to this size

MakeTokenizer = Callable[[Iterable[str]], Tokenizer]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """The identity of a corpus, source, tokenizer and size, and its folder.

    `make_tokenizer` receives the documents of the training split; `tokenizer_key` names its result,
    settings included (`gpt2`, `bpe-2048`).
    """

    source: Source
    make_tokenizer: MakeTokenizer
    tokenizer_key: str
    data_dir: Path
    out: Path | None = None  # the corpus's folder, None for one under data_dir
    tokens: int | None = None  # of training, after which to stop; None takes all
    shard_tokens: int = SHARD_TOKENS
    workers: int | None = None  # tokenizing threads; None takes all cores

    def __post_init__(self) -> None:
        if not 0 < (share := self.source.val_fraction) < 1:
            raise ValueError(f"val_fraction={share} must be between 0 and 1, such as 0.1")
        if not 0 < (n := self.shard_tokens) <= MAX_SHARD_TOKENS:
            raise ValueError(f"shard_tokens={n} must be from 1 to {MAX_SHARD_TOKENS}")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Plain values, known in advance, that decide every byte of the corpus."""
        return {
            "format": FORMAT,
            "source": self.source.fingerprint(),
            "val_fraction": self.source.val_fraction,
            "tokenizer": self.tokenizer_key,
            "tokens": self.tokens,
            "shard_tokens": self.shard_tokens,
            **({"pattern": BPE_PATTERN} if self.tokenizer_key.startswith("bpe-") else {}),
        }

    @property
    def directory(self) -> Path:
        """The corpus's folder: the same for the same identity."""
        if self.out is not None:
            return self.out
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{self.source.name}-{self.tokenizer_key}")
        return self.data_dir / f"{name.strip('-.')[:60]}-{digest(self.identity)[:8]}"


def prepare(preparation: Preparation) -> Corpus:
    """Return the corpus, made now unless an earlier call has made it.

    Any number of processes may call this at once: one works, the others wait. A killed one is
    continued by the next call. Raises ValueError where the folder holds something else, and OSError
    where it cannot be written.
    """
    directory = preparation.directory
    if not (directory / MANIFEST).exists():
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with wait_for_lock(directory / ".lock", f"prepares {directory}"):
                if not (directory / MANIFEST).exists():
                    _make(preparation, directory)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                f"the disk of {directory} is full; the prepared part is safe: make room and issue "
                "the command again, which continues, or pass another folder"
            ) from error
    corpus = open_corpus(directory)
    _check_identity(directory, corpus.manifest.get("identity"), preparation)
    return corpus


def _check_identity(directory: Path, found: object, preparation: Preparation) -> None:
    """Raise ValueError where a folder, finished or not, holds another corpus than this one."""
    if found != preparation.identity:
        raise ValueError(
            f"{directory} holds another corpus ({found}); pass another folder, or remove this one"
        )


def _make(preparation: Preparation, directory: Path) -> None:
    """Write the corpus, or continue where an earlier process was stopped."""
    settled, progress = read_journal(directory) or _begin(preparation, directory)
    _check_identity(directory, settled.get("identity"), preparation)
    done = f", continuing after {progress.records:,} documents" if progress.records else ""
    name, key = preparation.source.name, preparation.tokenizer_key
    log.info("preparing %s with tokenizer %s in %s%s", name, key, directory, done)
    source = preparation.source.pinned(settled["revision"])
    split, path = Split(**settled["split"]), directory / TOKENIZER
    if path.exists():
        tokenizer = read_tokenizer(path)
    else:
        tokenizer = preparation.make_tokenizer(
            text
            for document in source.documents()
            for name, text in split.parts(document or "")
            if name == "train"
        )
        write_json(path, tokenizer.record(), indent=None)
    dtype = token_dtype(tokenizer.vocab_size)
    writer = CorpusWriter(directory, dtype, preparation.shard_tokens, settled, progress)
    _write(preparation, source, split, tokenizer, writer)
    if preparation.source.fingerprint() != preparation.identity["source"]:
        raise ValueError(
            f"data={source.name} changed while it was read, and {directory} may miss some of it; "
            "issue the command again once it stays as it is"
        )
    manifest = {
        "format": FORMAT,
        "identity": preparation.identity,
        "source": {
            "name": source.name,
            "fingerprint": preparation.identity["source"],
            **source.description(),
        },
        "split": {"val_fraction": source.val_fraction, **settled["split"]},
        "tokenizer": describe_tokenizer(tokenizer, preparation.tokenizer_key),
        **asdict(progress),
        "gzip_bits_per_byte": _gzip_bits_per_byte(directory, tokenizer, progress),
    }
    write_json(directory / MANIFEST, manifest)
    (directory / JOURNAL).unlink(missing_ok=True)
    train, val = (f"{progress.splits[split].tokens:,}" for split in SPLITS)
    log.info("prepared %s training and %s validation tokens", train, val)


def _begin(preparation: Preparation, directory: Path) -> tuple[dict[str, Any], Progress]:
    """Write a new journal; return its settings and progress."""
    for path in (*directory.glob("*.bin"), *directory.glob(TOKENIZER)):
        raise ValueError(
            f"{path} was not written here and would be overwritten; pass another folder"
        )
    source = preparation.source.pinned()
    settled = {
        "identity": preparation.identity,
        "revision": source.description().get("revision"),
        "split": asdict(choose_split(source)),
    }
    write_journal(directory, settled, progress := Progress())
    return settled, progress


def _write(
    preparation: Preparation,
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    writer: CorpusWriter,
) -> None:
    """Write the shards from the writer's progress to the end of the source, or to the limit."""
    progress, limit = writer.progress, preparation.tokens
    byte_lengths = np.array([len(token) for token in tokenizer.token_bytes()])
    workers = n_cores() if preparation.workers is None else preparation.workers
    committed = time.monotonic()
    with _bar(progress.splits["train"].tokens, limit) as bar:
        to_come = batches(source, split, tokenizer, progress)
        for batch, parts in tokenized(to_come, tokenizer, workers):
            train, counts, enough = parts["train"], progress.splits, False
            if limit is not None and counts["train"].tokens + len(train) >= limit:
                # cut after the document that reaches the limit
                missing = max(limit - counts["train"].tokens, 0)
                begins = np.flatnonzero(train[missing:] == tokenizer.eot_id)
                parts["train"] = train[: missing + begins[0]] if len(begins) else train
                enough = len(begins) > 0 or batch.ends_with_document
            for name, tokens in parts.items():
                counts[name].documents += int((tokens == tokenizer.eot_id).sum())
                counts[name].bytes += int(byte_lengths[tokens].sum())
            rolled = writer.append(parts)
            progress.records, progress.bad_records = batch.records, batch.bad_records
            if enough:
                break
            due = rolled or time.monotonic() - committed >= COMMIT_EVERY_S
            if due and batch.ends_with_document:
                writer.commit()
                committed = time.monotonic()
            bar.update(counts["train"].tokens - bar.n)
    writer.finish()


def _bar(n_tokens: int, limit: int | None) -> tqdm:
    """Return a bar of training tokens on a terminal, elsewhere lines in the log."""
    options: dict[str, Any] = {"dynamic_ncols": True}
    if not sys.stderr.isatty():
        options = {"file": _LogFile(), "mininterval": LOG_EVERY_S, "ncols": 0}
    options |= {"unit": " tokens", "unit_scale": True, "miniters": 1, "delay": 2}
    return tqdm(initial=n_tokens, total=limit, **options)


class _LogFile(io.StringIO):
    """A file whose lines go to the log."""

    def write(self, text: str) -> int:
        if line := text.strip():
            log.info("%s", line)
        return len(text)


def _gzip_bits_per_byte(directory: Path, tokenizer: Tokenizer, progress: Progress) -> float | None:
    """Return the compression by gzip of the validation text, None where that is long."""
    val = progress.splits["val"]
    if not 0 < val.bytes <= GZIPPED_BYTES:
        return None
    stream = TokenStream(shard_part(directory / shard.file) for shard in val.shards)
    data = tokenizer.decode_bytes(stream.read(0, len(stream)).tolist())
    return 8 * len(gzip.compress(data, 9)) / val.bytes
