"""RMSNorm whose precision does not depend on the version of PyTorch."""

from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` in the precision of its weight; versions of autocast differ in that."""

    def forward(self, x: Tensor) -> Tensor:
        """Return normalised states (..., C) of x (..., C), in the dtype of x."""
        return super().forward(x if self.weight is None else x.to(self.weight.dtype)).to(x.dtype)
