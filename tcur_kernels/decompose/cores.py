"""Cores U of a ≈ C * U * R for given slices C and R."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..t_product import rounding, t_pinv
from .slices import Slices, half_spectrum

Core = Literal["intersection", "projection", "zero"]
CORES: tuple[Core, ...] = get_args(Core)


def make_core(
    stack: Slices,
    lateral: Tensor,
    horizontal: Tensor,
    rows: Tensor,
    core: Core,
    rcond: float | None = None,
) -> Tensor:
    """The core, computed in fp64 because pseudo-inverses amplify rounding errors of small slices.

    "intersection": U = a[rows, columns]^†, the pseudo-inverse of the intersection at each
    frequency. Needs no pass over the data. If rank Â_k(I, J) = rank Â_k for every k, then
    C * U * R = a (Hamm & Huang, arXiv:1907.12668, theorem 1, at each frequency). If every
    Â_k(I, J) is nonsingular, C * U * R agrees with a in the chosen slices.

    "projection": U = C^† * a * R^†, which minimises ‖a − C * U * R‖_F over all cores (Stewart
    1999). Needs one pass, which sums Ĉ_k^† Â_k R̂_k^† block by block.

    "zero": a core of zeros.

    Args:
        rcond: singular values below ``rcond`` times the largest one of the whole spectrum (of the
            intersection, of C, or of R) count as zero. The default is 4 r eps of the dtype of the
            core, and at least eps of the dtype of the stack: what rounding makes of a zero.

    Returns:
        ``[n3, r, r]`` in the dtype of the stack, or in fp32 if that has 16 bits. The condition of
        C and R multiplies the rounding of the core, and 16 bits would leave nothing of it.
    """
    n3, _, rank = lateral.shape
    dtype = torch.promote_types(lateral.dtype, torch.float32)
    if core not in CORES:
        raise ValueError(f"core: expected one of {', '.join(CORES)}, got {core!r}")
    if core == "zero":
        return lateral.new_zeros(n3, rank, rank, dtype=dtype)
    if rcond is None:
        rcond = rounding(stack.dtype, 4 * rank)
    c, r = lateral.double(), horizontal.double()
    if core == "intersection":
        return t_pinv(c[:, rows.to(c.device)], rcond).to(dtype)
    left, right = half_spectrum(t_pinv(c, rcond)), half_spectrum(t_pinv(r, rcond))
    core_hat = left.new_zeros(stack.bins, rank, rank)
    held = 2 * 16 * stack.bins * rank * (stack.n1 + stack.n2)
    for where, columns, block in stack.blocks("core", held):
        core_hat += left[:, :, where] @ half_spectrum(block) @ right[:, columns]
    return torch.fft.irfft(stack.sum(core_hat), n=n3, dim=0).contiguous().to(dtype)
