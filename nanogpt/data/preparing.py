"""From a source to a corpus: one thread reads, all cores tokenize, one thread writes in order.

Neither the number of workers nor where an earlier process was killed changes a byte, and memory
does not grow with the source.
"""

import errno
import logging
import re
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

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
from nanogpt.data.meter import Meter
from nanogpt.data.shards import MAX_SHARD_TOKENS, SHARD_TOKENS, TokenStream, token_dtype
from nanogpt.data.source import Source
from nanogpt.data.tokenizing import Batch, Encoder, Split, batches, choose_split, in_order, n_cores
from nanogpt.data.writer import (
    JOURNAL,
    CorpusWriter,
    Progress,
    Tokenized,
    read_journal,
    write_json,
)
from nanogpt.disk import wait_for_lock
from nanogpt.tokenizer import Tokenizer

COMMIT_EVERY_S = 5.0  # at most this much work is done again after a kill
GZIP_WBITS = 31  # zlib's word for the gzip format
DECODED_TOKENS = 2**18  # at a time
GZIPPED_BYTES = 16 * 2**20  # the validation text is gzipped, for comparison, up to this size

MakeTokenizer = Callable[[Iterable[str]], Tokenizer]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """What makes a corpus: the source, its tokenizer, how much of it, and where it goes.

    `make_tokenizer` gets the documents of the training split; `tokenizer_key` names what it makes,
    settings included (`gpt2`, `bpe-2048`).
    """

    source: Source
    make_tokenizer: MakeTokenizer
    tokenizer_key: str
    data_dir: Path
    out: Path | None = None  # the corpus's folder, where it shall not be one under data_dir
    tokens: int | None = None  # of training, after which to stop; None takes all
    shard_tokens: int = SHARD_TOKENS
    workers: int | None = None  # tokenizing threads; None takes all cores

    def __post_init__(self) -> None:
        if not 0 < self.source.val_fraction < 1:
            raise ValueError(
                f"val_fraction={self.source.val_fraction} must lie between 0 and 1, such as 0.1"
            )
        if not 0 < self.shard_tokens <= MAX_SHARD_TOKENS:
            raise ValueError(
                f"shard_tokens={self.shard_tokens} must lie between 1 and {MAX_SHARD_TOKENS}, "
                f"all that a shard's header can count; pass another, such as {SHARD_TOKENS}"
            )
        if self.workers is not None and self.workers < 1:
            raise ValueError(
                f"workers={self.workers} must be at least 1; leave it out for all cores"
            )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the corpus is, as plain values known before it is made."""
        return {
            "format": FORMAT,
            "source": self.source.fingerprint(),
            "val_fraction": self.source.val_fraction,
            "tokenizer": self.tokenizer_key,
            "tokens": self.tokens,
            "shard_tokens": self.shard_tokens,
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

    Any number of processes may call this at once: one works, the others wait. One that is killed
    is continued by the next call.
    """
    directory = preparation.directory
    if not (directory / MANIFEST).exists():
        _make_folder(directory)
        with wait_for_lock(_lock(directory), f"prepares {directory}"):
            _make_unless_made(preparation)
    corpus = open_corpus(directory)
    _check_identity(directory, corpus.manifest.get("identity"), preparation)
    return corpus


def _make_unless_made(preparation: Preparation) -> None:
    """Make the corpus, or what is left of it to make; the caller holds the lock."""
    directory = preparation.directory
    try:
        if not (directory / MANIFEST).exists():
            _make(preparation, directory)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"the disk of {directory} is full; what is prepared is kept: make room and issue the "
            "command again, which continues, or pass another folder"
        ) from error


def _check_identity(directory: Path, found: object, preparation: Preparation) -> None:
    """Raise ValueError where a folder, finished or not, holds another corpus than this one."""
    known = found if isinstance(found, Mapping) else {}
    wanted = preparation.identity
    if differences := [
        f"{key}={known.get(key)}" for key in wanted if known.get(key) != wanted[key]
    ]:
        raise ValueError(
            f"{directory} holds another corpus ({', '.join(differences)}); pass another folder, or "
            "remove this one"
        )


def _make_folder(directory: Path) -> None:
    """Make the corpus's folder; raises OSError in one sentence where that cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _lock(directory).acquire(timeout=0).lock.release()
    except Timeout:
        pass  # another process writes there
    except OSError as error:
        raise OSError(
            f"{directory} cannot be written ({error.strerror}); pass another folder"
        ) from error


def _lock(directory: Path) -> FileLock:
    """Return the lock of the process that prepares in this folder."""
    return FileLock(directory / ".lock")


def _make(preparation: Preparation, directory: Path) -> None:
    """Write the corpus, or go on where an earlier process was stopped."""
    source = preparation.source
    settled, tokenizer, progress = _begin_or_continue(preparation, directory)
    source = source.pinned(settled["revision"])
    dtype = token_dtype(tokenizer.vocab_size)
    with CorpusWriter(directory, dtype, preparation.shard_tokens, settled, progress) as writer:
        _write(preparation, source, Split(**settled["split"]), tokenizer, writer)
    if preparation.source.fingerprint() != preparation.identity["source"]:
        raise ValueError(
            f"data={source.name} changed while it was read, and {directory} may miss some of it; "
            "issue the command again once it stays as it is"
        )
    counts = asdict(writer.progress)
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
        **counts,
        "gzip_bits_per_byte": _gzip_bits_per_byte(directory, tokenizer, writer.progress),
    }
    write_json(directory / MANIFEST, manifest)
    (directory / JOURNAL).unlink(missing_ok=True)
    log.info(
        "prepared %s training and %s validation tokens",
        f"{counts['splits']['train']['tokens']:,}",
        f"{counts['splits']['val']['tokens']:,}",
    )


def _begin_or_continue(
    preparation: Preparation, directory: Path
) -> tuple[dict[str, Any], Tokenizer, Progress | None]:
    """Return what is settled once for a corpus, its tokenizer, and how far it has come."""
    source, path = preparation.source, directory / TOKENIZER
    begun = read_journal(directory)
    if begun is not None:
        settled, progress = begun
        _check_identity(directory, settled.get("identity"), preparation)
        log.info("%s: continuing after %s documents", directory, f"{progress.records:,}")
        return settled, read_tokenizer(path), progress
    if any(directory.glob("*.bin")):
        raise ValueError(f"{directory} holds shards that were made otherwise; pass another folder")
    _check_replaceable(path)
    log.info(
        "preparing %s with tokenizer %s in %s", source.name, preparation.tokenizer_key, directory
    )
    source = source.pinned()
    split = choose_split(source)
    tokenizer = preparation.make_tokenizer(
        text
        for document in source.documents()
        for name, text in split.parts(document or "")
        if name == "train"
    )
    write_json(path, tokenizer.record(), indent=None)
    settled = {
        "identity": preparation.identity,
        "revision": source.description().get("revision"),
        "split": asdict(split),
    }
    return settled, tokenizer, None


def _check_replaceable(path: Path) -> None:
    """Raise ValueError where the tokenizer's table would take the place of another project's."""
    if path.exists():
        try:
            read_tokenizer(path)
        except ValueError as error:
            raise ValueError(
                f"{path} was not written here and would be overwritten; pass another folder"
            ) from error


def _write(
    preparation: Preparation,
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    writer: CorpusWriter,
) -> None:
    """Bring the shards from where the writer stands to the end of the source, or to the limit."""
    if not writer.progress.records:
        writer.commit()
    encoder = Encoder(tokenizer)
    to_come = batches(source, split, tokenizer, writer.progress)
    workers = n_cores() if preparation.workers is None else preparation.workers
    committed = time.monotonic()
    with _meter(preparation, source, writer.progress, tokenizer) as meter:
        for batch, parts in in_order(to_come, encoder, workers):
            enough = _cut_to(preparation.tokens, writer.progress, batch, parts, encoder)
            rolled = writer.append(parts)
            writer.progress.records, writer.progress.bad_records = batch.records, batch.bad_records
            if enough:
                break
            due = rolled or time.monotonic() - committed >= COMMIT_EVERY_S
            if due and batch.ends_with_document:
                writer.commit()
                committed = time.monotonic()
            meter.show()
    writer.finish()


def _cut_to(
    limit: int | None,
    progress: Progress,
    batch: Batch,
    parts: dict[str, Tokenized],
    encoder: Encoder,
) -> bool:
    """Cut the training part after the document that reaches the limit; return whether one does."""
    if limit is None:
        return False
    wanted = limit - progress.splits["train"].tokens
    if len(parts["train"].tokens) < wanted:
        return False
    cut = encoder.cut(parts["train"], wanted)
    parts["train"] = parts["train"] if cut is None else cut
    return cut is not None or batch.ends_with_document


def _meter(
    preparation: Preparation, source: Source, progress: Progress, tokenizer: Tokenizer
) -> Meter:
    return Meter(
        preparation.directory,
        source.extent(),
        progress,
        limit=preparation.tokens,
        token_bytes=token_dtype(tokenizer.vocab_size).itemsize,
    )


def _gzip_bits_per_byte(directory: Path, tokenizer: Tokenizer, progress: Progress) -> float | None:
    """Return what gzip needs for the validation text, where that is short enough to try."""
    val = progress.splits["val"]
    if not 0 < val.bytes <= GZIPPED_BYTES:
        return None
    stream = TokenStream([directory / shard.file for shard in val.shards])
    gzipped = zlib.compressobj(level=9, wbits=GZIP_WBITS)
    n_bytes = 0
    for start in range(0, len(stream), DECODED_TOKENS):
        ids = stream.read(start, min(start + DECODED_TOKENS, len(stream)))
        n_bytes += len(gzipped.compress(tokenizer.decode_bytes(ids.tolist())))
    return 8 * (n_bytes + len(gzipped.flush())) / val.bytes
