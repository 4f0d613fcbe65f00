"""From documents to tokens: split by hash, cut into batches, tokenized on all cores, in order.

Documents are taken in batches of about a megabyte; where a batch ends depends on the documents
alone, so the number of workers changes no byte. Memory holds a few batches at a time.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from nanogpt.data.source import Source
from nanogpt.data.writer import SPLITS, Progress
from nanogpt.tokenizer import Tokenizer

BATCH_CHARS = 2**20


@dataclass(frozen=True)
class Split:
    """The split of a text by its hash, which stays the same when documents are added.

    Documents whose hash, a number from 0 up to 1, is below `val_below` are validation. Where that
    would leave one side empty, the border moves past the nearest document. A single document
    (`val_below` is None) is cut: the last tenth of its characters is validation, as in nanoGPT's
    data/shakespeare_char/prepare.py.
    """

    val_below: float | None

    def parts(self, document: str) -> Iterator[tuple[str, str]]:
        """Yield the split and the text of each part of a document; neither is empty."""
        if self.val_below is None:
            cut = int(len(document) * 0.9)
            parts = (("train", document[:cut]), ("val", document[cut:]))
            yield from ((split, text) for split, text in parts if text)
        elif document:
            yield ("val" if _hash(document) < self.val_below else "train"), document


def choose_split(source: Source) -> Split:
    """Return the split rule for a source, from its first documents up to one of each split.

    Raises ValueError where the source has no text.
    """
    val_below = source.val_fraction
    hashes: list[float] = []  # the two lowest and the highest
    for document in filter(None, source.documents()):
        hashes = sorted({*hashes, _hash(document)})
        hashes = hashes[:2] + hashes[2:][-1:]
        if hashes[0] < val_below <= hashes[-1]:
            return Split(val_below)
    if not hashes:
        raise ValueError(f"data={source.name} holds no text; pass text to train on")
    if len(hashes) == 1:
        return Split(None)
    return Split(hashes[1] if hashes[0] >= val_below else hashes[-1])


@dataclass
class Batch:
    """Texts of consecutive documents by split; None stands for <|endoftext|>."""

    records: int  # of the source, up to its end
    bad_records: int
    texts: dict[str, list[str | None]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    n_chars: int = 0
    ends_with_document: bool = True

    def add(self, split: str, text: str | None) -> None:
        self.texts[split].append(text)
        self.n_chars += len(text or "")


def batches(
    source: Source, split: Split, tokenizer: Tokenizer, progress: Progress
) -> Iterator[Batch]:
    """Yield the documents that are not written yet; long ones reach over several batches."""
    batch = Batch(progress.records, progress.bad_records)
    for document in source.documents(skip=progress.records):
        for name, text in split.parts(document or ""):
            batch.add(name, None)
            for piece in tokenizer.pieces(text):
                if batch.n_chars >= BATCH_CHARS:
                    batch.ends_with_document = False
                    yield batch
                    batch = Batch(batch.records, batch.bad_records)
                batch.add(name, piece)
        batch.records += 1
        batch.bad_records += document is None
        if batch.n_chars >= BATCH_CHARS:
            yield batch
            batch = Batch(batch.records, batch.bad_records)
    yield batch


def tokenized(
    batches: Iterator[Batch], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """Yield the batches in their order with their tokens (N,) by split, a few of them ahead."""

    def encode(batch: Batch) -> dict[str, np.ndarray]:
        return {split: tokenizer.encode_parts(texts) for split, texts in batch.texts.items()}

    waiting: deque[tuple[Batch, Future[dict[str, np.ndarray]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for batch in batches:
            waiting.append((batch, pool.submit(encode, batch)))
            if len(waiting) > workers + 1:
                first, tokens = waiting.popleft()
                yield first, tokens.result()
        for first, tokens in waiting:
            yield first, tokens.result()


def n_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _hash(document: str) -> float:
    """Return a hash of a text as a number from 0 up to 1."""
    data = document.encode("utf-8", "surrogatepass")  # a JSON string may hold half of a pair
    return int.from_bytes(hashlib.sha256(data).digest()[:6], "big") / 2**48
