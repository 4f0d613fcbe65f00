"""A corpus: both splits as shards, the tokenizer's table, and a manifest that describes them.

`nanogpt.data.preparing` makes it, in `data_dir/<source>-<tokenizer>-<8 hex digits>/`; the manifest
is written last, so a folder without one is not finished.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.data.shards import REMEDY, Shard, TokenStream, read_header
from nanogpt.data.source import file_sha256
from nanogpt.data.windows import Tokens
from nanogpt.data.writer import SPLITS
from nanogpt.tokenizer import Tokenizer, from_record

FORMAT = 2  # of the manifest and the files that it describes; another one is another corpus
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
HASHED_AT_OPEN_BYTES = 100 * 2**20  # smaller corpora are compared with their hashes at every start


@dataclass(frozen=True)
class Corpus:
    """An opened corpus. `fingerprint` stands for the tokenizer's table and every token."""

    directory: Path
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    fingerprint: str
    manifest: dict[str, Any]


def open_corpus(directory: Path) -> Corpus:
    """Open a prepared corpus.

    Raises ValueError or FileNotFoundError, naming the file, where it differs from its manifest.
    """
    manifest = _read_manifest(directory / MANIFEST)
    tokenizer = read_tokenizer(directory / TOKENIZER)
    if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise ValueError(
            f"{directory / TOKENIZER} is not the tokenizer that made the shards in its folder "
            f"({tokenizer.fingerprint}, not {manifest['tokenizer']['fingerprint']}); {REMEDY}"
        )
    shards = _shards(manifest)
    _verify(directory, [shard for split in SPLITS for shard in shards[split]])
    train, val = (TokenStream(directory / s.file for s in shards[split]) for split in SPLITS)
    fingerprint = _fingerprint(tokenizer.fingerprint, shards)
    return Corpus(directory, tokenizer, train, val, fingerprint, manifest)


def find_corpus(data_dir: Path, fingerprint: str | None) -> Corpus | None:
    """Return the prepared corpus under `data_dir` that has a fingerprint, None without one.

    Raises as `open_corpus` does.
    """
    for path in data_dir.glob(f"*/{MANIFEST}") if fingerprint else ():
        try:
            manifest = _read_manifest(path)
            found = _fingerprint(manifest["tokenizer"]["fingerprint"], _shards(manifest))
        except (ValueError, KeyError, TypeError):
            continue  # not the folder of a corpus
        if found == fingerprint:
            return open_corpus(path.parent)
    return None


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a corpus; raises ValueError where the file is not its record."""
    record = read_json(path)
    try:
        return from_record(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; raises FileNotFoundError or ValueError, naming the file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing; {REMEDY}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {REMEDY}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; {REMEDY}")
    return value


def digest(value: object) -> str:
    """Return the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def describe_tokenizer(tokenizer: Tokenizer, key: str) -> dict[str, Any]:
    """Return a manifest's entry for a tokenizer."""
    return {
        "key": key,
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
    }


def _shards(manifest: Mapping[str, Any]) -> dict[str, list[Shard]]:
    return {
        split: [Shard(**shard) for shard in manifest["splits"][split]["shards"]] for split in SPLITS
    }


def _verify(directory: Path, shards: list[Shard]) -> None:
    n_bytes = 0
    for shard in shards:
        dtype, n_tokens = read_header(directory / shard.file)
        n_bytes += n_tokens * dtype.itemsize
        if n_tokens != shard.n_tokens:
            raise ValueError(
                f"{directory / shard.file} has {n_tokens} tokens and {shard.n_tokens} in the "
                f"manifest; {REMEDY}"
            )
    if n_bytes <= HASHED_AT_OPEN_BYTES:
        for shard in shards:
            if file_sha256(directory / shard.file) != shard.sha256:
                raise ValueError(
                    f"{directory / shard.file} was altered since it was written, as its SHA-256 "
                    f"differs from the manifest; {REMEDY}"
                )


def _fingerprint(tokenizer: str, shards: Mapping[str, Sequence[Shard]]) -> str:
    hashes = [[shard.sha256 for shard in shards[split]] for split in SPLITS]
    return digest([tokenizer, *hashes])[:16]


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {manifest.get('format')!r} and only {FORMAT} is known; {REMEDY}"
        )
    if missing := {"source", "split", "tokenizer", "splits"} - manifest.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; {REMEDY}")
    return manifest
