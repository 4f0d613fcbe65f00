"""A corpus: both splits as shards, the tokenizer's table, and a manifest that describes them.

`nanogpt.data.preparing` makes it, in `data_dir/<source>-<tokenizer>-<8 hex digits>/`; the manifest
is written last, so a folder without one is not finished.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanogpt.data.shards import REMEDY, Shard, TokenStream, naming_damage, shard_part
from nanogpt.data.source import file_sha256
from nanogpt.data.writer import SPLITS
from nanogpt.tokenizer import Tokenizer, from_record

FORMAT = 2  # of the manifest and the files that it describes; another one is another corpus
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
HASHED_TOKENS = 50 * 2**20  # smaller corpora are compared with their hashes at every start


@dataclass(frozen=True)
class Corpus:
    """An opened corpus. `fingerprint` stands for the tokenizer's table and every token."""

    directory: Path
    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream
    fingerprint: str
    manifest: dict[str, Any]


def open_corpus(directory: Path, *, verify: bool = False) -> Corpus:
    """Open a prepared corpus; with `verify`, or where it is small, compare its shards' hashes.

    Raises ValueError, naming the file, where it differs from its manifest.
    """
    manifest = read_manifest(directory)
    tokenizer = read_tokenizer(directory / TOKENIZER)
    recorded = manifest["tokenizer"]["fingerprint"]
    if tokenizer.fingerprint != recorded:
        raise ValueError(
            f"{directory / TOKENIZER} is not the tokenizer that made the shards in its folder "
            f"({tokenizer.fingerprint}, not {recorded}); {REMEDY}"
        )
    shards = _shards(manifest)
    every = [shard for split in SPLITS for shard in shards[split]]
    hashed = verify or sum(shard.n_tokens for shard in every) <= HASHED_TOKENS
    parts = {}
    for shard in tqdm(every, "verifying", leave=False, disable=None if verify else True):
        path = directory / shard.file
        with naming_damage(path):
            parts[shard] = part = shard_part(path)
            if part.n_tokens != shard.n_tokens:
                raise ValueError(f"{part.n_tokens} tokens and {shard.n_tokens} in the manifest")
            if hashed and file_sha256(path) != shard.sha256:
                raise ValueError("its SHA-256 is not that in the manifest")
    train, val = (TokenStream(parts[shard] for shard in shards[split]) for split in SPLITS)
    return Corpus(directory, tokenizer, train, val, _fingerprint(manifest), manifest)


def find_corpus(data_dir: Path, fingerprint: str | None) -> Corpus | None:
    """Return the prepared corpus under `data_dir` that has a fingerprint, None without one.

    Raises as `open_corpus` does.
    """
    for path in data_dir.glob(f"*/{MANIFEST}") if fingerprint else ():
        try:
            found = _fingerprint(read_manifest(path.parent))
        except ValueError:
            continue  # not the folder of a corpus
        if found == fingerprint:
            return open_corpus(path.parent)
    return None


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a corpus; raises ValueError, naming the file, where it is none."""
    path = directory / MANIFEST
    with naming_damage(path):
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}, only {FORMAT} is known")
        _fingerprint(manifest)
    return manifest


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a corpus; raises ValueError where the file is not its record."""
    with naming_damage(path):
        return from_record(json.loads(path.read_bytes()))


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


def _fingerprint(manifest: Mapping[str, Any]) -> str:
    hashes = [[shard.sha256 for shard in shards] for shards in _shards(manifest).values()]
    return digest([manifest["tokenizer"]["fingerprint"], *hashes])[:16]
