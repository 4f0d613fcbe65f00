"""Token shards from other projects, detected by content and read in place.

    python train.py data=shards data.path=FOLDER tokenizer=gpt2

Read are llm.c's and modded-nanogpt's `.bin` with their header, nanoGPT's `train.bin` and `val.bin`
without one, build-nanogpt's `.npy`, and a folder prepared here. Nothing is copied or unpickled.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock
from pydantic.dataclasses import dataclass

from nanogpt.command import expand_home
from nanogpt.data.corpus import MANIFEST, Corpus, describe_tokenizer, open_corpus
from nanogpt.data.shards import MAGIC_NUMBERS, UINT16, Part, TokenStream, shard_part
from nanogpt.data.source import files_fingerprint, local_path
from nanogpt.data.writer import JOURNAL
from nanogpt.disk import replacing, wait_for_lock
from nanogpt.hub import hub_errors
from nanogpt.text import first_line
from nanogpt.tokenizer import Tokenizer
from nanogpt.values import CHECKED, FilePath, Share, Text

SUFFIXES = (".bin", ".npy")
VAL_WORDS = {"val", "valid", "validation", "test"}
MIN_VAL_TOKENS = 1025  # a row of GPT-2, where the last part of the tokens is held out
READ_WHOLE_BYTES = 100 * 2**20  # of larger shards, blocks are checked and hashed
BLOCKS = 64
BLOCK_BYTES = 64 * 2**10
PATTERNS = ["*.bin", "*.npy", "manifest.json", "tokenizer.json"]  # of files to fetch
FETCHED = "fetched.json"  # written last
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
        root = self._root()
        if is_prepared(root):
            return _open_prepared(root, tokenizer, tokenizer_key)
        folder = root if root.is_dir() else root.parent
        if (folder / JOURNAL).exists():
            raise ValueError(
                f"{folder} is a corpus that is not finished; issue the command that began it again"
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
            manifest={
                "source": {"name": self.name, "path": str(self.path)},
                "split": {"val_fraction": self.val_fraction},
                "tokenizer": describe_tokenizer(tokenizer, tokenizer_key),
                "splits": {
                    split: {
                        "documents": None,  # unknown
                        "bytes": None,
                        "tokens": sum(part.n_tokens for part in parts),
                        "shards": [{"file": p.path.name, "n_tokens": p.n_tokens} for p in parts],
                    }
                    for split, parts in splits.items()
                },
                "gzip_bits_per_byte": None,
            },
        )

    def fingerprint(self) -> str:
        """Return a hash over the files' names and contents."""
        root = self._root()
        paths = [root / MANIFEST] if is_prepared(root) else _paths(root)
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
        train, val = files, []
        if root.is_dir():
            val = [part for part in files if _names_validation(part.path)]
            train = [part for part in files if part not in val]
        if not train:
            raise ValueError(
                f"{root} holds validation shards only ({files[0].path.name}); add the "
                f"training shards, or pass one file"
            )
        if val:
            return {"train": train, "val": val}
        n_tokens = sum(part.n_tokens for part in train)
        n_val = max(round(n_tokens * self.val_fraction), MIN_VAL_TOKENS)
        n_train = n_tokens - min(n_val, n_tokens // 2)
        return {"train": cut(train, 0, n_train), "val": cut(train, n_train, n_tokens)}


def fetch_pretokenized(where: str, data_dir: Path) -> Path:
    """Return a folder of token shards: a path, or a data set repository of the hub, fetched once.

    A repository such as `kjj0/finewebedu10B-gpt2` is fetched into `data_dir/pretokenized/`; a
    download that was interrupted is continued, and a complete one is found without a network.
    Raises FileNotFoundError or ValueError for a name that is neither, and as `hub_errors` does.
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
        manifest = json.loads((path / MANIFEST).read_bytes())
    except OSError:
        return False
    except ValueError:
        return True  # damaged, which opening the corpus reports
    return isinstance(manifest, dict) and "splits" in manifest and "tokenizer" in manifest


def _open_prepared(root: Path, tokenizer: Tokenizer | None, tokenizer_key: str) -> Corpus:
    corpus = open_corpus(root)
    key = corpus.manifest["tokenizer"]["key"]
    recorded = key if tokenizer is None else corpus.tokenizer.fingerprint
    if recorded != (tokenizer_key if tokenizer is None else tokenizer.fingerprint):
        kind, _, vocab_size = key.partition("-")
        size = f" tokenizer.vocab_size={vocab_size}" if vocab_size else ""
        raise ValueError(
            f"{root} was tokenized with {key} and not with {tokenizer_key}; "
            f"pass tokenizer={kind}{size}"
        )
    return corpus


def detect_format(path: Path) -> Part:
    """Return the tokens of a file, whose format its first bytes give; raises ValueError for others.

    A `.bin` without a header is nanoGPT's by its name, `train.bin` or `val.bin`. As uint16, either
    magic number of a header begins with a number above 55,000, which no text of GPT-2 does.
    """
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(np.lib.format.MAGIC_PREFIX):
        return _npy_part(path)
    has_header = int.from_bytes(head[:4], "little") in MAGIC_NUMBERS
    if path.suffix == ".bin" and path.stem in {"train", *VAL_WORDS} and not has_header:
        return _bare_part(path)
    return shard_part(path, REMEDY)


def cut(parts: Iterable[Part], start: int, stop: int) -> list[Part]:
    """Return the tokens from `start` up to `stop` of the parts end to end."""
    sliced = []
    for part in parts:
        first, end = max(start, 0), min(stop, part.n_tokens)
        if first < end:
            offset_bytes = part.offset_bytes + first * part.dtype.itemsize
            sliced.append(replace(part, offset_bytes=offset_bytes, n_tokens=end - first))
        start, stop = start - part.n_tokens, stop - part.n_tokens
    return sliced


def _files(root: Path) -> list[Part]:
    """Return the tokens of a file, or of those in a folder, in the order of their names."""
    paths = _paths(root)
    if root.is_dir():
        _check_numbers(paths)
    files = [detect_format(path) for path in paths]
    for file in files[1:]:
        if (kind := _kind(file)) != (first := _kind(files[0])):
            raise ValueError(
                f"{file.path} holds {kind} and {files[0].path.name} in the same folder {first}; "
                "keep one kind in the folder"
            )
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


def _check_numbers(paths: Sequence[Path]) -> None:
    """Raise FileNotFoundError where a numbered series has a gap; it may begin at any number."""
    series: dict[tuple[str, str], dict[int, str]] = {}
    for path in paths:
        if match := re.fullmatch(r"(.*?)(\d+)(\.\w+)", path.name):
            series.setdefault((match[1], match[3]), {})[int(match[2])] = match[2]
    for (prefix, suffix), names in series.items():
        first, last = min(names), max(names)
        if missing := next((n for n in range(first, last) if n not in names), None):
            name = f"{prefix}{missing:0{len(names[first])}d}{suffix}"
            n_missing = last - first + 1 - len(names)
            raise FileNotFoundError(
                f"{paths[0].parent} lacks {name} ({n_missing} missing between {first} and {last}); "
                f"fetch it, or remove the shards on one side of the gap"
            )


def _names_validation(path: Path) -> bool:
    return bool(VAL_WORDS & set(re.split(r"[^a-z]+", path.stem.lower())))


def _kind(part: Part) -> str:
    header = "" if part.offset_bytes else " without a header"
    return f"{part.dtype} tokens as {part.path.suffix}{header}"


def _bare_part(path: Path) -> Part:
    """Return the tokens of nanoGPT's files, which are uint16 and nothing else."""
    if (path.parent / "meta.pkl").exists():
        raise ValueError(
            f"{path.parent} was tokenized with the characters in its meta.pkl, which no tokenizer "
            f"here knows; pass the text itself, as in data=text data.path=input.txt tokenizer=byte"
        )
    n_bytes = path.stat().st_size
    if n_bytes == 0 or n_bytes % UINT16.itemsize:
        raise ValueError(
            f"{path} has {n_bytes} bytes, which is no whole number of uint16 tokens; {REMEDY}"
        )
    return Part(path, UINT16, 0, n_bytes // UINT16.itemsize)


def _npy_part(path: Path) -> Part:
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{path} is not a whole NumPy file ({first_line(error)}); {REMEDY}"
        ) from error
    if array.dtype.kind not in "ui" or array.ndim != 1:
        raise ValueError(
            f"{path} is an array of {array.dtype} with shape {array.shape}, and tokens are whole "
            f"numbers in one dimension; {REMEDY}"
        )
    return Part(path, array.dtype, array.offset, len(array))


def _is_fetched(directory: Path) -> bool:
    try:
        files = json.loads((directory / FETCHED).read_bytes())["files"]
        return all((directory / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False


def _fetch(repository: str, directory: Path) -> None:
    """Fetch a repository's shards at its current revision, then record their sizes."""
    from huggingface_hub import HfApi, snapshot_download

    what = f"{repository} (a data set, as no local folder has that name)"
    instead = f"pass a folder of token shards, or copy {directory} from a machine that has it"
    with hub_errors(what, instead):
        revision = HfApi().dataset_info(repository).sha
        log.info("fetching %s into %s", repository, directory)
        snapshot_download(
            repository,
            repo_type="dataset",
            revision=revision,
            local_dir=directory,
            allow_patterns=PATTERNS,
            ignore_patterns=["*/*"],
        )
    sizes = {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}
    if not any(name.endswith(SUFFIXES) for name in sizes):
        raise ValueError(
            f"the data set {repository} has no .bin or .npy among its files; pass one of token "
            f"shards, such as kjj0/finewebedu10B-gpt2"
        )
    record = {"repository": repository, "revision": revision, "files": sizes}
    with replacing(directory / FETCHED, "w") as file:
        json.dump(record, file, indent=2)


def _fingerprint(files: list[Part], splits: dict[str, list[Part]], tokenizer: Tokenizer) -> str:
    """Return 16 digits that stand for the tokenizer and the tokens, whose ids are checked.

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
    """Return a hash of all tokens, or of blocks of them, the first and the last included."""
    size = BLOCK_BYTES // part.dtype.itemsize
    starts: Sequence[int] = range(0, part.n_tokens, size)
    if not whole and len(starts) > BLOCKS:
        starts = [(part.n_tokens - size) * i // (BLOCKS - 1) for i in range(BLOCKS)]
    digest = hashlib.sha256()
    with part.path.open("rb") as file:
        for start in starts:
            file.seek(part.offset_bytes + start * part.dtype.itemsize)
            n_tokens = min(size, part.n_tokens - start)
            tokens = np.frombuffer(file.read(n_tokens * part.dtype.itemsize), part.dtype)
            if not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
                at = int(np.argmax((tokens < 0) | (tokens >= tokenizer.vocab_size)))
                raise ValueError(
                    f"{part.path} holds the id {tokens[at]} (token {start + at:,} there) and "
                    f"tokenizer {tokenizer.name} only has 0 to {tokenizer.vocab_size - 1}; pass "
                    "the tokenizer that made it"
                )
            digest.update(tokens.tobytes())
    return digest.hexdigest()
