"""How much of a gradient the updates of chosen slices can follow."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.basis import orthonormal
from ..t_product import t_transpose
from .slices import Slices, half_spectrum


def caught_energy(gradient: Slices, lateral: Tensor, horizontal: Tensor) -> tuple[float, float]:
    """‖Qᵀ * G * Q'ᵀ‖² and ‖G‖², where Q and Q' are isometric and span what the slices span.

    C * U * R can only move the weights within the span of C and R. The first number is the part of
    the gradient's energy within it: the rate at which steepest descent in an isometric core lowers
    the loss, as a part of the rate for all weights.

    Args:
        gradient: of the loss with respect to the stacked weights, read block by block.
        lateral: the lateral slices ``[n3, n1, r]``.
        horizontal: the horizontal slices ``[n3, r, n2]``.
    """
    # Gradients may be on the CPU while the model is elsewhere; the slices are much smaller.
    lateral, horizontal = lateral.to(gradient.device), horizontal.to(gradient.device)
    left = half_spectrum(t_transpose(orthonormal(lateral)))
    right = half_spectrum(orthonormal(t_transpose(horizontal)))
    core_hat = left.new_zeros(gradient.bins, left.shape[1], right.shape[2])
    total = torch.zeros((), dtype=torch.float64, device=gradient.device)
    held = 16 * (left.numel() + right.numel())
    for rows, columns, block in gradient.blocks("gradient", held):
        core_hat += left[:, :, rows] @ half_spectrum(block) @ right[:, columns]
        total += block.double().square().sum()
    core = torch.fft.irfft(gradient.sum(core_hat), n=gradient.n3, dim=0)
    return float(core.square().sum()), float(gradient.sum(total))
