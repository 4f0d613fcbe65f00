"""The architectures of transformers that models are read from and written as.

Each translates a `GPTConfig` to the keys of config.json and back, and the weights to its tensors
and back. Query, key and value maps are apart there and rows of one matrix, `c_attn`, here.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanogpt.model import DERIVED, GPT, GPTConfig
from nanogpt.support import ANY, unsupported

# Linear maps of GPT-2 are stored input by output ("Conv1D"): the transpose of ours.
TRANSPOSED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # of old files
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA_NAMES = {  # of modules; several hold the rows of one of ours, in order
    "wte": ("embed_tokens",),
    "ln_f": ("norm",),
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
GPT2_NAMES = {name: (name,) for name in [*LLAMA_NAMES, "wpe"]} | {"classes": ("score",)}
NAME = re.compile(r"((?:h|layers)\.\d+\.)?(.+)\.(weight|bias)")
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
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_base",
    "tie_word_embeddings": "tie_embeddings",
}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers; `prefix` begins the names of its classes.

    `keys` of config.json stand for fields of `GPTConfig`, `defaults` for those that are absent.
    `fixed` fields have one value; a model that is written may have any of a `free` one. Other keys
    that change what a model computes have a `required` value, of several the first by default.
    `names` are those of modules, which follow `base` except for the heads.
    """

    model_type: str
    prefix: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    required: Mapping[str, tuple[Any, ...]]
    names: Mapping[str, tuple[str, ...]]
    base: str
    free: tuple[str, ...] = ()

    def unsupported(self, config: GPTConfig) -> dict[str, Any]:
        """Return the fields of a configuration, with their values, that it does not have."""
        fixed = {key: (value,) for key, value in self.fixed.items()}
        return unsupported(config, fixed | dict.fromkeys([*self.keys.values(), *self.free], ANY))

    def read_config(self, found: Mapping[str, Any]) -> GPTConfig:
        """Return the configuration that config.json describes.

        Raises ValueError for values that no model here has, and where a size is missing.
        """
        rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
        found = {**self.defaults, **{k: rope[k] for k in {"rope_theta"} & rope.keys()}, **found}
        if missing := self.keys.keys() - found.keys():
            raise ValueError(f"lacks {', '.join(sorted(missing))}")
        values = {ours: found[theirs] for theirs, ours in self.keys.items()}
        alike = {theirs: (values[ours],) for theirs, ours in self.keys.items()}  # keys of one field
        for key, allowed in {**self.required, **alike}.items():
            if found.get(key, allowed[0]) not in allowed:
                raise ValueError(f"has {key}={found[key]!r}; only {allowed[0]!r} can be read")
        kind = rope.get("rope_type", rope.get("type", "default"))
        scaling: tuple[Any, ...] | None = None
        if kind != "default":
            if kind != "llama3" or not rope.keys() >= {*SCALING}:
                raise ValueError(f"has RoPE scaling {kind!r}; only 'llama3' can be read")
            scaling = tuple(rope[key] for key in SCALING)
        return GPTConfig(**values, **self.fixed, rope_scaling=scaling)

    def write_config(self, config: GPTConfig) -> dict[str, Any]:
        """Return the keys of config.json for a configuration that it supports."""
        derived = (config.kv_heads, config.head_dim, config.inner_dim)
        values = {**vars(config), **dict(zip(DERIVED, derived, strict=True))}
        written = {theirs: values[ours] for theirs, ours in self.keys.items()}
        if config.rope_scaling is not None:
            scaling = dict(zip(SCALING, config.rope_scaling, strict=True))
            written["rope_scaling"] = {"rope_type": "llama3", **scaling}
        elif self is APERTUS:  # which is scaled by default
            written["rope_scaling"] = {"rope_type": "default"}
        if self is GPT2:
            written |= dict.fromkeys(("embd_pdrop", "attn_pdrop"), config.dropout)
        written |= {key: allowed[0] for key, allowed in self.required.items()}
        return {"model_type": self.model_type, **written}

    def read_weights(self, tensors: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
        """Return tensors, of any shape, under our names and in our orientation, as copies."""
        indices = {there: (ours, i) for ours, n in self.names.items() for i, there in enumerate(n)}
        parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            match, i = NAME.fullmatch(name.removeprefix(self.base)), 0
            if match and match[2] in indices:
                ours, i = indices[match[2]]
                name = f"{(match[1] or '').replace('layers.', 'h.')}{ours}.{match[3]}"
                tensor = self._oriented(match[2], tensor, config)
            parts[name][i] = tensor
        return {n: torch.cat([own[i] for i in sorted(own)]).float() for n, own in parts.items()}

    def write_weights(self, model: GPT) -> dict[str, Tensor]:
        """Return the weights, of any shape, under their names there; GPT-2 has zeros for biases.

        Weights of `qk_norm` that a model lacks are ones.
        """
        config, theirs = model.config, {}
        weights = biased_weights(model) if self is GPT2 else _weights(model)
        L, D = config.n_layer, config.head_dim
        if "qk_norm_weight" in self.free:
            ones = {f"h.{i}.attn.{n}_norm.weight": torch.ones(D) for i in range(L) for n in "qk"}
            weights = ones | weights
        sizes = [n * D for n in (config.n_head, config.kv_heads, config.kv_heads)]
        for name, tensor in weights.items():
            [(layer, ours, kind)] = NAME.findall(name)
            layer = layer if self is GPT2 else layer.replace("h.", "layers.")
            base = "" if ours in ("lm_head", "classes") else self.base
            rows = tensor.split(sizes) if self.names[ours] is QKV else (tensor,)
            for there, own in zip(self.names[ours], rows, strict=True):
                oriented = self._oriented(there, own, config).contiguous()
                theirs[f"{base}{layer}{there}.{kind}"] = oriented
        return theirs

    def _oriented(self, there: str, tensor: Tensor, config: GPTConfig) -> Tensor:
        if there in TRANSPOSED and tensor.dim() == 2:
            return tensor.t()
        if self.model_type == "nanochat" and there in QKV[:2]:  # which are turned backwards there
            halves = tensor.reshape(-1, 2, config.head_dim // 2, *tensor.shape[1:])
            return halves.flip(1).reshape(tensor.shape)
        return tensor


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
    names=GPT2_NAMES,
    base="transformer.",
)
LLAMA = Architecture(
    model_type="llama",
    prefix="Llama",
    keys=LLAMA_KEYS | {"attention_bias": "bias", "mlp_bias": "bias"},
    defaults={
        **dict.fromkeys(("num_key_value_heads", "head_dim")),
        **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"), False),
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
    },
    fixed={"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": False},
    required={"hidden_act": ("silu",)},
    names=LLAMA_NAMES,
    base="model.",
    free=("rope_scaling",),
)
QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    prefix="Qwen3",
    keys=LLAMA_KEYS,
    defaults={**LLAMA.defaults, "head_dim": 128},
    fixed={**LLAMA.fixed, "qk_norm": True, "qk_norm_weight": True, "bias": False},
    required={**LLAMA.required, "use_sliding_window": (False,), "attention_bias": (False,)},
    free=("rope_scaling", "qk_norm_weight"),
)
ARCEE = replace(
    LLAMA,
    model_type="arcee",
    prefix="Arcee",
    defaults={**LLAMA.defaults, "rms_norm_eps": 1e-5},
    fixed={**LLAMA.fixed, "activation": "relu2"},
    required={"hidden_act": ("relu2",)},
)
APERTUS = replace(  # as published it has xIELU in place of the squared ReLU
    QWEN3,
    model_type="apertus",
    prefix="Apertus",
    defaults={**QWEN3.defaults, "rms_norm_eps": 1e-5},
    fixed={**QWEN3.fixed, "activation": "relu2"},
    required={"hidden_act": ("relu2",), "attention_bias": (False,)},
    names=LLAMA_NAMES | {"ln_1": ("attention_layernorm",), "ln_2": ("feedforward_layernorm",)},
)
NANOCHAT = replace(
    ARCEE,
    model_type="nanochat",
    prefix="NanoChat",
    keys=LLAMA_KEYS | {"final_logit_softcapping": "logit_softcap"},
    defaults={**LLAMA.defaults, "final_logit_softcapping": 15.0},
    fixed={**ARCEE.fixed, "qk_norm": True, "norm_weight": False, "embd_norm": True, "bias": False},
    required={**ARCEE.required, "attention_bias": (False,)},
    names=LLAMA_NAMES | {"mlp.c_fc": ("mlp.fc1",), "mlp.c_proj": ("mlp.fc2",)},
)
ARCHITECTURES = {one.model_type: one for one in (GPT2, LLAMA, QWEN3, ARCEE, APERTUS, NANOCHAT)}


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


def without_embedding_norm(model: GPT) -> GPT:
    """Return a model that computes the same from embeddings that are normalised already.

    Its head is its own; weights of its norms are ones where the model has none.
    """
    config, weights = model.config, _weights(model)
    folded = GPT(replace(config, norm_weight=True, embd_norm=False, tie_embeddings=False))
    head = weights.get("lm_head.weight", weights["wte.weight"])
    embedding = model.ln_e(weights["wte.weight"])
    weights |= {"wte.weight": embedding, "lm_head.weight": head}
    folded.load_state_dict(weights, strict=False)
    return folded


def biased_weights(model: GPT) -> dict[str, Tensor]:
    """Return the weights, (C_out, C_in), on the CPU in float32; a missing bias is zero."""
    weights = _weights(model)
    for name, tensor in list(weights.items()):
        if name.endswith(".weight") and name.startswith(("h.", "ln_f.")):
            weights.setdefault(f"{name.removesuffix('weight')}bias", torch.zeros(tensor.size(0)))
    return weights


def _weights(model: GPT) -> dict[str, Tensor]:
    return {name: tensor.float().cpu() for name, tensor in model.state_dict().items()}
