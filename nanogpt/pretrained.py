"""Published GPT-2 weights, fetched by name and read from a local Hugging Face directory.

There, linear maps are stored input by output ("Conv1D"): the transpose of ours.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from nanogpt.disk import wait_for_lock
from nanogpt.hub import hub_errors
from nanogpt.model import GPT, NORM_EPSILON, PRESETS, GPTConfig
from nanogpt.tokenizer_files import MERGES, VOCAB, read_tokenizer
from nanogpt.values import explain
from nanogpt.weights import check_weights, model_without_weights

PUBLISHED = tuple(PRESETS)  # the names under which weights are fetched
CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
INSTEAD = "pass a directory in which a Hugging Face GPT-2 was saved"
WEIGHTS = (SAFETENSORS, "pytorch_model.bin")  # each whole, or in shards with an index
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SCORE, CLASSES = "score.weight", "classes.weight"  # the head of a classifier: there, and here
WITHOUT_BIAS = ("wte.weight", "wpe.weight", CLASSES)
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")

FIELDS = {  # of config.json, as those of GPTConfig
    "n_positions": "block_size",
    "resid_pdrop": "dropout",
    **{key: key for key in ("vocab_size", "n_layer", "n_head", "n_embd")},
}
# The values of config.json that our model has, its defaults first.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (NORM_EPSILON,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}

log = logging.getLogger("nanogpt")


def fetch_pretrained(name: str, data_dir: str | PathLike[str]) -> Path:
    """Return the directory data_dir/weights/name of published weights, fetched where need be.

    `name` is gpt2, gpt2-medium, gpt2-large or gpt2-xl. Whole files are found without the network
    and not fetched again. Raises ConnectionError within seconds where the hub cannot be reached,
    ValueError where other weights lie there.
    """
    expected = GPTConfig.preset(name)
    directory = Path(data_dir) / "weights" / name
    if _unreadable(directory):
        _fetch(name, directory)
    found = _read_config(directory)
    if replace(found, dropout=0.0) != expected:
        raise ValueError(
            f"{directory} has {found} but {name} is {expected}; remove the directory, or pass "
            f"another data_dir"
        )
    return directory


def load_pretrained(path: str | PathLike[str]) -> GPT:
    """Return the model of a local Hugging Face GPT-2 directory, in float32.

    It is a Classifier where a classifier's head is among the weights. The three dropout rates of
    config.json become one, that of the residual stream. Raises FileNotFoundError where config.json
    or the weights are missing, ValueError where they are damaged or describe anything but a GPT-2.
    """
    directory = Path(path)
    config, tensors = _read_config(directory), _read_weights(directory)
    n_labels = max(1, *tensors[CLASSES].shape[:1]) if CLASSES in tensors else None
    try:
        check_weights(tensors, config, n_labels)
    except ValueError as error:
        raise ValueError(f"{directory} {error}, which its {CONFIG} describes") from error
    model = model_without_weights(config, n_labels)
    model.load_state_dict(tensors, assign=True)
    return model


def published_weights(model: GPT) -> dict[str, Tensor]:
    """Return the weights of a GPT-2, (C_in, C_out), under their published names.

    A language model's head is the token embedding and is not among them; a classifier's is.
    """
    published = {}
    for name, tensor in gpt2_weights(model).items():
        there = SCORE if name == CLASSES else f"transformer.{name}"
        published[there] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    return published


def gpt2_weights(model: GPT) -> dict[str, Tensor]:
    """Return the weights of a GPT-2, (C_out, C_in), on the CPU; a missing bias is zero."""
    weights = {name: tensor.float().cpu() for name, tensor in model.state_dict().items()}
    for name, tensor in list(weights.items()):
        if name.endswith(".weight") and name not in WITHOUT_BIAS:
            weights.setdefault(f"{name.removesuffix('weight')}bias", torch.zeros(tensor.size(0)))
    return weights


def _unreadable(directory: Path) -> list[str]:
    """Return which of the fetched files are missing or damaged."""
    readers: dict[tuple[str, ...], Callable[[], object]] = {
        (CONFIG,): lambda: _read_json(directory / CONFIG),
        (VOCAB, MERGES): lambda: read_tokenizer(directory),
        # compares header and size
        (SAFETENSORS,): lambda: safe_open(directory / SAFETENSORS, framework="pt"),
    }
    unreadable: list[str] = []
    for files, read in readers.items():
        try:
            is_whole = read() is not None
        except (ValueError, OSError, SafetensorError):
            is_whole = False
        unreadable += () if is_whole else files
    return unreadable


def _fetch(name: str, directory: Path) -> None:
    """Fetch the files of published weights that are missing or damaged."""
    repository = f"openai-community/{name}"
    instead = (
        f"run python -m nanogpt.prepare {name} on a connected machine and copy its {directory} "
        f"here, or pass the path of a local Hugging Face directory"
    )
    with hub_errors(f"the weights of {repository}", instead):
        from huggingface_hub import hf_hub_download

        directory.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(FileLock(directory / ".lock"), f"fetches {directory}"):
            for file in _unreadable(directory):
                (directory / file).unlink(missing_ok=True)
                log.info("fetching %s of %s into %s", file, repository, directory)
                hf_hub_download(repository, file, local_dir=directory)


def _read_config(directory: Path) -> GPTConfig:
    path = directory / CONFIG
    found = _read_json(path)
    if found.get("model_type") != "gpt2":
        raise ValueError(
            f"{path} has model_type={found.get('model_type')!r}; only 'gpt2' can be read"
        )
    names = {ours: found[theirs] for theirs, ours in FIELDS.items() if theirs in found}
    try:
        config = GPTConfig(**{"dropout": 0.1, **names})
    except ValidationError as error:
        raise ValueError(f"{path} cannot be read: {explain(error)}") from error
    for key, allowed in {**REQUIRED, "n_inner": (4 * config.n_embd, None)}.items():
        if found.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{path} has {key}={found[key]!r}; only {allowed[0]!r} can be read")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise ValueError where it is none."""
    try:
        found: dict[str, Any] = TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist; {INSTEAD}") from error
    except ValidationError as error:
        raise ValueError(f"{path} is no JSON object; fetch it again") from error
    return found


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """Return the tensors under our names and in our orientation, in memory of their own."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_paths(directory):
        for name, tensor in _read_tensors(path).items():
            name = CLASSES if name == SCORE else name.removeprefix("transformer.")
            if not name.endswith(CAUSAL_MASKS):
                if not tensor.is_floating_point():
                    raise ValueError(f"{path} has {tensor.dtype} for {name}, not real numbers")
                tensor = tensor.t() if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
                tensors[name] = torch.empty(tensor.shape).copy_(tensor)
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors.get("wte.weight", head)):
        raise ValueError(
            f"the lm_head.weight in {directory} is not its wte.weight; only a tied head can be read"
        )
    return tensors


def _weight_paths(directory: Path) -> list[Path]:
    """Return the file of the weights, or the shards that an index lists."""
    for name in WEIGHTS:
        path, index = directory / name, directory / f"{name}.index.json"
        if path.is_file():
            return [path]
        if index.is_file():
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise ValueError(f"{index} lists no files; fetch it again")
            return sorted({directory / Path(str(shard)).name for shard in shards.values()})
    raise FileNotFoundError(f"{directory} holds neither {' nor '.join(WEIGHTS)}; {INSTEAD}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.detach() for name, tensor in content.items()}
    except OSError:
        raise
    except Exception as error:  # whatever a file can do to its reader
        raise ValueError(
            f"{path} is truncated, damaged, or holds more than tensors; fetch it again"
        ) from error
