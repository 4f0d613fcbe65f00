"""The loss of a head, of whose logits one chunk of tokens exists at a time.

Shapes: N tokens, C channels, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanogpt.model import GPT, soft_capped

CHUNK_LOGITS = 2**26  # elements


def summed_cross_entropy(model: GPT, hidden_states: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy in nats of targets (B, T), those of -100 left out.

    `hidden_states` (B, T, C) are those that the head of the model takes. Compiled, the plain form
    is used, whose steps the compiler fuses, and in float16, which needs the scale of the loss in
    all products.
    """
    h, targets = hidden_states.flatten(0, 1), targets.flatten()
    device = h.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
    if torch.compiler.is_compiling() or dtype == torch.float16:
        return F.cross_entropy(model.head(h), targets, ignore_index=-100, reduction="sum")
    found: Tensor = _SummedCrossEntropy.apply(
        h, model.unembedding.weight, targets, model, dtype, torch.is_grad_enabled()
    )
    return found


class _SummedCrossEntropy(torch.autograd.Function):
    """The loss; its gradients are computed along with it, while a chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        targets: Tensor,
        model: GPT,
        dtype: torch.dtype,
        has_grad: bool,
    ) -> Tensor:
        cap, vocab_size = model.config.logit_softcap, model.unembedding.vocab_size
        wide = torch.promote_types(dtype, torch.float32)
        loss, h_grads, weight_grad = h.new_zeros((), dtype=wide), [], None
        with torch.autocast(h.device.type, enabled=False):
            rows = weight.to(dtype)  # (V, C)
            n_chunks = -(-h.size(0) * rows.size(0) // CHUNK_LOGITS)
            chunks = [part.tensor_split(max(n_chunks, 1)) for part in (h.to(dtype), targets)]
            for states, labels in zip(*chunks, strict=True):
                scored = (labels != -100)[:, None]
                index = labels.clamp(min=0)[:, None]
                logits = soft_capped((states @ rows.t()).to(wide), cap)  # (N, V)
                slope = None if cap is None else 1 - (logits / cap).square()
                logits[:, vocab_size:] = -torch.inf
                logits = torch.log_softmax(logits, -1, out=logits if logits.is_cpu else None)
                loss -= logits.gather(1, index).where(scored, 0).sum()
                if not has_grad:
                    continue
                logits.exp_().scatter_add_(1, index, logits.new_full(index.shape, -1))
                slopes = (logits if slope is None else logits * slope).to(dtype)  # (N, V)
                if ctx.needs_input_grad[0]:
                    h_grads.append(slopes @ rows * scored)
                if ctx.needs_input_grad[1]:
                    product = (slopes.t() @ (states * scored)).to(wide)  # (V, C)
                    weight_grad = product if weight_grad is None else weight_grad.add_(product)
        h_grad = torch.cat(h_grads).to(h.dtype) if h_grads else None
        weight_grad = None if weight_grad is None else weight_grad.to(weight.dtype)
        ctx.save_for_backward(h_grad, weight_grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        h_grad, weight_grad = (g if g is None else g.mul_(scale) for g in ctx.saved_tensors)
        return h_grad, weight_grad, None, None, None, None
