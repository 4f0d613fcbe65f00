"""Which models a consumer supports: allow-lists over the fields of `GPTConfig`, trials of blocks.

A consumer relies on more than a model's forward: kernels, a file format, the shape of a cache, a
formula. It lists the values that it handles, so that a new field or value is refused until it is
implemented there too.
"""

from collections.abc import Container, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from nanogpt.model import GPT, Attend, GPTConfig

Supported = Mapping[str, Container[Any]]  # values by field


class _Any:
    def __contains__(self, value: object) -> bool:
        return True


ANY = _Any()
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
GENERAL = (*SIZES, "bias", "dropout", "zero_init", "qk_gain")  # no consumer restricts them
# Supported by a consumer that runs the model's own blocks, rotation and head.
IN_MODEL: Supported = {
    **dict.fromkeys(("norm", "activation", "qk_norm", "block", "n_inner", "qk_norm_weight"), ANY),
    **dict.fromkeys(("norm_eps", "norm_weight", "rope_base", "rope_scaling", "embd_norm"), ANY),
    **dict.fromkeys(("logit_softcap", "n_kv_head", "head_size", "tie_embeddings"), ANY),
    **dict.fromkeys(("token_shift", "embd_shortcut"), ANY),
    "position": ("learned", "rotary"),
}


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
    return {name: value for name in known if (value := getattr(config, name)) not in known[name]}


def check_supported(config: GPTConfig, consumer: str, supported: Supported) -> None:
    """Raise ValueError, naming the consumer, for a configuration that it does not support."""
    if found := unsupported(config, supported):
        values = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ValueError(
            f"{consumer} does not support {values}; implement it there, or use another model"
        )


@torch.no_grad()
def mixes_by_attend(model: GPT) -> bool:
    """Return whether a model mixes tokens through `attend` alone, called once in every layer.

    Keys and values then stand for the tokens before, and rows may share tokens. Blocks of
    another class are tried: with an attention that mixes nothing, the output of a token must
    depend neither on the other of two tokens nor on which of them it is.
    """
    if model.config.block is None:
        return True
    layers: list[int] = []
    x = torch.randn(3, model.config.n_embd, generator=torch.Generator().manual_seed(0))
    x = x.to(model.wte.weight)
    tolerance = torch.finfo(x.dtype).eps ** 0.5

    class Unmixed(Attend):
        def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layers.append(layer)
            return q

    for block in model.h:
        first, second, moved = (
            block(x[None, pair], model.rotation(pair), Unmixed())[0]
            for pair in torch.tensor([[0, 1], [2, 1], [1, 0]], device=x.device)
        )
        is_alike = torch.allclose(first[1], moved[0], tolerance, tolerance)
        if not (is_alike and first[1].equal(second[1])):
            return False
    return layers == [layer for layer in range(model.config.n_layer) for _ in range(3)]
