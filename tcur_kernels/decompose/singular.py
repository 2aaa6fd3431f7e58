"""Leading singular vectors of every frequency of a stack, exact or by a randomised range finder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..t_product import rounding
from ..values import HoldsTensors
from .slices import BYTES_PER_ELEMENT, Slices, half_spectrum

#: "auto" uses the range finder if K n1 n2 min(n1, n2) exceeds this. For 48 slices of 768 x 768 the
#: product is 1.1e10. `benchmarks/selection.py` times both methods.
_EXACT_WORK = 5e9

#: Bytes of a complex fp64 number.
_BYTES = 16

#: How many copies of one frequency a full SVD needs at once: input, vectors, LAPACK's workspace.
_SVD_COPIES = 6


@dataclass(frozen=True, eq=False, repr=False)
class Subspaces(HoldsTensors):
    """Leading singular triples of every bin k of the half spectrum.

    Attributes:
        left: Û_k, complex fp64 ``[K, n1, r]``.
        values: singular values, descending, fp64 ``[K, r]``.
        right: V̂_k, complex fp64 ``[K, n2, r]``.

    Where a frequency has a smaller rank than r, the vectors beyond it are zero.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def leading_subspaces(
    stack: Slices, rank: int, method: str = "auto", oversample: int = 10, power_iterations: int = 0
) -> Subspaces:
    """The ``rank`` leading singular triples of every frequency.

    Args:
        stack: any stack. "exact" makes one pass over it, or several if not all frequencies fit into
            the workspace at once. "randomized" makes 2 + 2 * power_iterations passes.
        rank: r.
        method: "exact" computes a full SVD of every frequency; "randomized" uses a range finder;
            "auto" is exact for stacks smaller than those of a ViT-B, and randomized for others.
        oversample, power_iterations: of the range finder (Halko, Martinsson & Tropp,
            arXiv:0909.4061, algorithms 4.1, 4.4, 5.1). Its Gaussian test matrix has a fixed seed.

    Raises:
        ValueError: the method is unknown, or the workspace is too small for it.
    """
    if method not in ("auto", "exact", "randomized"):
        raise ValueError(f"method: expected auto, exact or randomized, got {method!r}")
    if method == "auto":
        work = stack.bins * stack.n1 * stack.n2 * min(stack.n1, stack.n2)
        method = "exact" if work <= _EXACT_WORK and _group(stack) > 0 else "randomized"
    if method == "exact":
        found = _exact(stack, rank)
    else:
        found = _randomized(stack, min(rank + oversample, stack.n1, stack.n2), power_iterations)
    left, values, right = (part[..., :rank] for part in found)
    # Singular values below the rounding error of the given numbers say nothing about the stack.
    tol = rounding(stack.dtype, max(stack.n1, stack.n2)) * values.max()
    real = (values > tol)[:, None, :]
    return Subspaces(left * real, values * real[:, 0], right * real)


def _group(stack: Slices) -> int:
    """How many spectra fit into the workspace, beside the SVD of one and a row of blocks."""
    one = stack.n1 * stack.n2 * _BYTES
    spare = stack.max_workspace - _SVD_COPIES * one - stack.n3 * stack.n2 * BYTES_PER_ELEMENT
    return max(0, int(spare // one))


def _exact(stack: Slices, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    one = stack.n1 * stack.n2 * _BYTES
    group = _group(stack)
    if group == 0:
        stack.require(
            (_SVD_COPIES + 1) * one + stack.n3 * stack.n2 * BYTES_PER_ELEMENT, "the exact SVD"
        )
    shapes = ((stack.n1, rank), (rank,), (stack.n2, rank))
    left, values, right = (
        torch.zeros(stack.bins, *shape, dtype=torch.complex128, device=stack.device)
        for shape in shapes
    )
    for first in range(0, stack.bins, group):
        last = min(first + group, stack.bins)
        spectra = torch.zeros(
            last - first, stack.n1, stack.n2, dtype=torch.complex128, device=stack.device
        )
        for rows, columns, block in stack.blocks("spectrum", (group + _SVD_COPIES) * one):
            spectra[:, rows, columns] = half_spectrum(block)[first:last].to(stack.device)
        stack.sum(spectra)
        for k in range(first, last):
            is_real = k == 0 or 2 * k == stack.n3
            matrix = spectra[k - first].real if is_real else spectra[k - first]
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            left[k], values[k], right[k] = u[:, :rank], s[:rank], vh[:rank].mH
    return left, values.real, right


def _randomized(stack: Slices, width: int, power_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    held = (stack.n3 + 3 * stack.bins * 2) * (stack.n1 + stack.n2) * width * 8
    stack.require(held, f"a range finder of width {width}")
    generator = torch.Generator("cpu").manual_seed(0)
    test = torch.randn(stack.n2, width, dtype=torch.float64, generator=generator, device="cpu")
    test = test.to(stack.device)
    # All frequencies use the same real test matrix. Multiplying by it from the right commutes with
    # the DFT along the slices, so the stack need not be transformed for the sketch.
    sketch = torch.zeros(stack.n3, stack.n1, width, dtype=torch.float64, device=stack.device)
    for rows, columns, block in stack.blocks("sketch", held):
        sketch[:, rows] += (block.double() @ test[columns]).to(stack.device)
    basis = torch.linalg.qr(half_spectrum(stack.sum(sketch))).Q
    del sketch
    for _ in range(power_iterations):
        other = torch.linalg.qr(_projected(stack, basis, held).mH).Q
        image = torch.zeros_like(basis)
        for rows, columns, block in stack.blocks("power iteration", held):
            image[:, rows] += half_spectrum(block) @ other[:, columns]
        basis = torch.linalg.qr(stack.sum(image)).Q
    small, values, vh = torch.linalg.svd(_projected(stack, basis, held), full_matrices=False)
    return basis @ small, values, vh.mH


def _projected(stack: Slices, basis: Tensor, held: int) -> Tensor:
    """Q̂_kᴴ Â_k of every frequency, ``[K, width, n2]``."""
    projected = basis.new_zeros(stack.bins, basis.shape[2], stack.n2)
    for rows, columns, block in stack.blocks("projection", held):
        projected[:, :, columns] += basis[:, rows].mH @ half_spectrum(block)
    return stack.sum(projected)
