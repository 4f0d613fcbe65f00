"""The checkpoint contract: a file that describes itself, written atomically and verified when read.

A checkpoint is a Lightning `.ckpt` with one key of ours, `nanogpt`: its `Metadata`. The weights lie
in the file's `state_dict` under `model.`. Everything is of plain types, so that it loads with
`torch.load(weights_only=True, mmap=True)` and needs neither Lightning nor the training code.
"""

import contextlib
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from nanogpt.classifier import Around, Classifier
from nanogpt.disk import replacing
from nanogpt.model import GPT, GPTConfig
from nanogpt.pretrained import (
    PUBLISHED,
    fetch_model,
    fetch_pretrained,
    load_pretrained,
    read_config,
)
from nanogpt.prompts import find_template
from nanogpt.runs.directory import find_checkpoint, step_checkpoints
from nanogpt.tokenizer import Tokenizer, from_record, gpt2_tokenizer
from nanogpt.tokenizer_files import frame_of, read_tokenizer
from nanogpt.values import Amount, Flag, Text, explain
from nanogpt.weights import check_weights, load_archive, model_without_weights, printable

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
KEY = "nanogpt"
FORMAT = 1
WEIGHTS_PREFIX = "model."

# What passes can be compared, formatted, sent as JSON and printed without another check.
Count = Annotated[int, Field(strict=True, ge=0, lt=2**53)]  # JSON holds it exactly
Line = Annotated[str, Field(strict=True, max_length=200, pattern=r"^[^\p{C}\p{Zl}\p{Zp}]*$")]
Label = Annotated[str, Field(strict=True, max_length=2**16)]


class Metadata(TypedDict):
    """A checkpoint's description of itself, under the key `nanogpt`.

    `model` are the values of `GPTConfig`, `tokenizer` is the whole table. Without `labels` the
    model is a language model. The keys that are not required are those of newer versions.
    """

    format: Count
    version: Line
    stage: Literal["pretrain", "instruct", "classify"]
    model: dict[Line, Flag | Count | Amount | Line | list[Amount] | None]
    tokenizer: dict[str, Any]
    template: Line | None
    labels: Annotated[list[Label], Field(strict=True, min_length=1, max_length=2**16)] | None
    init_from: NotRequired[
        Annotated[dict[Literal["path", "sha256"], Text], Field(min_length=2)] | None
    ]
    clock: NotRequired[
        Annotated[dict[Literal["train_s", "timed_steps", "wall_s"], Amount], Field(min_length=3)]
    ]
    run: NotRequired[Annotated[dict[Literal["identity", "corpus"], Line], Field(min_length=2)]]


class Content(TypedDict):
    """What is read of a Lightning checkpoint, but for `nanogpt`."""

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)  # type: ignore[misc]

    state_dict: dict[str, Tensor]
    global_step: Count


_METADATA, _CONTENT = TypeAdapter(Metadata), TypeAdapter(Content)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the model in eval mode, its tokenizer, what it was trained for.

    With `labels` the model is a `Classifier` of these classes. `around` are the ids before and
    after a text that one of transformers classifies; others have `<|endoftext|>` on both sides.
    """

    model: GPT
    tokenizer: Tokenizer
    template: str | None
    labels: list[str] | None
    stage: str
    config: GPTConfig
    step: int
    path: Path
    around: Around | None = None


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

    The directory of a Hugging Face model loads as well, with GPT-2's tokenizer where it has none.

    A model with a block of another package (`model.block`) loads where that package, a module of it
    or the class is among `allow_modules`: it is imported, and its code runs.

    Raises FileNotFoundError where there is none and ValueError where the file is truncated,
    altered, of another project, holds anything but plain values and tensors, names a class that is
    not allowed, or has a tokenizer with more or fewer ids than the model.
    """
    path = find_checkpoint(reference, runs_dir)
    if path.is_dir():
        return _load_published(path, device)
    try:
        raw, config, tokenizer = _read(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_alternative(path)}") from error
    _check_allowed(path, config.block, allow_modules)
    about = raw[KEY]
    model = model_without_weights(config, about["labels"] and len(about["labels"]))
    if config.block is None:
        model.to_empty(device="cpu")
    try:
        model.load_state_dict(model_weights(raw))
    except RuntimeError as error:  # of a block of another package: ours were checked
        raise ValueError(
            f"{path} has weights that do not fit model.block={config.block} as it is now "
            f"({printable(error)})"
        ) from error
    return Checkpoint(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        template=about["template"],
        labels=about["labels"],
        stage=about["stage"],
        config=config,
        step=raw["global_step"],
        path=path,
    )


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint file; raises as `load_checkpoint` does."""
    return _read(path, verify=False)[2]


def _check_allowed(path: Path, block: str | None, allow_modules: Sequence[str]) -> None:
    if block is None or any(f"{block}.".startswith(f"{name}.") for name in allow_modules):
        return
    package = block.partition(".")[0]
    raise ValueError(
        f"{path} has model.block={block}, a class that is not part of nanogpt: allow its package "
        f"with --allow-module {package} (nanogpt.generate and evaluate), allow_modules=[{package}] "
        f"(serve.py, load_checkpoint) or model.block={block} (train.py); it cannot be exported"
    )


def init_model(init_from: Path, allow_modules: Sequence[str] = ()) -> Checkpoint:
    """Return the model and tokenizer that a new run starts from.

    `init_from` is what `find_init_from` returned. A classifier starts a run without its classes.
    Raises as `load_checkpoint`.
    """
    start = load_checkpoint(init_from, allow_modules=allow_modules)
    if isinstance(start.model, Classifier):
        start = replace(start, model=start.model.language_model().eval(), labels=None)
    return start


def _load_published(path: Path, device: str | torch.device) -> Checkpoint:
    model, (_, _, labels) = load_pretrained(path), read_config(path)
    tokenizer = read_tokenizer(path, model.config.vocab_size) or gpt2_tokenizer()
    if model.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"{path} has a model with vocab_size={model.config.vocab_size} and the tokenizer "
            f"{tokenizer.name} with {tokenizer.vocab_size} ids; put the tokenizer.json that the "
            f"model was trained with there"
        )
    template = None if labels or tokenizer.chat_template is None else "published"
    stage = "classify" if labels else "instruct" if template else "pretrain"
    model, around = model.to(device).eval(), frame_of(path) if labels else None
    return Checkpoint(model, tokenizer, template, labels, stage, model.config, 0, path, around)


def with_config(
    start: Checkpoint, weights: Mapping[str, Tensor] | None = None, **changes: Any
) -> Checkpoint:
    """Return a checkpoint with a changed model configuration and these weights, of any shape.

    The position embeddings beyond a shorter block_size are cut.
    """
    config = replace(start.config, **changes)
    weights = {**start.model.state_dict(), **(weights or {})}
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: config.block_size].clone()
    model = model_without_weights(config)
    model.load_state_dict(weights, assign=True)
    return replace(start, model=model.train(start.model.training), config=config)


def with_special_tokens(start: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """Return a checkpoint whose tokenizer has these special tokens.

    Where there is no reserved id for one, the token table grows by a row: the mean of the others,
    so that the new token is at first about as likely as any (J. Hewitt, "Initializing New Word
    Embeddings for Pretrained Language Models", 2021).
    """
    tokenizer = start.tokenizer.with_special_tokens(names)
    n_new, weights = tokenizer.vocab_size - start.config.vocab_size, start.model.state_dict()
    for name in {"wte.weight", "lm_head.weight"} & weights.keys():
        new = weights[name].mean(0, keepdim=True).expand(n_new, -1)
        weights[name] = torch.cat([weights[name], new])
    grown = with_config(start, weights, vocab_size=tokenizer.vocab_size)
    return replace(grown, tokenizer=tokenizer)


def find_init_from(init_from: str, runs_dir: str | Path, data_dir: str | Path) -> Path:
    """Return the file, or the directory of a Hugging Face model, that `init_from` stands for.

    gpt2, gpt2-medium, gpt2-large and gpt2-xl are always the published weights, under data_dir or
    else fetched; a run or a directory of that name is typed as a path (./gpt2). OWNER/NAME is a
    model of the hub where nothing here has that name. Raises FileNotFoundError where there is none.
    """
    if init_from in PUBLISHED:
        return fetch_pretrained(init_from, data_dir)
    try:
        return find_checkpoint(init_from, runs_dir)
    except FileNotFoundError as error:
        if init_from == "latest" or Path(init_from).exists():
            raise
        owner = Path(init_from).parent
        is_local = owner.exists() or (Path(runs_dir) / owner).exists()
        if HUB_NAME.fullmatch(init_from) and not is_local:
            return fetch_model(init_from, data_dir)
        raise FileNotFoundError(
            f"{error}, one of {', '.join(PUBLISHED)}, or OWNER/NAME of the Hugging Face hub"
        ) from error


def model_weights(raw: dict[str, Any]) -> dict[str, Tensor]:
    """Return the model's tensors of a checkpoint, of any shape, under the model's own names."""
    return {
        name.removeprefix(WEIGHTS_PREFIX): tensor
        for name, tensor in raw["state_dict"].items()
        if name.startswith(WEIGHTS_PREFIX)
    }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint file, memory-mapped, after checking every byte of it.

    Raises ValueError in one sentence where the file is truncated or altered, holds Python objects,
    is not one of ours, or has other weights than it describes.
    """
    return _read(path)[0]


def read_record(path: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint file; the bytes of its weights are not read.

    Of a Hugging Face directory it has `labels` and `model`. Raises ValueError as `read_checkpoint`.
    """
    if path.is_dir():
        _, config, labels = read_config(path)
        return {"labels": labels, "model": config.record()}
    metadata: dict[str, Any] = _read(path, verify=False)[0][KEY]
    return metadata


def _read(path: Path, *, verify: bool = True) -> tuple[dict[str, Any], GPTConfig, Tokenizer]:
    """Return a checkpoint's content after checking all but Lightning's; raise ValueError else."""
    where = ""
    try:
        raw = load_archive(path, verify=verify)
        if not isinstance(raw, dict) or not isinstance(metadata := raw.get(KEY), dict):
            raise ValueError(
                f"is not a checkpoint of this project (no key {KEY!r}); "
                "published GPT-2 weights are read with GPT.from_pretrained"
            )
        if isinstance(found := metadata.get("format"), int) and found > FORMAT:
            raise ValueError(
                f"has checkpoint format {str(found)[:20]} and this version reads format {FORMAT}; "
                f"use the version of nanogpt that wrote it"
            )
        _CONTENT.validate_python(raw)
        where = KEY
        _METADATA.validate_python(metadata)
        where = f"{KEY}.model"
        config = GPTConfig(**metadata["model"])
        labels, template = metadata["labels"], metadata["template"]
        check_weights(model_weights(raw), config, labels and len(labels))
        tokenizer = from_record(metadata["tokenizer"])
        names = [] if template is None else find_template(template).special_tokens
        if tokenizer.vocab_size != config.vocab_size or not {*names} <= {*tokenizer.special_tokens}:
            raise ValueError(
                f"has vocab_size={config.vocab_size}, template={template} and a tokenizer with "
                f"{tokenizer.vocab_size} ids and {', '.join(tokenizer.special_tokens)[:200]!r}"
            )
    except ValueError as error:
        if isinstance(error, ValidationError):  # its own text may be without end
            reason = f"is no checkpoint: {explain(error, where)}"
        else:
            reason = str(error)
        raise ValueError(f"{path} {reason}") from error
    return raw, config, tokenizer


def _alternative(path: Path) -> str:
    """Return what to do about a damaged checkpoint: the newest older file that verifies."""
    steps = step_checkpoints(path.parent)
    below = next((n for n, other in steps.items() if path.name == other.name), math.inf)
    for number, other in reversed(steps.items()):
        if number < below and not other.samefile(path):
            with contextlib.suppress(ValueError, OSError):
                read_checkpoint(other)
                return f"an older one is {other}: copy it over"
    return "use another checkpoint"


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically.

    Raises OSError where the disk is full or the directory cannot be written.
    """
    with replacing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # of torch's archive writer, after the system's
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else error) from None


def weights_sha256(model: GPT) -> str:
    """Return a hash over the names, shapes and bits of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
