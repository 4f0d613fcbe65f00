"""The architectures of transformers that models are read from and written as.

Each translates a `GPTConfig` to the keys of config.json and back, and the weights to its tensors
and back. Query, key and value maps are apart there and rows of one matrix, `c_attn`, here.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanogpt.model import GPT, GPTConfig
from nanogpt.support import ANY, unsupported

CLASSES, SCORE = "classes.weight", "score.weight"  # the head of a classifier: here, and there
# Linear maps of GPT-2 are stored input by output ("Conv1D"): the transpose of ours.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
WITHOUT_BIAS = ("wte.weight", "wpe.weight", "lm_head.weight", CLASSES)
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # of old files
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA_NAMES = {  # of modules; several hold the rows of one of ours, in order
    "wte": ("model.embed_tokens",),
    "ln_f": ("model.norm",),
    "lm_head": ("lm_head",),
    "classes": ("score",),
    "ln_1": ("input_layernorm",),
    "attn.c_attn": QKV,
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_gate": ("mlp.gate_proj",),
    "mlp.c_fc": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
NAME = re.compile(r"((?:h|model\.layers)\.\d+\.)?(.+)\.(weight|bias)")
GPT2_KEYS = {
    "n_positions": "block_size",
    **{key: key for key in ("vocab_size", "n_layer", "n_head", "n_embd", "n_inner")},
    "resid_pdrop": "dropout",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
LLAMA_KEYS = {
    "max_position_embeddings": "block_size",
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "head_dim": "head_size",
    "attention_bias": "bias",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_base",
    "tie_word_embeddings": "tie_embeddings",
}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers; `prefix` begins the names of its classes.

    `keys` of config.json stand for fields of `GPTConfig`, `defaults` for those that are absent.
    `fixed` fields have one value. Other keys that change what a model computes have a `required`
    value, of several the first by default.
    """

    model_type: str
    prefix: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    required: Mapping[str, tuple[Any, ...]]

    @property
    def is_llama(self) -> bool:
        """Whether the tensors have the names of Llama's, else those of GPT-2's."""
        return self.keys is LLAMA_KEYS

    def unsupported(self, config: GPTConfig) -> dict[str, Any]:
        """Return the fields of a configuration, with their values, that it does not have.

        Weights of `qk_norm` that a model lacks are ones.
        """
        free = dict.fromkeys([*self.keys.values(), "qk_norm_weight"], ANY)
        free |= {"rope_scaling": ANY} if self.is_llama else {}
        fixed = {k: (value,) for k, value in self.fixed.items() if k != "qk_norm_weight"}
        return unsupported(config, {**free, **fixed})

    def read_config(self, found: Mapping[str, Any]) -> GPTConfig:
        """Return the configuration that config.json describes.

        Raises ValueError for values that no model here has, and where a size is missing.
        """
        required = {**self.required}
        if "mlp_bias" in required:
            required["mlp_bias"] = (found.get("attention_bias", False),)
        for key, allowed in required.items():
            if found.get(key, allowed[0]) not in allowed:
                raise ValueError(f"has {key}={found[key]!r}; only {allowed[0]!r} can be read")
        rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
        found = {**self.defaults, **{k: rope[k] for k in {"rope_theta"} & rope.keys()}, **found}
        if missing := self.keys.keys() - found.keys():
            raise ValueError(f"lacks {', '.join(sorted(missing))}")
        values = {ours: found[theirs] for theirs, ours in self.keys.items()}
        scaling = _read_scaling(rope) if self.is_llama else None
        return GPTConfig(**{**values, **self.fixed, "rope_scaling": scaling})

    def write_config(self, config: GPTConfig) -> dict[str, Any]:
        """Return the keys of config.json for a configuration that it supports."""
        derived = {
            "n_kv_head": config.kv_heads,
            "head_size": config.head_dim,
            "n_inner": config.inner_dim,
        }
        values = {**vars(config), **derived}
        written = {theirs: values[ours] for theirs, ours in self.keys.items()}
        required = {key: allowed[0] for key, allowed in self.required.items()}
        if "mlp_bias" in required:
            required["mlp_bias"] = config.bias
        if config.rope_scaling is not None:
            scaling = dict(zip(SCALING, config.rope_scaling, strict=True))
            written["rope_scaling"] = {"rope_type": "llama3", **scaling}
        if not self.is_llama:
            written |= dict.fromkeys(("embd_pdrop", "attn_pdrop"), config.dropout)
        return {"model_type": self.model_type, **written, **required}

    def read_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors, of any shape, under our names and in our orientation, as copies."""
        indices = {
            theirs: (ours, i) for ours, n in LLAMA_NAMES.items() for i, theirs in enumerate(n)
        }
        parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            match = NAME.fullmatch(name)
            if self.is_llama and match and match[2] in indices:
                ours, i = indices[match[2]]
                layer = (match[1] or "").replace("model.layers.", "h.")
                parts[f"{layer}{ours}.{match[3]}"][i] = tensor
            else:
                name = CLASSES if name == SCORE else name.removeprefix("transformer.")
                is_transposed = name.endswith(TRANSPOSED) and tensor.dim() == 2
                parts[name][0] = tensor.t() if is_transposed else tensor
        return {n: torch.cat([own[i] for i in sorted(own)]).float() for n, own in parts.items()}

    def write_weights(self, model: GPT) -> dict[str, Tensor]:
        """Return the weights, of any shape, under their names there; GPT-2 has zeros for biases."""
        config, theirs = model.config, {}
        if not self.is_llama:
            for name, tensor in biased_weights(model).items():
                there = SCORE if name == CLASSES else f"transformer.{name}"
                there = there.replace("transformer.lm_head", "lm_head")
                theirs[there] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
            return theirs
        sizes = [n * config.head_dim for n in (config.n_head, config.kv_heads, config.kv_heads)]
        for name, tensor in _weights(model).items():
            match = NAME.fullmatch(name)
            assert match is not None
            names, layer = LLAMA_NAMES[match[2]], (match[1] or "").replace("h.", "model.layers.")
            rows = tensor.split(sizes) if names is QKV else (tensor,)
            for there, own in zip(names, rows, strict=True):
                theirs[f"{layer}{there}.{match[3]}"] = own.contiguous()
        if config.qk_norm and not config.qk_norm_weight:
            for layer in range(config.n_layer):
                for there in ("q_norm", "k_norm"):
                    ones = torch.ones(config.head_dim)
                    theirs[f"model.layers.{layer}.self_attn.{there}.weight"] = ones
        return theirs


def _llama(
    model_type: str, prefix: str, *, act: str = "silu", qk_norm: bool = False
) -> Architecture:
    """Return Llama's architecture, or a relative's."""
    activation = {"silu": "swiglu", "relu2": "relu2"}[act]
    fixed = {"position": "rotary", "norm": "rmsnorm", "activation": activation, "qk_norm": qk_norm}
    defaults = {
        "num_key_value_heads": None,
        "head_dim": 128 if qk_norm else None,
        "attention_bias": False,
        "rms_norm_eps": 1e-6 if act == "silu" else 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    }
    required: dict[str, tuple[Any, ...]] = {"hidden_act": (act,)}
    if qk_norm:  # only the attention may have biases there
        fixed |= {"qk_norm_weight": True, "bias": False}
        required |= {"use_sliding_window": (False,), "attention_bias": (False,)}
    else:
        required["mlp_bias"] = (False,)
    return Architecture(model_type, prefix, LLAMA_KEYS, defaults, fixed, required)


GPT2 = Architecture(
    model_type="gpt2",
    prefix="GPT2",
    keys=GPT2_KEYS,
    defaults={theirs: getattr(GPTConfig(dropout=0.1), ours) for theirs, ours in GPT2_KEYS.items()},
    fixed={},
    required={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
)
ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        GPT2,
        _llama("llama", "Llama"),
        _llama("qwen3", "Qwen3", qk_norm=True),
        _llama("arcee", "Arcee", act="relu2"),
    )
}


def find_architecture(config: GPTConfig, name: str | None = None) -> Architecture:
    """Return the first architecture that a model fits, or the named one.

    Raises ValueError, naming the fields in the way of the nearest one, where none fits.
    """
    candidates = ARCHITECTURES.values() if name is None else [ARCHITECTURES[name]]
    nearest = min(candidates, key=lambda candidate: len(candidate.unsupported(config)))
    if found := nearest.unsupported(config):
        values = ", ".join(f"{key}={value}" for key, value in found.items())
        which = "" if name else f", the nearest of {', '.join(ARCHITECTURES)}"
        raise ValueError(f"has {values}, which {nearest.model_type}{which} lacks")
    return nearest


def biased_weights(model: GPT) -> dict[str, Tensor]:
    """Return the weights, (C_out, C_in), on the CPU in float32; a missing bias is zero."""
    weights = _weights(model)
    for name, tensor in list(weights.items()):
        if name.endswith(".weight") and name not in WITHOUT_BIAS:
            weights.setdefault(f"{name.removesuffix('weight')}bias", torch.zeros(tensor.size(0)))
    return weights


def _weights(model: GPT) -> dict[str, Tensor]:
    return {name: tensor.float().cpu() for name, tensor in model.state_dict().items()}


def _read_scaling(rope: Mapping[str, Any]) -> tuple[Any, ...] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3" or not rope.keys() >= {*SCALING}:
        raise ValueError(f"has RoPE scaling {kind!r}; only 'llama3' can be read")
    return tuple(rope[key] for key in SCALING)
