"""Shards that others have tokenized: what lies in a folder is told by content and read in place.

    python train.py data=shards data.path=FOLDER tokenizer=gpt2

Read are llm.c's and modded-nanogpt's `.bin` with their header, nanoGPT's `train.bin` and `val.bin`
without one, build-nanogpt's `.npy`, and a folder prepared here. Nothing is copied and nothing is
unpickled.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from pydantic.dataclasses import dataclass

from nanogpt.command import expand_home
from nanogpt.data.corpus import Corpus, open_corpus
from nanogpt.data.foreign import (
    SUFFIXES,
    check_alike,
    check_numbers,
    cut,
    names_validation,
    recognise,
)
from nanogpt.data.hub import explanation
from nanogpt.data.shards import Part, TokenStream
from nanogpt.data.source import files_fingerprint, local_path
from nanogpt.data.writer import JOURNAL
from nanogpt.disk import wait_for_lock
from nanogpt.hub import check_reachable
from nanogpt.tokenizer import Tokenizer
from nanogpt.values import CHECKED, FilePath, Share, Text

LEAST_VAL_TOKENS = 1025  # one row of GPT-2's, where the last part of the tokens is held out
READ_WHOLE_BYTES = 100 * 2**20  # shards of more in all are known by blocks spread over each
BLOCKS = 64
BLOCK_BYTES = 64 * 2**10
PATTERNS = ("*.bin", "*.npy", "manifest.json", "tokenizer.json")  # of what is fetched
FETCHED = "fetched.json"  # written last

log = logging.getLogger(__name__)


@dataclass(frozen=True, config=CHECKED)
class TokenShards:
    """The shards in a folder, or a single file of tokens, made elsewhere with a known tokenizer.

    A file whose name has the word val, valid, validation or test is validation, all others are
    training, each in the order of their names. Where none is, the last `val_fraction` of the
    tokens is held out: at least 1,025 of them and at most half; the document that lies across the
    cut is in both.
    """

    path: FilePath | None = None
    val_fraction: Share = 0.001
    name: Text = "shards"

    def open(self, tokenizer: Tokenizer | None, tokenizer_key: str) -> Corpus:
        """Return the shards as a corpus of the given tokenizer.

        Without a tokenizer `tokenizer_key` (`bpe-2048`) is the name of one that is yet to be
        learnt, which only a folder prepared here can give. Raises ValueError or FileNotFoundError,
        naming the file, where the shards are damaged, incomplete or another tokenizer's.
        """
        root = self._root()
        if is_prepared(root):
            return _open_prepared(root, tokenizer, tokenizer_key)
        folder = root if root.is_dir() else root.parent
        if (folder / JOURNAL).exists():
            raise ValueError(
                f"{folder} is a corpus that is not finished; give the command that began it again"
            )
        if tokenizer is None:
            raise ValueError(
                f"{root} holds tokens and no text to learn tokenizer {tokenizer_key} from; pass "
                f"the tokenizer that made them, such as tokenizer=gpt2"
            )
        files = _files(root)
        splits = self._split(files, root)
        return Corpus(
            directory=folder,
            tokenizer=tokenizer,
            train=TokenStream(splits["train"]),
            val=TokenStream(splits["val"]),
            fingerprint=_fingerprint(files, splits, tokenizer),
            manifest=self._manifest(splits, tokenizer, tokenizer_key),
        )

    def fingerprint(self) -> str:
        """Return a hash over the files' names and contents."""
        root = self._root()
        paths = [root / "manifest.json"] if is_prepared(root) else _paths(root)
        return files_fingerprint(root if root.is_dir() else root.parent, paths)

    def _root(self) -> Path:
        what = "a folder or file of token shards, .bin or .npy"
        root = local_path(self.path, self.name, what)
        if not root.exists():
            raise FileNotFoundError(
                f"{self.path} does not exist; pass a folder or file of token shards"
            )
        if root.is_file() and is_prepared(root.parent):
            raise ValueError(
                f"{root} is one shard of the corpus that was prepared in {root.parent}; "
                f"pass data.path={root.parent}"
            )
        return root

    def _split(self, files: list[Part], root: Path) -> dict[str, list[Part]]:
        if root.is_file():
            return self._hold_out(files)
        splits: dict[str, list[Part]] = {"train": [], "val": []}
        for part in files:
            splits["val" if names_validation(part.path) else "train"].append(part)
        if not splits["train"]:
            raise ValueError(
                f"{root} holds validation shards only ({files[0].path.name}); add the "
                f"training shards, or pass one file"
            )
        return splits if splits["val"] else self._hold_out(splits["train"])

    def _hold_out(self, parts: list[Part]) -> dict[str, list[Part]]:
        """Hold out the last part of the tokens."""
        n_tokens = sum(part.n_tokens for part in parts)
        wanted = max(round(n_tokens * self.val_fraction), LEAST_VAL_TOKENS)
        n_train = n_tokens - min(wanted, n_tokens // 2)
        return {"train": cut(parts, 0, n_train), "val": cut(parts, n_train, n_tokens)}

    def _manifest(
        self, splits: dict[str, list[Part]], tokenizer: Tokenizer, tokenizer_key: str
    ) -> dict[str, Any]:
        """Say of the corpus what a manifest would; what nobody knows is None."""
        return {
            "source": {"name": self.name, "path": str(self.path)},
            "split": {"val_fraction": self.val_fraction},
            "tokenizer": {
                "key": tokenizer_key,
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
            },
            "splits": {
                split: {
                    "documents": None,
                    "bytes": None,
                    "tokens": sum(part.n_tokens for part in parts),
                    "shards": [
                        {"file": part.path.name, "n_tokens": part.n_tokens} for part in parts
                    ],
                }
                for split, parts in splits.items()
            },
            "gzip_bits_per_byte": None,
        }


def fetch_pretokenized(where: str, data_dir: Path) -> Path:
    """Return a folder of token shards: a path, or a data set repository of the hub, fetched once.

    A repository such as `kjj0/finewebedu10B-gpt2` comes into `data_dir/pretokenized/`; what was
    stopped half-way goes on, and what is complete is found again without a network. Raises
    ConnectionError, FileNotFoundError or ValueError in one sentence.
    """
    path = Path(expand_home(str(where)))
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", where):
        raise FileNotFoundError(
            f"{where} does not exist; pass a folder of token shards or a data set repository of "
            f"the Hugging Face hub, such as kjj0/finewebedu10B-gpt2"
        )
    directory = data_dir / "pretokenized" / where.replace("/", "--")
    if not _is_fetched(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory.parent / f".{directory.name}.lock")
        with wait_for_lock(lock, f"fetches {directory}"):
            if not _is_fetched(directory):
                _fetch(where, directory)
    return directory


def is_prepared(path: Path) -> bool:
    """Return whether a folder has a manifest of ours; another project's may have that name too."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except OSError:
        return False
    except ValueError:
        return True  # broken, as opening the corpus will say
    return isinstance(manifest, dict) and "splits" in manifest and "tokenizer" in manifest


def _open_prepared(root: Path, tokenizer: Tokenizer | None, tokenizer_key: str) -> Corpus:
    corpus = open_corpus(root)
    key = corpus.manifest["tokenizer"]["key"]
    recorded = key if tokenizer is None else corpus.tokenizer.fingerprint
    if recorded != (tokenizer_key if tokenizer is None else tokenizer.fingerprint):
        kind, _, vocab_size = key.partition("-")
        size = f" tokenizer.vocab_size={vocab_size}" if vocab_size else ""
        raise ValueError(
            f"{root} was tokenized with {key} and the command says {tokenizer_key}; "
            f"pass tokenizer={kind}{size}"
        )
    return corpus


def _files(root: Path) -> list[Part]:
    """Return what a file, or each in a folder, holds, in the order of their names."""
    if root.is_file():
        return [recognise(root)]
    paths = _paths(root)
    check_numbers(paths)
    files = [recognise(path) for path in paths]
    check_alike(files)
    return files


def _paths(root: Path) -> list[Path]:
    """Return a file, or those in a folder, in the order of their names."""
    if root.is_file():
        return [root]
    paths = sorted(
        path
        for path in root.iterdir()
        if path.suffix in SUFFIXES and not path.name.startswith(".") and not path.is_dir()
    )
    if not paths:
        raise FileNotFoundError(
            f"{root} holds no token shards (.bin or .npy); pass the folder they are in"
        )
    return paths


def _is_fetched(directory: Path) -> bool:
    try:
        files = json.loads((directory / FETCHED).read_bytes())["files"]
        return all((directory / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False


def _fetch(repository: str, directory: Path) -> None:
    """Bring a repository's shards here, at the revision it has now, and then say so."""
    from huggingface_hub import HfApi, snapshot_download

    check_reachable(
        f"the token shards of {repository}",
        f"pass a folder of token shards, or copy {directory} from a machine that has it",
    )
    try:
        revision = HfApi().dataset_info(repository).sha
        sizes = _sizes(repository, revision)
        log.info("fetching %d files of %s into %s", len(sizes), repository, directory)
        snapshot_download(
            repository,
            repo_type="dataset",
            revision=revision,
            local_dir=directory,
            allow_patterns=list(sizes),
        )
    except Exception as error:
        explained = explanation(error, repository)
        if explained is None:
            raise
        if isinstance(explained, FileNotFoundError):
            explained = FileNotFoundError(f"{repository} is no folder here, and {explained}")
        raise explained from error
    record = {"repository": repository, "revision": revision, "files": sizes}
    partial = directory / f".{FETCHED}"
    partial.write_text(json.dumps(record, indent=2), encoding="utf-8")
    os.replace(partial, directory / FETCHED)


def _sizes(repository: str, revision: str | None) -> dict[str, int]:
    """Return the files to fetch with their bytes; those in folders of a repository are not read."""
    from huggingface_hub import HfApi

    entries = HfApi().list_repo_tree(repository, revision=revision, repo_type="dataset")
    sizes = {
        entry.path: entry.size
        for entry in entries
        if hasattr(entry, "size") and any(fnmatch(entry.path, pattern) for pattern in PATTERNS)
    }
    if not any(name.endswith(SUFFIXES) for name in sizes):
        raise ValueError(
            f"the data set {repository} has no .bin or .npy among its files; pass one of token "
            f"shards, such as kjj0/finewebedu10B-gpt2"
        )
    return sizes


def _fingerprint(files: list[Part], splits: dict[str, list[Part]], tokenizer: Tokenizer) -> str:
    """Return 16 digits that stand for the tokenizer and the tokens; checks their ids on the way.

    All tokens are read where that is quick, and else blocks spread over every file.
    """
    whole = sum(file.n_tokens * file.dtype.itemsize for file in files) <= READ_WHOLE_BYTES
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda file: _checked_sha256(file, whole, tokenizer), files)
        hash_of = dict(zip((file.path for file in files), hashes, strict=True))
    tokens = [[[hash_of[part.path], part.n_tokens] for part in split] for split in splits.values()]
    plain = [tokenizer.fingerprint, files[0].dtype.str, tokens]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def _checked_sha256(part: Part, whole: bool, tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256()
    for start, tokens in _blocks(part, whole):
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
            at = int(np.argmax((tokens < 0) | (tokens >= tokenizer.vocab_size)))
            raise ValueError(
                f"{part.path} holds the id {tokens[at]} (token {start + at:,} there) and tokenizer "
                f"{tokenizer.name} only has 0 to {tokenizer.vocab_size - 1}; pass the tokenizer "
                f"that made it"
            )
        digest.update(tokens.tobytes())
    return digest.hexdigest()


def _blocks(part: Part, whole: bool) -> Iterator[tuple[int, np.ndarray]]:
    """Yield blocks of tokens with where they begin: all, or some, the first and last included."""
    size = BLOCK_BYTES // part.dtype.itemsize
    last_start = max(part.n_tokens - size, 0)
    starts: Iterable[int] = range(0, part.n_tokens, size)
    if not whole and len(range(0, part.n_tokens, size)) > BLOCKS:
        starts = [last_start * i // (BLOCKS - 1) for i in range(BLOCKS)]
    with part.path.open("rb") as file:
        for start in starts:
            file.seek(part.offset_bytes + start * part.dtype.itemsize)
            n_tokens = min(size, part.n_tokens - start)
            data = file.read(n_tokens * part.dtype.itemsize)
            yield start, np.frombuffer(data, part.dtype)
