"""Published weights: GPT-2's fetched by name, and those of a local Hugging Face directory."""

import logging
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from nanogpt.architectures import ARCHITECTURES, BUFFERS, Architecture
from nanogpt.hub import hub_errors
from nanogpt.model import GPT, PRESETS, GPTConfig
from nanogpt.text import first_line
from nanogpt.tokenizer_files import MERGES, TOKENIZER, VOCAB
from nanogpt.values import explain
from nanogpt.weights import check_weights, model_without_weights

PUBLISHED = tuple(PRESETS)  # the names under which weights are fetched
CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
INSTEAD = "pass a directory in which a Hugging Face model was saved"
FILES = [  # of a model on the hub
    *(CONFIG, TOKENIZER, "tokenizer_config.json", "generation_config.json", "chat_template.jinja"),
    *("model*.safetensors", f"{SAFETENSORS}.index.json"),
]
log = logging.getLogger("nanogpt")


def fetch_pretrained(name: str, data_dir: str | PathLike[str]) -> Path:
    """Return the directory data_dir/weights/name of published weights, fetched if missing.

    `name` is gpt2, gpt2-medium, gpt2-large or gpt2-xl. Raises ConnectionError within seconds where
    the hub cannot be reached, ValueError where other weights lie there.
    """
    expected = GPTConfig.preset(name)
    directory, repository = Path(data_dir) / "weights" / name, f"openai-community/{name}"
    instead = (
        f"run python -m nanogpt.prepare {name} on a connected machine and copy its {directory} "
        f"here, or pass the path of a local Hugging Face directory"
    )
    files = (CONFIG, VOCAB, MERGES, SAFETENSORS)
    if not all((directory / file).is_file() for file in files):
        with hub_errors(f"the weights of {repository}", instead):
            from huggingface_hub import hf_hub_download

            for file in files:
                log.info("fetching %s of %s into %s", file, repository, directory)
                hf_hub_download(repository, file, local_dir=directory)
    _, found, _ = read_config(directory)
    if replace(found, dropout=0.0) != expected:
        raise ValueError(
            f"{directory} has {found} but {name} is {expected}; remove the directory, or pass "
            f"another data_dir"
        )
    return directory


def fetch_model(name: str, data_dir: str | PathLike[str]) -> Path:
    """Return the directory data_dir/weights/OWNER--NAME of a model of the hub, fetched if missing.

    Raises ConnectionError within seconds where the hub cannot be reached, FileNotFoundError or
    PermissionError where it has no such model.
    """
    directory = Path(data_dir) / "weights" / name.replace("/", "--")
    instead = f"copy {directory} here from a connected machine, or pass a local directory"
    files = (directory / CONFIG, directory / TOKENIZER)
    with suppress(FileNotFoundError):
        if all(path.is_file() for path in files) and _weight_paths(directory):
            return directory
    with hub_errors(f"the model {name}", instead):
        from huggingface_hub import snapshot_download

        log.info("fetching %s into %s", name, directory)
        snapshot_download(name, local_dir=directory, allow_patterns=[*FILES])
    return directory


def load_pretrained(path: str | PathLike[str]) -> GPT:
    """Return the model of a local Hugging Face directory, in float32.

    It is a Classifier where config.json describes one. Raises FileNotFoundError where config.json
    or the weights are missing, ValueError where they are damaged or describe a model of another
    architecture than `ARCHITECTURES`.
    """
    directory = Path(path)
    architecture, config, labels = read_config(directory)
    found = _read_weights(directory)
    try:
        tensors = architecture.read_weights(found, config)
    except RuntimeError as error:  # of rows that cannot be joined
        raise ValueError(f"{directory} has weights of wrong shapes: {first_line(error)}") from error
    if labels and "lm_head.weight" not in tensors:  # as transformers saves a classifier
        config = replace(config, tie_embeddings=True)
    if config.tie_embeddings:
        head = tensors.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, tensors.get("wte.weight", head)):
            raise ValueError(
                f"the lm_head.weight in {directory} is not its token embedding, as "
                f"tie_word_embeddings in its {CONFIG} declares; set it to false"
            )
    n_labels = len(labels) if labels else None
    try:
        check_weights(tensors, config, n_labels)
    except ValueError as error:
        raise ValueError(f"{directory} {error}, which its {CONFIG} describes") from error
    model = model_without_weights(config, n_labels)
    model.load_state_dict(tensors, assign=True)
    return model


def read_config(directory: Path) -> tuple[Architecture, GPTConfig, list[str] | None]:
    """Return what config.json describes: with names of classes a classifier, else a language model.

    Raises ValueError for a model of another architecture than `ARCHITECTURES`.
    """
    path = directory / CONFIG
    found = _read_json(path)
    architecture = ARCHITECTURES.get(str(found.get("model_type")))
    if architecture is None:
        raise ValueError(
            f"{path} has model_type={found.get('model_type')!r}; only {', '.join(ARCHITECTURES)} "
            f"can be read"
        )
    try:
        labels = None
        if "ForSequenceClassification" in str(found.get("architectures")):
            names = found.get("id2label") or dict.fromkeys("01")  # as transformers abbreviates
            labels = [names.get(str(i)) or f"LABEL_{i}" for i in range(len(names))]
            if (problem := found.get("problem_type")) not in (None, "single_label_classification"):
                raise ValueError(f"has problem_type={problem!r}; only one class per text is known")
        return architecture, architecture.read_config(found), labels
    except (ValueError, AttributeError) as error:  # that of a value where an object should be
        reason = explain(error) if isinstance(error, ValidationError) else error
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise ValueError where it is none."""
    try:
        found: dict[str, Any] = TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist; {INSTEAD}") from error
    except ValidationError as error:
        raise ValueError(f"{path} is no JSON object; remove it and fetch it again") from error
    return found


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """Return the tensors under the names in the files, buffers of old files left out."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_paths(directory):
        try:
            found = load_file(path)
        except OSError:
            raise
        except Exception as error:  # whatever a file can do to its reader
            raise ValueError(
                f"{path} is truncated or damaged; remove it and fetch it again"
            ) from error
        for name, tensor in found.items():
            if not name.endswith(BUFFERS):
                if not tensor.is_floating_point():
                    raise ValueError(f"{path} has {tensor.dtype} for {name}, not real numbers")
                tensors[name] = tensor
    return tensors


def _weight_paths(directory: Path) -> list[Path]:
    """Return the file of the weights, or the shards that an index lists."""
    path, index = directory / SAFETENSORS, directory / f"{SAFETENSORS}.index.json"
    if path.is_file():
        return [path]
    if not index.is_file():
        raise FileNotFoundError(
            f"{directory} holds no {SAFETENSORS}; {INSTEAD} (a pickle, such as pytorch_model.bin, "
            f"is not read)"
        )
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{index} lists no files; remove it and fetch it again")
    paths = sorted({directory / Path(str(shard)).name for shard in shards.values()})
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{directory} lacks {', '.join(missing)}; fetch it again")
    return paths
