"""Blocks of another package: imported by path, checked, constructed (`model.block`)."""

import importlib
import inspect
from typing import Any

from torch import nn


def build_blocks(config: Any, default: type[nn.Module]) -> list[nn.Module]:
    """Return the blocks of a `GPTConfig`: of the class `config.block` names, or the default one.

    Raises ValueError where the named class cannot be a block.
    """
    block = default if config.block is None else import_block(config.block, default)
    try:
        return [block(config, layer) for layer in range(config.n_layer)]
    except Exception as error:  # whatever the constructor raises
        if config.block is None:
            raise
        raise ValueError(
            f"model.block={config.block} cannot be constructed from a GPTConfig and the number of "
            f"its layer ({type(error).__name__}: {error})"
        ) from error


def import_block(path: str, like: type[nn.Module]) -> type[nn.Module]:
    """Import the class of a block, which runs the code of its module.

    Raises ValueError where it cannot be imported, is no `nn.Module` class, or its forward does not
    take the arguments of `like.forward`.
    """
    module, _, name = path.rpartition(".")
    try:
        block = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module raises
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"model.block={path} cannot be imported ({reason})") from error
    if not (isinstance(block, type) and issubclass(block, nn.Module)):
        raise ValueError(f"model.block={path} is not a subclass of torch.nn.Module")
    names = list(inspect.signature(like.forward).parameters)
    try:
        inspect.signature(block.forward).bind(*names)
    except TypeError as error:
        raise ValueError(
            f"model.block={path} has a forward that does not take {', '.join(names[1:])} by "
            f"position ({error})"
        ) from error
    return block
