"""A corpus: documents split, tokenized and written as shards once, and found again from then on.

`prepare` writes `data_dir/<source>-<tokenizer>-<8 hex digits>/` with the shards of both splits,
`tokenizer.json` (the whole table) and `manifest.json` (what the corpus is and how it was made). The
digits stand for the documents, the split rule and the tokenizer asked for.
"""

import gzip
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from nanogpt.data.shards import REMEDY, Shard, ShardWriter, TokenStream, read_header, token_dtype
from nanogpt.data.source import Source, file_sha256
from nanogpt.tokenizer import Tokenizer, from_record

FORMAT = 1  # of the manifest and all that it describes; another one is another corpus
HASHED_AT_OPEN_BYTES = 100 * 2**20  # smaller corpora are compared with their hashes at every start
GZIPPED_BYTES = 64 * 2**20  # the validation text is gzipped, for comparison, up to this size
BATCH_DOCUMENTS = 256  # tokenized together
SPLITS = ("train", "val")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, opened. `fingerprint` stands for the tokenizer's table and every token."""

    directory: Path
    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream
    fingerprint: str
    manifest: dict[str, Any]


def prepare(
    source: Source,
    make_tokenizer: Callable[[Iterable[str]], Tokenizer],
    tokenizer_key: str,
    data_dir: Path,
) -> Corpus:
    """Return the corpus of a source, made now unless an earlier call has made it.

    `make_tokenizer` gets the documents of the training split; `tokenizer_key` names what it makes,
    settings included (`gpt2`, `bpe-2048`). Any number of processes may call this at once: one
    works, the others wait. What is half made is never found.
    """
    if not 0 < source.val_fraction < 1:
        raise ValueError(
            f"val_fraction={source.val_fraction} must lie between 0 and 1, such as 0.1"
        )
    directory = data_dir / _directory_name(source, tokenizer_key)
    if not directory.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / f".{directory.name}.lock"):
            if not directory.exists():
                _make(source, make_tokenizer, tokenizer_key, directory)
    return open_corpus(directory)


def open_corpus(directory: Path) -> Corpus:
    """Open a prepared corpus.

    Raises ValueError or FileNotFoundError, naming the file, where it is not as its manifest says.
    """
    manifest = _read_manifest(directory / "manifest.json")
    tokenizer = _read_tokenizer(directory / "tokenizer.json")
    if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise ValueError(
            f"{directory / 'tokenizer.json'} is not the tokenizer that made the shards beside it "
            f"({tokenizer.fingerprint}, not {manifest['tokenizer']['fingerprint']}); {REMEDY}"
        )
    shards = {
        split: [Shard(**shard) for shard in manifest["splits"][split]["shards"]] for split in SPLITS
    }
    _verify(directory, [shard for split in SPLITS for shard in shards[split]])
    return Corpus(
        directory=directory,
        tokenizer=tokenizer,
        train=TokenStream([directory / shard.file for shard in shards["train"]]),
        val=TokenStream([directory / shard.file for shard in shards["val"]]),
        fingerprint=_fingerprint(tokenizer, shards),
        manifest=manifest,
    )


@dataclass(frozen=True)
class Split:
    """Which split a text goes to: by its hash, so that it stays there when other documents come.

    Documents whose place, a hash spread over 0 .. 1, is below `val_below` are validation. Where
    that would leave one side empty, the border moves past the nearest document. A document alone
    (`val_below` is None) is cut: the last tenth of its characters is validation, as in nanoGPT's
    data/shakespeare_char/prepare.py.
    """

    val_below: float | None

    def parts(self, document: str) -> Iterator[tuple[str, str]]:
        """Yield the split and the text of each part of a document."""
        if self.val_below is None:
            cut = int(len(document) * 0.9)
            yield "train", document[:cut]
            yield "val", document[cut:]
        else:
            yield ("val" if _place(document) < self.val_below else "train"), document


def choose_split(source: Source) -> Split:
    """Return the split rule for a source, from as many documents as it takes to know both sides."""
    val_below = source.val_fraction
    places: set[float] = set()
    for document in filter(None, source.documents()):
        places.add(_place(document))
        if min(places) < val_below <= max(places):
            return Split(val_below)
    if not places:
        raise ValueError(f"data={source.name} holds no text; pass text to train on")
    if len(places) == 1:
        return Split(None)
    return Split(sorted(places)[1] if min(places) >= val_below else max(places))


def _make(
    source: Source,
    make_tokenizer: Callable[[Iterable[str]], Tokenizer],
    tokenizer_key: str,
    directory: Path,
) -> None:
    """Write the corpus into a folder beside `directory`, which takes that name when all is done."""
    log.info("preparing %s with tokenizer %s in %s", source.name, tokenizer_key, directory)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        split = choose_split(source)
        tokenizer = make_tokenizer(text for name, text in _parts(source, split) if name == "train")
        splits, gzip_bits_per_byte = _write_shards(partial, _parts(source, split), tokenizer)
        manifest = {
            "format": FORMAT,
            "source": {"name": source.name, "fingerprint": source.fingerprint()},
            "split": {"val_fraction": source.val_fraction, **asdict(split)},
            "tokenizer": {
                "key": tokenizer_key,
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
            },
            "splits": splits,
            "gzip_bits_per_byte": gzip_bits_per_byte,
        }
        _write_json(partial / "tokenizer.json", tokenizer.record(), indent=None)
        _write_json(partial / "manifest.json", manifest, indent=2)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.replace(partial, directory)
    log.info(
        "prepared %s training and %s validation tokens",
        f"{splits['train']['tokens']:,}",
        f"{splits['val']['tokens']:,}",
    )


def _write_shards(
    directory: Path, parts: Iterable[tuple[str, str]], tokenizer: Tokenizer
) -> tuple[dict[str, dict[str, Any]], float | None]:
    """Write both splits; return what the manifest says of them, and gzip's bits per byte."""
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {split: ShardWriter(directory, split, dtype) for split in SPLITS}
    counts = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
    end_of_text = np.array([tokenizer.eot_id], dtype=dtype)
    val_texts: list[bytes] = []
    for split, text, tokens in _tokenized(parts, tokenizer):
        data = _utf8(text)
        counts[split]["documents"] += 1
        counts[split]["bytes"] += len(data)
        writers[split].append(end_of_text)
        writers[split].append(tokens)
        if split == "val" and counts["val"]["bytes"] <= GZIPPED_BYTES:
            val_texts.append(data)
    shards = {split: [asdict(shard) for shard in writers[split].close()] for split in SPLITS}
    splits = {
        split: {**counts[split], "tokens": writers[split].n_tokens, "shards": shards[split]}
        for split in SPLITS
    }
    gzipped = 0 < counts["val"]["bytes"] <= GZIPPED_BYTES
    return splits, _gzip_bits_per_byte(b"".join(val_texts)) if gzipped else None


def _parts(source: Source, split: Split) -> Iterator[tuple[str, str]]:
    """Yield the split and the text of everything that is not empty."""
    for document in source.documents():
        yield from (part for part in split.parts(document) if part[1])


def _tokenized(
    parts: Iterable[tuple[str, str]], tokenizer: Tokenizer
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield the parts in their order with their tokens, on as many threads as there are cores."""
    parts = iter(parts)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(islice(parts, BATCH_DOCUMENTS)):
            arrays = pool.map(tokenizer.encode_array, (text for _, text in batch))
            for (split, text), tokens in zip(batch, arrays, strict=True):
                yield split, text, tokens


def _verify(directory: Path, shards: list[Shard]) -> None:
    n_bytes = 0
    for shard in shards:
        dtype, n_tokens = read_header(directory / shard.file)
        n_bytes += n_tokens * dtype.itemsize
        if n_tokens != shard.n_tokens:
            raise ValueError(
                f"{directory / shard.file} has {n_tokens} tokens and the manifest beside it says "
                f"{shard.n_tokens}; {REMEDY}"
            )
    if n_bytes <= HASHED_AT_OPEN_BYTES:
        for shard in shards:
            if file_sha256(directory / shard.file) != shard.sha256:
                raise ValueError(
                    f"{directory / shard.file} was altered since it was written (its SHA-256 is "
                    f"not the manifest's); {REMEDY}"
                )


def _fingerprint(tokenizer: Tokenizer, shards: dict[str, list[Shard]]) -> str:
    hashes = [[shard.sha256 for shard in shards[split]] for split in SPLITS]
    return _hash([tokenizer.fingerprint, *hashes])[:16]


def _directory_name(source: Source, tokenizer_key: str) -> str:
    digest = _hash([FORMAT, source.fingerprint(), source.val_fraction, tokenizer_key])
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{source.name}-{tokenizer_key}").strip("-.")
    return f"{readable[:60]}-{digest[:8]}"


def _place(document: str) -> float:
    """Return the hash of a text as a number from 0 up to 1."""
    return int.from_bytes(hashlib.sha256(_utf8(document)).digest()[:6], "big") / 2**48


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # a JSON string may hold half of a pair


def _gzip_bits_per_byte(data: bytes) -> float:
    return 8 * len(gzip.compress(data, compresslevel=9, mtime=0)) / len(data)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = _read_json(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {manifest.get('format')!r} and only {FORMAT} is known; {REMEDY}"
        )
    missing = {"source", "split", "tokenizer", "splits"} - manifest.keys()
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; {REMEDY}")
    return manifest


def _read_tokenizer(path: Path) -> Tokenizer:
    record = _read_json(path)
    try:
        return from_record(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing; {REMEDY}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {REMEDY}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; {REMEDY}")
    return value


def _write_json(path: Path, value: dict[str, Any], indent: int | None) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=indent)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
