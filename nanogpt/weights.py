"""Files of weights, and the names and shapes of a model's weights before a model is built."""

import errno
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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
            raise ValueError("it is no regular file")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            n_claimed = sum(entry.file_size for entry in entries)
            if n_claimed > n_bytes or any(entry.compress_type for entry in entries):
                raise ValueError("its entries are compressed or larger than the file")
            if verify and (broken := archive.testzip()):
                raise ValueError(f"its entry {broken[:80]!r} is truncated or altered")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except ValueError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError("it holds Python objects, which can run code when loaded") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is a wrong offset
            raise
        raise ValueError(
            f"it is truncated, altered or another kind of file ({type(error).__name__})"
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
    try:
        expected = model_without_weights(replace(config, block=None), n_labels).state_dict()
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"has a model of a size that no tensor can have: {config}") from error
    if config.block is not None:
        weights, expected = (
            {name: tensor for name, tensor in tensors.items() if not name.startswith("h.")}
            for tensors in (weights, expected)
        )
    missing, unknown = sorted(expected.keys() - weights), sorted(weights.keys() - expected)
    if missing or unknown:
        raise ValueError(
            f"has weights that are not those of its model: missing {_some(missing)}; "
            f"not known {_some(unknown)}"
        )
    for name, other in expected.items():
        tensor = weights[name]
        if tensor.shape != other.shape:
            found, shape = tuple(tensor.shape), tuple(other.shape)
            raise ValueError(f"has {found} for {name} where its model has {shape}")
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"has {tensor.dtype} for {name} where numbers are floating-point")
    storages = [tensor.untyped_storage() for tensor in weights.values()]
    n_stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if sum(tensor.nbytes for tensor in weights.values()) > 2 * n_stored:  # tied weights share one
        raise ValueError("has weights of more values than it stores")


class _Undrawn(TorchFunctionMode):
    """Leaves out the drawing of weights: to draw none, torch imports its compiler for a second."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "normal_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _some(names: list[str]) -> str:
    shown = [name[:80] if name.isprintable() else repr(name[:80]) for name in names[:3]]
    listed = ", ".join(shown) if names else "none"
    return f"{listed} and {len(names) - 3} more" if len(names) > 3 else listed
