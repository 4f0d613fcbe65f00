"""RMSNorm and the squared ReLU, whose eager backwards take fewer passes than autograd's."""

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` in the precision of its weight; versions of autocast differ in that."""

    def forward(self, x: Tensor) -> Tensor:
        """Return normalised states (..., C) of x (..., C), in the dtype of x."""
        wide = x if self.weight is None else x.to(self.weight.dtype)
        is_fused = torch.compiler.is_compiling() or not wide.is_cpu
        if is_fused or self.eps is None or not torch.is_grad_enabled():
            return super().forward(wide).to(x.dtype)
        wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
        y: Tensor = _RootMeanSquare.apply(wide, self.eps)
        return (y if self.weight is None else y * self.weight).to(x.dtype)


class _RootMeanSquare(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over channels, as `F.rms_norm` computes it on a CPU, to the bit."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, eps: float) -> Tensor:
        return x * _inverse_rms(x, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.eps = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        scale = _inverse_rms(x, ctx.eps)
        y = x * scale
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1) * scale, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()  # (..., 1)


class _SquaredReLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        positive = x.relu()
        return positive * positive

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, x.relu(), value=2)  # in one pass


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0)^2 (Primer, arXiv:2109.08668)."""
    y: Tensor = x.relu().square() if torch.compiler.is_compiling() else _SquaredReLU.apply(x)
    return y
