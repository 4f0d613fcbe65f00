"""Which model configurations a consumer supports: allow-lists over the fields of `GPTConfig`.

A consumer relies on more than a model's forward: kernels, a file format, the shape of a cache, a
formula. It lists the values that it handles, so that a new field or value is refused until it is
implemented there too.
"""

from collections.abc import Container, Mapping
from dataclasses import fields
from typing import Any

from nanogpt.model import GPTConfig


class _Any:
    def __contains__(self, value: object) -> bool:
        return True


ANY = _Any()
# Sizes, biases and fields for training alone, which every consumer supports.
GENERAL = (
    "block_size",
    "vocab_size",
    "n_layer",
    "n_head",
    "n_embd",
    "bias",
    "dropout",
    "zero_init",
)
# Of no concern to a consumer that runs the model's own blocks.
IN_BLOCKS = dict.fromkeys(("norm", "activation", "qk_norm", "block"), ANY)

Supported = Mapping[str, Container[Any]]


def unsupported(config: GPTConfig, supported: Supported) -> dict[str, Any]:
    """Return the fields of a configuration, with their values, that a consumer does not support.

    `supported` maps fields to values. Of a field that it lacks the default alone is supported,
    which is that of GPT-2 and of the models of versions without the field.
    """
    known: Supported = {
        **{field.name: (field.default,) for field in fields(config)},
        **dict.fromkeys(GENERAL, ANY),
        **supported,
    }
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: value for name, value in values.items() if value not in known[name]}


def check_supported(config: GPTConfig, consumer: str, supported: Supported) -> None:
    """Raise ValueError, naming the consumer, for a configuration that it does not support."""
    if found := unsupported(config, supported):
        values = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ValueError(
            f"{consumer} does not support {values}; implement it there, or use another model"
        )
