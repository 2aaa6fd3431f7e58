"""Baselines in plain torch: what a user would write, and the fastest known forms of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tcur_kernels.operators import reference


def eager(weight: Tensor, lateral_hat: Tensor, horizontal_hat: Tensor, core: Tensor) -> Tensor:
    """The obvious form with the half spectrum: rfft, two batched products, irfft, add."""
    return weight + reference.cur_product(lateral_hat, core, horizontal_hat)


class S1:
    """Real products of inner size 2r, then one product with the n3 x n3 inverse DFT matrix.

    The DFT matrix and the buffers of the planes and of the result are made once and reused.
    """

    def __init__(self, weight: Tensor, lateral_hat: Tensor, horizontal_hat: Tensor) -> None:
        n3, n1, n2 = weight.shape
        self.weight, self.lateral_hat = weight, lateral_hat
        self.stacked = torch.cat([horizontal_hat.real, horizontal_hat.imag], dim=1)
        pairs = (n3 - 1) // 2
        bins = lateral_hat.shape[0]
        angle = 2 * math.pi * torch.outer(torch.arange(n3), torch.arange(bins)) / n3
        weights = torch.full((bins,), 2.0 / n3)
        weights[0] = 1.0 / n3
        if n3 % 2 == 0:
            weights[-1] = 1.0 / n3
        cos, sin = weights * angle.cos(), -weights * angle.sin()
        self.inverse = torch.cat([cos, sin[:, 1 : pairs + 1]], dim=1).to(weight)
        self.pairs, self.bins = pairs, bins
        self.planes = weight.new_empty(n3, n1, n2)
        self.out = torch.empty_like(weight)

    def __call__(self, core: Tensor) -> Tensor:
        """W + C * U * R for this core."""
        p = self.lateral_hat @ torch.fft.rfft(core, dim=0)
        torch.bmm(torch.cat([p.real, -p.imag], 2), self.stacked, out=self.planes[: self.bins])
        inner = slice(1, self.pairs + 1)
        torch.bmm(
            torch.cat([p.imag, p.real], 2)[inner],
            self.stacked[inner],
            out=self.planes[self.bins :],
        )
        n3 = self.weight.shape[0]
        flat = self.weight.view(n3, -1)
        torch.addmm(flat, self.inverse, self.planes.view(n3, -1), out=self.out.view(n3, -1))
        return self.out


class S2:
    """One ``baddbmm`` with inner size n3*r: the block-circulant core on the packed factors."""

    def __init__(self, weight: Tensor, lateral_hat: Tensor, horizontal_hat: Tensor) -> None:
        n3, n1, _ = weight.shape
        self.weight = weight
        lateral = reference.from_half_spectrum(lateral_hat, n3)
        horizontal = reference.from_half_spectrum(horizontal_hat, n3)
        self.lateral = lateral.movedim(0, 1).reshape(n1, -1)  # [n1, n3*r], slice-major
        self.horizontal = horizontal.reshape(-1, horizontal.shape[2])  # [n3*r, n2]
        index = torch.arange(n3, device=weight.device)
        # (C*U*R)_l = Σ_{a,b} C_a U_{l-a-b} R_b
        self.index = (index[:, None, None] - index[None, :, None] - index[None, None, :]) % n3
        self.out = torch.empty_like(weight)

    def __call__(self, core: Tensor) -> Tensor:
        """W + C * U * R for this core."""
        n3, rank, _ = core.shape
        mixing = core[self.index].permute(0, 1, 3, 2, 4).reshape(n3, n3 * rank, n3 * rank)
        left = self.lateral @ mixing
        right = self.horizontal.expand(n3, *self.horizontal.shape)
        return torch.baddbmm(self.weight, left, right, out=self.out)
