"""The forward pass of `forward.py` in C++ (kernels.cpp), for CPUs: faster, for any number of rows.

Without a compiler, and for configurations that the kernels do not support, `Forward` is used.
"""

import ctypes
import logging
import math
import time
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.classifier import Classifier
from nanogpt.model import GPT, Block, soft_capped
from nanogpt.support import ANY, Supported, unsupported
from serving.engine import compiling
from serving.engine.forward import Forward, Span, ids_before, round_to_24_bits

SUPPORTED: Supported = {
    "position": ("learned", "rotary"),
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "relu2", "swiglu"),
    **dict.fromkeys(("n_kv_head", "head_size", "n_inner", "qk_norm", "qk_norm_weight"), ANY),
    **dict.fromkeys(("norm_eps", "norm_weight", "rope_base", "rope_scaling"), ANY),
    **dict.fromkeys(("embd_norm", "tie_embeddings", "logit_softcap", "token_shift"), ANY),
}
ACTIVATIONS = {"gelu": 0, "relu2": 1, "swiglu": 2}
DTYPES = {"fp32": 0, "bf16": 1, "int8": 2, "fp24": 3, "widened": 4}  # the last: bf16 by fp32's FMAs
WEIGHT_BYTES = (4, 2, 1, 3)  # by the number of the dtype
PANEL = GROUP = 64
HEAD_SIZES = range(16, 129, 16)

log = logging.getLogger(__name__)


def _fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    """Return fields of one type; the order of a structure's fields is that of kernels.cpp."""
    return [(name, kind) for name in names]


class _Matrix(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_void_p, "weights", "scales", "bias"),
        *_fields(ctypes.c_int32, "n", "k"),
    )


class _Norm(ctypes.Structure):
    _fields_ = _fields(ctypes.c_void_p, "weight", "bias")


class _Layer(ctypes.Structure):
    _fields_ = (
        *_fields(_Norm, "ln_1", "ln_2", "q_norm", "k_norm"),
        *_fields(_Matrix, "c_attn", "attn_proj", "mlp_proj", "c_fc"),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int32, "dtype", "n_layer", "n_head", "n_kv_head", "head_size", "n_embd"),
        *_fields(ctypes.c_int32, "n_inner", "block_size", "n_slots", "rms_norm", "activation"),
        *_fields(ctypes.c_int32, "qk_norm", "n_threads"),
        ("norm_eps", ctypes.c_float),
        ("layers", ctypes.POINTER(_Layer)),
        ("ln_f", _Norm),
        ("head", _Matrix),
        *_fields(ctypes.c_void_p, "rotations", "cache"),
    )


class NativeForward:
    """Compute states and logits of spans, with keys and values in `cache` (L, 2, S, H', T, D).

    The model's float32 weights are repacked in `dtype`; the model itself is not used afterwards.
    """

    def __init__(self, model: GPT, cache: Tensor, dtype: str) -> None:
        library = load_library()
        assert library is not None, "supported() is false"
        self.library, self.config, self.cache = library, model.config, cache
        self.device = cache.device
        self._referenced: list[Tensor] = []  # by pointers of the kernels
        self.wte = model.wte.weight[: model.config.vocab_size].detach().to(cache.dtype)
        self.shift = model.shift.detach() if model.config.token_shift else None
        self.wpe = model.wpe.weight.detach() if model.config.position == "learned" else None
        self.ln_e = model.ln_e  # without weights
        self.classes = deepcopy(model.classes) if isinstance(model, Classifier) else None
        self._native = self._describe(model, DTYPES[dtype])

    @torch.inference_mode()
    def hidden_states(self, spans: list[Span]) -> Tensor:
        """Append spans to their slots; return the normalised final states (R, C) of all rows."""
        ids = torch.tensor([i for span in spans for i in span.ids])
        cells = [(s.slot, s.start + n) for s in spans for n in range(len(s.ids))]
        slots, positions = torch.tensor(cells, dtype=torch.int32).T.contiguous()
        x = self.wte[ids].float()  # (R, C)
        if self.shift is not None:
            before = self.wte[torch.tensor(ids_before(spans))].float()
            x += self.shift * (positions > 0)[:, None] * before
        if self.wpe is not None:
            x += self.wpe[positions.long()]
        x = self.ln_e(x)
        states = torch.empty_like(x)
        self._compute(self.library.hidden_states, slots, positions, x, states)
        return states

    @torch.inference_mode()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return the logits (R, V) float32 of states (R, C)."""
        states = hidden_states.contiguous()
        out = torch.empty(len(states), self.config.vocab_size)
        self._compute(self.library.logits, states, out)
        return soft_capped(out, self.config.logit_softcap)

    def _compute(self, function: Any, *rows: Tensor) -> None:
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in rows)
        if not function(ctypes.byref(self._native), len(rows[0]), *pointers):
            raise MemoryError(f"there is no memory to compute {len(rows[0])} rows")

    @torch.inference_mode()
    def class_probabilities(self, hidden_states: Tensor) -> Tensor:
        """Return a classifier's probabilities (R, K) float32 of states (R, C)."""
        assert self.classes is not None
        return self.classes(hidden_states).softmax(-1)

    def _describe(self, model: GPT, dtype: int) -> _Model:
        config = model.config
        rotation = model.rotation(torch.arange(config.block_size))
        layers = (_Layer * config.n_layer)()
        for layer, block in zip(layers, model.h, strict=True):
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            layer.ln_1, layer.ln_2 = self._norm(block.ln_1), self._norm(block.ln_2)
            if config.qk_norm_weight:
                layer.q_norm, layer.k_norm = self._norm(attn.q_norm), self._norm(attn.k_norm)
            layer.c_attn = self._packed(attn.c_attn.weight, attn.c_attn.bias, dtype)
            layer.attn_proj = self._packed(attn.c_proj.weight, attn.c_proj.bias, dtype)
            layer.mlp_proj = self._packed(mlp.c_proj.weight, mlp.c_proj.bias, dtype)
            weight: Tensor = mlp.c_fc.weight
            bias: Tensor | None = mlp.c_fc.bias
            if config.activation == "swiglu":
                weight = _interleaved(mlp.c_gate.weight, weight)
                bias = None if bias is None else _interleaved(mlp.c_gate.bias, bias)
            layer.c_fc = self._packed(weight, bias, dtype)
        return _Model(
            dtype=self.library.fastest(dtype),
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_kv_head=config.kv_heads,
            head_size=config.head_dim,
            n_embd=config.n_embd,
            n_inner=config.inner_dim,
            block_size=config.block_size,
            n_slots=self.cache.size(2),
            rms_norm=config.norm == "rmsnorm",
            activation=ACTIVATIONS[config.activation],
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            n_threads=torch.get_num_threads(),
            layers=layers,
            ln_f=self._norm(model.ln_f),
            head=self._packed(model.unembedding.weight[: config.vocab_size], None, dtype),
            rotations=None if rotation is None else self._pointer(rotation),
            cache=self.cache.data_ptr(),
        )

    def _norm(self, norm: nn.Module) -> _Norm:
        tensors = (getattr(norm, name, None) for name in ("weight", "bias"))
        return _Norm(*(None if tensor is None else self._pointer(tensor) for tensor in tensors))

    def _packed(self, weight: Tensor, bias: Tensor | None, dtype: int) -> _Matrix:
        packed, scales = (self._pointer(t) for t in _pack(self.library, weight, dtype))
        at = None if bias is None else self._pointer(bias)
        return _Matrix(packed, scales, at, *weight.shape)

    def _pointer(self, tensor: Tensor) -> int:
        if tensor.is_floating_point() and tensor.dtype != torch.bfloat16:
            tensor = tensor.detach().float().contiguous()
        self._referenced.append(tensor)
        return tensor.data_ptr()


ForwardPass = Forward | NativeForward


def _pack(library: ctypes.CDLL, weight: Tensor, dtype: int) -> tuple[Tensor, Tensor]:
    """Return weights (N, K) as the kernels read them, and their scales."""
    n, k = weight.shape
    n_whole = -(-n // PANEL) * PANEL
    packed = torch.empty(n_whole * k * WEIGHT_BYTES[dtype], dtype=torch.uint8)
    n_scales = n_whole * (k // GROUP) if dtype == DTYPES["int8"] else 0
    scales = torch.empty(n_scales, dtype=torch.bfloat16)
    weight = weight.detach().float().contiguous()
    library.pack(dtype, n, k, *(ctypes.c_void_p(t.data_ptr()) for t in (weight, packed, scales)))
    return packed, scales


def _interleaved(gate: Tensor, other: Tensor) -> Tensor:
    """Return 16 rows of one and 16 of the other tensor (N, ...) in turns, (2N, ...)."""
    return torch.stack((gate.unflatten(0, (-1, 16)), other.unflatten(0, (-1, 16))), 1).flatten(0, 2)


def make_forward(model: GPT, cache: Tensor, dtype: str, *, invariant: bool = True) -> ForwardPass:
    """Return the fastest forward pass for a model and its cache (L, 2, S, H', T, D) here.

    The engine's own kernels are `invariant` at no cost; others take longer for it.
    """
    if dtype == "fp24":
        round_to_24_bits(model)
    if supported(model, dtype, cache.device):
        forward = NativeForward(model, cache, dtype)
        model.to("meta")  # its weights are packed: free the others
        return forward
    return Forward(model.to(cache.dtype), cache, int8=dtype == "int8", invariant=invariant)


def cache_dtype(dtype: str) -> torch.dtype:
    """Return the precision of activations, keys and values for a precision of the weights."""
    return torch.float32 if dtype in ("fp32", "fp24") else torch.bfloat16


def supported(model: GPT, dtype: str, device: torch.device) -> bool:
    """Return whether the kernels compile here and support this model in this precision."""
    if device.type != "cpu":
        return False
    config = model.config
    if found := unsupported(config, SUPPORTED):
        values = ", ".join(f"{name}={value}" for name, value in found.items())
        log.info("the C++ kernels do not support %s; computing with torch", values)
        return False
    sizes = (config.n_embd, config.n_head * config.head_dim, config.inner_dim)
    fits = config.head_dim in HEAD_SIZES and all(size % PANEL == 0 for size in sizes)
    library = load_library() if fits else None
    return library is not None and bool(library.supports(DTYPES[dtype]))


@lru_cache
def bf16_gain() -> float | None:
    """Return how many times as fast the kernels compute in bf16 as in fp32; None without them.

    It is the geometric mean over products of 1 and 32 rows, on one thread: a wait for other
    processes' threads would be measured otherwise.
    """
    if (library := load_library()) is None:
        return None
    n, k, many = 2048, 512, 32
    weight, states, out = torch.ones(n, k), torch.ones(many, k), torch.empty(many, n)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (states, out)]
    packed = {dtype: _pack(library, weight, DTYPES[dtype])[0] for dtype in ("fp32", "bf16")}
    seconds = dict.fromkeys(((rows, dtype) for rows in (1, many) for dtype in packed), math.inf)
    for _ in range(8):
        for rows, dtype in seconds:
            head = _Matrix(packed[dtype].data_ptr(), n=n, k=k)
            code = library.fastest(DTYPES[dtype])
            model = _Model(dtype=code, n_embd=k, n_threads=1, head=head)
            start = time.perf_counter()
            library.logits(ctypes.byref(model), rows, *pointers)
            seconds[rows, dtype] = min(seconds[rows, dtype], time.perf_counter() - start)
    gains = (seconds[rows, "fp32"] / seconds[rows, "bf16"] for rows in (1, many))
    return math.prod(gains) ** 0.5


@lru_cache
def load_library() -> ctypes.CDLL | None:
    """Return the kernels, compiled at the first call, or None where they do not compile."""
    path = compiling.compiled_kernels().result()
    if path is None:
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # torch came with another OpenMP
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
