"""RMSNorm and the squared ReLU, whose eager backwards take fewer passes than autograd's."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(scale), None


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, positive, value=2)  # in one pass


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0)^2 (Primer, arXiv:2109.08668)."""
    y: Tensor = x.relu().square() if torch.compiler.is_compiling() else _SquaredReLU.apply(x)
    return y
