"""The checkpoint contract: a file that describes itself, written atomically and verified when read.

A checkpoint is a Lightning `.ckpt` with one key of ours, `nanogpt`: the record. The weights lie in
the file's `state_dict` under `model.`. Everything is of plain types, so that it loads with
`torch.load(weights_only=True, mmap=True)` and needs neither Lightning nor this project's training
code.
"""

import contextlib
import hashlib
import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from nanogpt.archive import load_archive
from nanogpt.classifier import Classifier
from nanogpt.disk import sync_directory
from nanogpt.model import GPT, GPTConfig
from nanogpt.pretrained import PUBLISHED, fetch_pretrained, load_pretrained
from nanogpt.prompts import TEMPLATES
from nanogpt.record import FORMAT, check_record
from nanogpt.runs.directory import find_checkpoint, step_checkpoints
from nanogpt.tokenizer import Tokenizer, from_record, gpt2_tokenizer
from nanogpt.tokenizer_files import read_tokenizer
from nanogpt.weights import check_weights, model_without_weights

KEY = "nanogpt"
WEIGHTS_PREFIX = "model."


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the model in eval mode, its tokenizer, what it was trained for.

    With `labels` the model is a `Classifier` of these classes.
    """

    model: GPT
    tokenizer: Tokenizer
    template: str | None
    labels: list[str] | None
    stage: str
    config: GPTConfig
    step: int
    path: Path


def record(
    stage: str,
    config: GPTConfig,
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    labels: list[str] | None = None,
    init_from: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Return the self-description that a checkpoint carries under the key `nanogpt`."""
    from nanogpt import __version__

    return {
        "format": FORMAT,
        "stage": stage,
        "model": config.record(),
        "tokenizer": tokenizer.record(),
        "template": template,
        "labels": labels,
        "init_from": init_from,
        "version": __version__,
    }


def load_checkpoint(
    reference: str | Path,
    *,
    device: str | torch.device = "cpu",
    runs_dir: str | Path = "runs",
    allow_modules: Sequence[str] = (),
) -> Checkpoint:
    """Load a checkpoint: a `.ckpt` file, a run directory, or the name of a run under `runs_dir`.

    A model with a block of another package (`model.block`) loads where that package, a module of it
    or the class is among `allow_modules`: it is imported, and its code runs.

    Raises FileNotFoundError where there is none and ValueError where the file is truncated,
    altered, of another project, holds anything but plain values and tensors, or names a class that
    is not allowed.
    """
    path = find_checkpoint(reference, runs_dir)
    raw, config, tokenizer = _read_or_advise(path)
    _check_allowed(path, config.block, allow_modules)
    about = raw[KEY]
    model = model_without_weights(config, about["labels"] and len(about["labels"]))
    if config.block is None:
        model.to_empty(device="cpu")
    try:
        model.load_state_dict(model_weights(raw))
    except RuntimeError as error:  # of a block of another package: ours were checked
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} has weights that do not fit model.block={config.block} as it is now ({reason})"
        ) from error
    return Checkpoint(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        template=about["template"],
        labels=about["labels"],
        stage=about["stage"],
        config=model.config,
        step=raw["global_step"],
        path=path,
    )


def _check_allowed(path: Path, block: str | None, allow_modules: Sequence[str]) -> None:
    if block is None or any(f"{block}.".startswith(f"{name}.") for name in allow_modules):
        return
    package = block.partition(".")[0]
    raise ValueError(
        f"{path} has model.block={block}, a class that is not part of nanogpt: allow its package "
        f"with --allow-module {package} (nanogpt.generate and evaluate), "
        f"allow_modules=[{package!r}] (load_checkpoint) or model.block={block} (train.py); "
        f"export and the server cannot run it"
    )


def init_model(init_from: Path, allow_modules: Sequence[str] = ()) -> Checkpoint:
    """Return the model and tokenizer that a new run starts from.

    `init_from` is what `find_init_from` returned: a `.ckpt`, or a Hugging Face GPT-2, whose
    tokenizer is GPT-2's where none lies beside it. A classifier starts a run without its classes.
    `allow_modules` as of `load_checkpoint`.

    Raises ValueError where the tokenizer has more or fewer ids than the model.
    """
    if init_from.is_file():
        start = load_checkpoint(init_from, allow_modules=allow_modules)
        if isinstance(start.model, Classifier):
            return replace(start, model=start.model.language_model().eval(), labels=None)
        return start
    tokenizer = read_tokenizer(init_from) or gpt2_tokenizer()
    model = load_pretrained(init_from)
    if isinstance(model, Classifier):
        model = model.language_model()
    if model.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"{init_from} has a model with vocab_size={model.config.vocab_size} and the tokenizer "
            f"{tokenizer.name} with {tokenizer.vocab_size} ids; put the tokenizer.json that the "
            f"model was trained with there"
        )
    return Checkpoint(model, tokenizer, None, None, "pretrain", model.config, 0, init_from)


def with_block_size(start: Checkpoint, block_size: int) -> Checkpoint:
    """Return a checkpoint for shorter contexts, without the position embeddings beyond them."""
    assert block_size <= start.config.block_size
    weights = start.model.state_dict()
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][:block_size].clone()
    return _rebuilt(start, weights, block_size=block_size)


def with_dropout(start: Checkpoint, dropout: float) -> Checkpoint:
    """Return a checkpoint whose model drops another share of activations in training."""
    return _rebuilt(start, start.model.state_dict(), dropout=dropout)


def with_special_tokens(start: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """Return a checkpoint whose tokenizer has these special tokens.

    Where there is no reserved id for one, the token table grows by a row: the mean of the others,
    so that the new token is at first about as likely as any (J. Hewitt, "Initializing New Word
    Embeddings for Pretrained Language Models", 2021).
    """
    tokenizer = start.tokenizer.with_special_tokens(names)
    weights = start.model.state_dict()
    if n_new := tokenizer.vocab_size - start.config.vocab_size:
        rows = weights["wte.weight"]
        weights["wte.weight"] = torch.cat([rows, rows.mean(0, keepdim=True).expand(n_new, -1)])
    grown = _rebuilt(start, weights, vocab_size=tokenizer.vocab_size)
    return replace(grown, tokenizer=tokenizer)


def _rebuilt(start: Checkpoint, weights: dict[str, torch.Tensor], **changes: Any) -> Checkpoint:
    """Return a checkpoint whose model has these weights and a changed configuration."""
    config = replace(start.config, **changes)
    model = model_without_weights(config)
    model.load_state_dict(weights, assign=True)
    return replace(start, model=model.train(start.model.training), config=config)


def find_init_from(init_from: str, runs_dir: str | Path, data_dir: str | Path) -> Path:
    """Return the file, or the directory of a Hugging Face GPT-2, that `init_from` stands for.

    gpt2, gpt2-medium, gpt2-large and gpt2-xl are always the published weights, under data_dir or
    else fetched; a run or a directory of that name is typed as a path (./gpt2).
    """
    if init_from in PUBLISHED:
        return fetch_pretrained(init_from, data_dir)
    if (Path(init_from) / "config.json").is_file():
        return Path(init_from)
    try:
        return find_checkpoint(init_from, runs_dir)
    except FileNotFoundError as error:
        if init_from == "latest" or Path(init_from).exists():
            raise
        raise FileNotFoundError(f"{error}, or one of {', '.join(PUBLISHED)}") from error


def model_weights(raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the model's tensors of a checkpoint under the model's own names."""
    return {
        name.removeprefix(WEIGHTS_PREFIX): tensor
        for name, tensor in raw["state_dict"].items()
        if name.startswith(WEIGHTS_PREFIX)
    }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint file, memory-mapped, after checking every byte of it.

    Raises ValueError in one sentence where the file is truncated or altered (the archive's CRC-32
    sums), holds Python objects, is not one of ours, or claims what it does not hold; it names an
    intact file where there is one.
    """
    return _read_or_advise(path).raw


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint file as `read_checkpoint` does, which adds what to do."""
    return _read(path).raw


def read_record(path: Path) -> dict[str, Any]:
    """Return the record of a checkpoint file; the bytes of its weights are not read.

    Raises ValueError as `read_checkpoint`.
    """
    about: dict[str, Any] = _read(path, verify=False).raw[KEY]
    return about


class _Content(NamedTuple):
    raw: dict[str, Any]
    config: GPTConfig
    tokenizer: Tokenizer


def _read_or_advise(path: Path) -> _Content:
    try:
        return _read(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_alternative(path)}") from error


def _read(path: Path, *, verify: bool = True) -> _Content:
    """Return the content of a checkpoint file after checking all of it, but for Lightning's."""
    try:
        raw = load_archive(path, verify=verify)
    except ValueError as error:
        raise ValueError(f"{path} is no readable checkpoint: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get(KEY), dict):
        raise ValueError(
            f"{path} is not a checkpoint of this project (no key {KEY!r}); "
            "published GPT-2 weights are read with GPT.from_pretrained"
        )
    try:
        return _checked(raw)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def _checked(raw: dict[str, Any]) -> _Content:
    """Return a checkpoint's content after checking all that is ours; raise ValueError else."""
    about = raw[KEY]
    check_record(raw, about)
    labels = about["labels"]
    try:
        config = GPTConfig(**about["model"])
    except TypeError as error:
        raise ValueError(f"records a model that this version lacks: {error}") from error
    check_weights(model_weights(raw), config, None if labels is None else len(labels))
    tokenizer = from_record(about["tokenizer"])
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"has a model with vocab_size={config.vocab_size} and a tokenizer with "
            f"{tokenizer.vocab_size} ids"
        )
    template = about["template"]
    names = TEMPLATES[template].special_tokens if template else []
    if missing := [name for name in names if name not in tokenizer.special_tokens]:
        raise ValueError(f"has template={template} and a tokenizer without {', '.join(missing)}")
    return _Content(raw, config, tokenizer)


def _alternative(path: Path) -> str:
    """Return what to do about a damaged checkpoint: the newest older file that verifies."""
    steps = step_checkpoints(path.parent)
    below = next((n for n, other in steps.items() if path.name == other.name), math.inf)
    for number, other in reversed(steps.items()):
        if number < below and not other.samefile(path):
            with contextlib.suppress(ValueError, OSError):
                verify_checkpoint(other)
                return f"an older one is {other}: copy it over"
    return "use another checkpoint"


def write_checkpoint(content: dict[str, Any], path: Path) -> str:
    """Write a checkpoint atomically and return its sha256.

    A temporary file beside the target is hashed while it streams, synchronised to the disk and
    renamed, and the archive's directory is read again: at every moment `path` is the old or the new
    file, whole. Raises OSError where the disk is full or the directory cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            writer = _HashingWriter(file)
            torch.save(content, writer)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        with zipfile.ZipFile(temporary) as archive:
            written = sum(entry.file_size for entry in archive.infolist())
        if written == 0 or temporary.stat().st_size != writer.n_bytes:
            raise OSError(f"{temporary} was not written whole")
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if writer_error := _disk_error(error):
            raise OSError(f"could not write {path}: {writer_error}") from error
        raise
    sync_directory(path.parent)
    return writer.sha256.hexdigest()


def _disk_error(error: BaseException) -> OSError | None:
    """Return the system's error behind a failed write (torch's archive writer wraps it)."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def weights_sha256(model: GPT) -> str:
    """Return a hash over the names, shapes and bits of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _HashingWriter:
    """The part of a file that `torch.save` needs, hashing what passes through."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.n_bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.n_bytes += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()
