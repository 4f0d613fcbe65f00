"""Files of weights, and the names and shapes of a model's weights before a model is built."""

import errno
import re
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nanogpt.classifier import Classifier
from nanogpt.model import GPT, GPTConfig


def load_archive(path: Path, *, verify: bool = True) -> Any:
    """Return the plain values and tensors of a file of `torch.save`; the tensors are memory-mapped.

    Code in the file does not run: `torch.load` builds weights only. With `verify` every byte is
    compared with the CRC-32 sums of the archive. Raises ValueError, without the path, for a file
    that is damaged, of another kind, compressed, or holds Python objects.
    """
    n_bytes = path.stat().st_size
    try:
        if not path.is_file():
            raise ValueError("no regular file")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            n_claimed = sum(entry.file_size for entry in entries)
            if n_claimed > n_bytes or any(entry.compress_type for entry in entries):
                raise ValueError("entries that are compressed or larger than the file")
            if verify and archive.testzip():
                raise ValueError("a wrong checksum")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is a wrong offset
            raise
        reason = error if type(error) is ValueError else type(error).__name__
        raise ValueError(
            f"is truncated, altered, of another kind, or holds Python objects, which can run code "
            f"when loaded ({reason})"
        ) from error


def model_without_weights(config: GPTConfig, n_labels: int | None = None) -> GPT:
    """Return a model without memory for its weights: a Classifier where there are labels.

    Blocks of another class are built as they are: their buffers may not be in a state dict.
    """
    with ExitStack() as stack:
        if config.block is None:
            stack.enter_context(torch.device("meta"))
            stack.enter_context(_Undrawn())
        else:
            stack.enter_context(torch.random.fork_rng(devices=[]))
        return GPT(config) if n_labels is None else Classifier(config, n_labels)


def check_weights(weights: Mapping[str, Tensor], config: GPTConfig, n_labels: int | None) -> None:
    """Raise ValueError where weights, of any shape, do not fit a model: names, shapes or numbers.

    No model of more layers than the weights have is built. Of blocks of another class, whose module
    is not imported, the number alone is checked.
    """
    layers = {name.split(".")[1] for name in weights if name.startswith("h.")}
    if len(layers) != config.n_layer:
        raise ValueError(f"has weights of {len(layers)} layers and n_layer={config.n_layer}")
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"has {tensor.dtype} for {name} where numbers are floating-point")
    storages = [tensor.untyped_storage() for tensor in weights.values()]
    n_stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if sum(tensor.nbytes for tensor in weights.values()) > 2 * n_stored:  # tied weights share one
        raise ValueError("has weights of more values than it stores")
    try:
        model = model_without_weights(replace(config, block=None), n_labels)
        if config.block is not None:
            model.h = nn.ModuleList()
            weights = {name: t for name, t in weights.items() if not name.startswith("h.")}
        model.load_state_dict({name: t.to("meta") for name, t in weights.items()}, assign=True)
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"has weights that do not fit its model ({printable(error)})") from error


def printable(error: Exception) -> str:
    """Return an error of `load_state_dict` in one line of at most 300 printable characters."""
    return " ".join(re.findall(r"[!-~]+", str(error)))[:300]


class _Undrawn(TorchFunctionMode):
    """Leaves out the drawing of weights: to draw none, torch imports its compiler for a second."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "normal_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
