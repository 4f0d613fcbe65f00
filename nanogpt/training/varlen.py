"""Attention of packed rows on CUDA: a sequence for each document, without a mask of all pairs."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.model import GPT, Attend

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256


class DocumentAttend(Attend):
    """Causal attention within the documents of rows, each a sequence of `varlen_attn`.

    `starts` (B, N) int64 are the positions of the documents in their rows of T tokens, T for those
    that a row lacks: no shape depends on the lengths, which the host would have to know.
    """

    def __init__(
        self, varlen_attn: Callable[..., Any], starts: Tensor, T: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        rows = torch.arange(len(starts), device=starts.device)[:, None]
        ends = F.pad((T * rows + starts).flatten(), (0, 1), value=T * len(starts))
        self.attention = partial(varlen_attn, window_size=(-1, 0))  # causal
        self.bounds, self.dtype = ends.int(), dtype  # (B N + 1,)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention output (B, T, H, D) of a layer's q, k and v (B, T, H, D) each."""
        if k.size(2) < q.size(2):
            k, v = (part.repeat_interleave(q.size(2) // k.size(2), 2) for part in (k, v))
        packed = (part.flatten(0, 1).to(self.dtype) for part in (q, k, v))  # (B T, H, D)
        T = q.size(1)
        attended: Tensor = self.attention(*packed, self.bounds, self.bounds, T, T)
        return attended.unflatten(0, q.shape[:2])


def document_attend(model: GPT, starts: Tensor | None, T: int) -> DocumentAttend | None:
    """Return the attention of packed rows of T tokens, None where torch has no kernel for it."""
    config, weight = model.config, model.wte.weight
    if starts is None or not weight.is_cuda or (model.training and config.dropout):
        return None
    reduced = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if reduced else weight.dtype
    fits = dtype in KERNEL_DTYPES and config.head_dim in range(8, MAX_HEAD_SIZE + 1, 8)
    if not fits or torch.cuda.get_device_capability(weight.device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10, whose own takes no window
        return None
    has_window = "window_size" in inspect.signature(varlen_attn).parameters
    return DocumentAttend(varlen_attn, starts, T, dtype) if has_window else None
