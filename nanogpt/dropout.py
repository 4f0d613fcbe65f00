"""Dropout whose masks depend on a seed of each row alone."""

from typing import Any

import torch
from torch import Tensor


class RowDropout:
    """Dropout whose masks depend on each row's seed alone, however the rows are batched.

    `row_seeds` (B,) int64 are required where the rate is above 0.

    Of the n elements of a token, number i is dropped where the product of two odd 32-bit integers,
    one hashed from the token and one from i, is among the smallest: products of random odd integers
    are uniform and, in pairs, as good as independent (multiplicative hashing, Dietzfelbinger et
    al., "A Reliable Randomized Algorithm for the Closest-Pair Problem", 1997). So a mask costs a
    multiplication and a comparison per element, on any device, eager or compiled.
    """

    def __init__(self, rate: float, row_seeds: Tensor | None) -> None:
        self.rate = rate
        self.row_seeds: Any = row_seeds

    def of_layer(self, layer: int) -> "RowDropout":
        """Return the dropout of a layer, which has three sites; as seeds, all share one graph."""
        return RowDropout(self.rate, self.row_seeds + (6 * layer << 32))

    def __call__(self, x: Tensor, site: int = 0) -> Tensor:
        """Drop elements of x (B, T, C) or (B, H, T, T) and scale the others to the same mean.

        Every site of a model has its own masks. Padding after a row's last token does not change
        the mask of the tokens before it.
        """
        if not self.rate:
            return x
        B, H, T, n = (x if x.dim() == 4 else x[:, None]).shape
        of_token = self._integers(2 * site, T * H).view(B, T, H).mT.contiguous()  # (B, H, T)
        of_element = self._integers(2 * site + 1, n)  # (B, n)
        products = of_token[..., None] * of_element[:, None, None]  # (B, H, T, n)
        mask = products >= int(2**32 * self.rate) - 2**31
        return x * mask.view_as(x) * (1 / (1 - self.rate))

    def _integers(self, stream: int, n: int) -> Tensor:
        """Return the first n odd integers (B, n) int32 of a stream of each row.

        They are upper halves of SplitMix64 (Steele et al., 2014). Its shifts are arithmetic here,
        which costs a bit or two of the 64.
        """
        indices = torch.arange(n, device=self.row_seeds.device)
        z = (self.row_seeds[:, None] + (stream << 32) + indices) * -0x61C8864680B583EB
        z = (z ^ (z >> 30)) * -0x40A7B892E31B1A47
        z = (z ^ (z >> 27)) * -0x6B2FB644ECCEEE15
        return (z >> 32).int() | 1


NO_DROPOUT = RowDropout(0.0, None)
