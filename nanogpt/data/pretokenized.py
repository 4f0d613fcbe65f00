"""Token shards from other projects, detected by content and read in place.

    python train.py data=shards data.path=FOLDER tokenizer=gpt2

Read are llm.c's and modded-nanogpt's `.bin` with their header, nanoGPT's `train.bin` and `val.bin`
without one, build-nanogpt's `.npy`, and a folder prepared here. Nothing is copied or unpickled.
"""

import hashlib
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os.path import expanduser
from pathlib import Path

import numpy as np
from pydantic.dataclasses import dataclass

from nanogpt.data.corpus import MANIFEST, TOKENIZER, Corpus, describe_tokenizer, digest, open_corpus
from nanogpt.data.shards import MAGIC_NUMBERS, UINT16, Part, TokenStream, naming_damage, shard_part
from nanogpt.data.source import SAMPLE_BYTES, SAMPLES, files_fingerprint, local_path
from nanogpt.data.writer import JOURNAL
from nanogpt.hub import hub_errors
from nanogpt.tokenizer import Tokenizer
from nanogpt.values import CHECKED, FilePath, Share, Text

SUFFIXES = (".bin", ".npy")
VAL_WORDS = {"val", "valid", "validation", "test"}
MIN_VAL_TOKENS = 1025  # a row of GPT-2, where the last part of the tokens is held out
READ_WHOLE_BYTES = 100 * 2**20  # of larger shards, blocks are checked and hashed
PATTERNS = ["*.bin", "*.npy", MANIFEST, TOKENIZER]  # of files to fetch
FETCHED = ".fetched"  # written last
REMEDY = "fetch the file again, or take it out of data.path"

log = logging.getLogger(__name__)


@dataclass(frozen=True, config=CHECKED)
class TokenShards:
    """The shards in a folder, or a single file of tokens, made elsewhere with a known tokenizer.

    A file whose name has the word val, valid, validation or test is validation, all others are
    training, each in the order of their names. Without such a file, the last `val_fraction` of the
    tokens is held out: at least 1,025 of them and at most half; the document that lies across the
    cut is in both.
    """

    path: FilePath | None = None
    val_fraction: Share = 0.001
    name: Text = "shards"

    def open(self, tokenizer: Tokenizer | None, tokenizer_key: str) -> Corpus:
        """Return the shards as a corpus of the given tokenizer.

        Without a tokenizer `tokenizer_key` (`bpe-2048`) is the name of one to be trained, which
        only a folder prepared here has. Raises ValueError or FileNotFoundError, naming the file,
        where the shards are damaged, incomplete or of another tokenizer.
        """
        paths = self._paths()
        folder = paths[0].parent
        if paths[0].name == MANIFEST:
            corpus = open_corpus(folder)
            key = corpus.manifest["tokenizer"]["key"]
            recorded = key if tokenizer is None else corpus.tokenizer.fingerprint
            if recorded != (tokenizer_key if tokenizer is None else tokenizer.fingerprint):
                raise ValueError(
                    f"{folder} was tokenized with {key} and not with {tokenizer_key}; "
                    f"pass tokenizer={key.replace('-', ' tokenizer.vocab_size=')}"
                )
            return corpus
        if is_prepared(folder) or (folder / JOURNAL).exists():
            raise ValueError(
                f"{folder} is a corpus of nanogpt.prepare; pass the folder, and where it is not "
                "finished, issue the command that began it again"
            )
        if (folder / "meta.pkl").exists():
            raise ValueError(
                f"{folder} was tokenized with the characters in its meta.pkl, which no tokenizer "
                "here knows; pass the text itself, as in data=text data.path=input.txt "
                "tokenizer=byte"
            )
        if tokenizer is None:
            raise ValueError(
                f"{folder} holds tokens and no text to learn tokenizer {tokenizer_key} from; pass "
                f"the tokenizer that made them, such as tokenizer=gpt2"
            )
        files = [token_part(path) for path in paths]
        kinds = {f"{file.path.suffix} of {file.dtype}": file.path.name for file in files}
        if len(kinds) > 1:
            found = " and ".join(f"{kind} ({name})" for kind, name in kinds.items())
            raise ValueError(f"{folder} holds {found}; keep one kind of shards in the folder")
        splits = self._split(files)
        return Corpus(
            directory=folder,
            tokenizer=tokenizer,
            train=TokenStream(splits["train"]),
            val=TokenStream(splits["val"]),
            fingerprint=_fingerprint(files, splits, tokenizer),
            manifest={
                "source": {"name": self.name, "path": str(self.path)},
                "tokenizer": describe_tokenizer(tokenizer, tokenizer_key),
                "splits": {
                    split: {
                        "tokens": sum(part.n_tokens for part in parts),
                        "shards": [{"file": p.path.name, "n_tokens": p.n_tokens} for p in parts],
                    }
                    for split, parts in splits.items()
                },
            },
        )

    def fingerprint(self) -> str:
        """Return a hash over the files' names and contents."""
        paths = self._paths()
        return files_fingerprint(paths[0].parent, paths)

    def _paths(self) -> list[Path]:
        """Return the file, or those in the folder by name; of a corpus of ours, the manifest."""
        root = local_path(self.path, self.name, "a folder or file of token shards, .bin or .npy")
        if root.is_file():
            return [root]
        if is_prepared(root):
            return [root / MANIFEST]
        paths = sorted(path for path in root.glob("[!.]*") if path.suffix in SUFFIXES)
        if not paths:
            raise FileNotFoundError(
                f"{root} holds no token shards (.bin or .npy); pass the folder they are in"
            )
        return paths

    def _split(self, files: list[Part]) -> dict[str, list[Part]]:
        """Return the files of each split: by their names, or by position where none names one."""
        val = [
            part for part in files if VAL_WORDS & set(re.split(r"[^a-z]+", part.path.stem.lower()))
        ]
        if val and Path(expanduser(str(self.path))).is_dir():
            return {"train": [part for part in files if part not in val], "val": val}
        stream = TokenStream(files)
        n_tokens = len(stream)
        n_val = max(round(n_tokens * self.val_fraction), MIN_VAL_TOKENS)
        n_train = n_tokens - min(n_val, n_tokens // 2)
        return {"train": stream.parts(0, n_train), "val": stream.parts(n_train, n_tokens)}


def fetch_pretokenized(where: str, data_dir: Path) -> Path:
    """Return a folder of token shards: a path, or a data set repository of the hub, fetched once.

    A repository such as `kjj0/finewebedu10B-gpt2` is fetched into `data_dir/pretokenized/`; a
    download that was interrupted is continued, and a complete one is found without a network.
    Raises FileNotFoundError or ValueError for a name that is neither, and as `hub_errors` does.
    """
    path = Path(expanduser(where))
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", where):
        raise FileNotFoundError(
            f"{where} does not exist; pass a folder of token shards or a data set repository of "
            f"the Hugging Face hub, such as kjj0/finewebedu10B-gpt2"
        )
    directory = data_dir / "pretokenized" / where.replace("/", "--")
    if (directory / FETCHED).exists():
        return directory
    from huggingface_hub import HfApi, snapshot_download

    what = f"{where} (a data set, as no local folder has that name)"
    instead = f"pass a folder of token shards, or copy {directory} from a machine that has it"
    log.info("fetching %s into %s", where, directory)
    directory.mkdir(parents=True, exist_ok=True)
    with hub_errors(what, instead):
        snapshot_download(
            where,
            repo_type="dataset",
            revision=HfApi().dataset_info(where).sha,
            local_dir=directory,
            allow_patterns=PATTERNS,
            ignore_patterns=["*/*"],
        )
    (directory / FETCHED).touch()
    return directory


def is_prepared(path: Path) -> bool:
    """Return whether a folder has a manifest of ours; another project's may have that name too."""
    manifest = path / MANIFEST
    return manifest.is_file() and (
        (path / TOKENIZER).exists() or b'"splits"' in manifest.read_bytes()
    )


def token_part(path: Path) -> Part:
    """Return the tokens of a file, whose format its first bytes give; raises ValueError for others.

    A `.bin` without a header is nanoGPT's by its name, `train.bin` or `val.bin`. As uint16, either
    magic number of a header begins with a number above 55,000, which no text of GPT-2 does.
    """
    with naming_damage(path, REMEDY):
        with path.open("rb") as file:
            head = file.read(8)
        if head.startswith(np.lib.format.MAGIC_PREFIX):
            array = np.load(path, mmap_mode="r")
            if array.dtype.kind not in "ui" or array.ndim != 1:
                raise ValueError(
                    f"an array of {array.dtype} with shape {array.shape}; tokens are whole numbers "
                    "in one dimension"
                )
            return Part(path, array.dtype, array.offset, len(array))
        has_header = int.from_bytes(head[:4], "little") in MAGIC_NUMBERS
        if path.suffix == ".bin" and path.stem in {"train", *VAL_WORDS} and not has_header:
            n_bytes = path.stat().st_size
            if n_bytes % UINT16.itemsize:
                raise ValueError(f"{n_bytes} bytes, no whole number of uint16 tokens")
            return Part(path, UINT16, 0, n_bytes // UINT16.itemsize)
        return shard_part(path)


def _fingerprint(files: list[Part], splits: dict[str, list[Part]], tokenizer: Tokenizer) -> str:
    """Return 16 digits that stand for the tokenizer and the tokens, whose ids are checked.

    All tokens are read where that is quick, and else blocks spread over every file.
    """
    whole = sum(file.n_tokens * file.dtype.itemsize for file in files) <= READ_WHOLE_BYTES
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda file: _checked_sha256(file, whole, tokenizer), files)
        hash_of = dict(zip((file.path for file in files), hashes, strict=True))
    tokens = [[[hash_of[part.path], part.n_tokens] for part in split] for split in splits.values()]
    return digest([tokenizer.fingerprint, files[0].dtype.str, tokens])[:16]


def _checked_sha256(part: Part, whole: bool, tokenizer: Tokenizer) -> str:
    """Return a hash of all tokens, or of blocks of them, the first and the last included."""
    size = SAMPLE_BYTES // part.dtype.itemsize
    starts: Sequence[int] = range(0, part.n_tokens, size)
    if not whole and len(starts) > SAMPLES:
        starts = [(part.n_tokens - size) * i // (SAMPLES - 1) for i in range(SAMPLES)]
    content, stream = hashlib.sha256(), TokenStream([part])
    for start in starts:
        tokens = stream.read(start, min(start + size, part.n_tokens))
        if not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
            raise ValueError(
                f"{part.path} holds the ids {tokens.min()} to {tokens.max()} and tokenizer "
                f"{tokenizer.name} only has 0 to {tokenizer.vocab_size - 1}; pass the tokenizer "
                "that made it"
            )
        content.update(tokens.astype(part.dtype).tobytes())
    return content.hexdigest()
