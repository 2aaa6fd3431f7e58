"""Mode-wise tensor CUR: a Tucker decomposition whose factors are fibres of the tensor itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..t_product import check_tensor, rounding
from ..values import HoldsTensors
from .rules import pick
from .slices import HeldSlices


@dataclass(frozen=True, eq=False, repr=False)
class ModewiseCUR(HoldsTensors):
    """Result of `modewise_cur`: a ≈ core ×_0 C_0 ×_1 C_1 ×_2 C_2.

    Attributes:
        core: G, ``[c0, c1, c2]``, in fp32 if the factors have 16 bits.
        factors: C_m, ``[size of axis m, c_m]``: fibres of ``a`` along axis m.
        fibres: per axis m, int64 ``[c_m]``: the chosen columns of the unfolding along m. These
            columns run over the other two axes in their order.
    """

    core: Tensor
    factors: tuple[Tensor, Tensor, Tensor]
    fibres: tuple[Tensor, Tensor, Tensor]

    def reconstruct(self) -> Tensor:
        """G ×_0 C_0 ×_1 C_1 ×_2 C_2, in the shape and dtype of the tensor."""
        product = self.core
        for axis, factor in enumerate(self.factors):
            with without_autocast():
                product = _along(product, factor.to(product.dtype), axis)
        return product.to(self.factors[0].dtype)

    def relative_error(self, a: Tensor) -> float:
        """‖a − reconstruction‖ / ‖a‖ in the Frobenius norm; 0 if both are zero."""
        norm = float(a.double().norm())
        error = float((a.double() - self.reconstruct().double()).norm())
        return error / norm if norm > 0 else error

    def count(self) -> int:
        """The number of elements of core and factors."""
        return self.core.numel() + sum(factor.numel() for factor in self.factors)


def modewise_cur(
    a: Tensor, ranks: Sequence[int], generator: torch.Generator | None = None
) -> ModewiseCUR:
    """Decomposes ``a`` by fibres along every axis, chosen by leverage scores.

    Let A_(m) be the unfolding along axis m, and V_m its r_m leading right singular vectors. Fibre j
    has the score ‖V_m(j, :)‖². C_m consists of the r_m fibres with the largest scores; with a
    generator, the fibres are drawn in proportion to their scores. The core is
    G = a ×_0 C_0⁺ ×_1 C_1⁺ ×_2 C_2⁺, which minimises the Frobenius error for these fibres.

    The method is that of Drineas & Mahoney, Linear Algebra Appl. 420 (2007), with fibres chosen as
    in Mahoney & Drineas (2009). The "Fiber CUR" of Cai, Hamm, Huang & Needell (arXiv:2103.11037)
    also has fibres as factors, but its core consists of entries of ``a``.

    The result is exact if and only if rank C_m = rank A_(m) for every axis. In general, with P_m
    the projection onto the range of C_m: error² ≤ Σ_m ‖A_(m) − P_m A_(m)‖².

    Args:
        a: ``[n3, n1, n2]``, floating and finite, in memory.
        ranks: fibres along each axis, in the order of the axes of ``a``.
        generator: CPU generator.

    Raises:
        TypeError, ValueError: as `tensor_cur`; or a rank exceeds its axis or the number of fibres.
    """
    check_tensor("a", a)
    HeldSlices("a", list(a)).check_finite()
    if not isinstance(ranks, Sequence) or isinstance(ranks, str):
        raise TypeError(f"ranks: expected three ints, got {type(ranks).__name__}")
    if len(ranks) != 3:
        raise ValueError(f"ranks: expected three, one per axis of a, got {list(ranks)}")
    exact = a.double()
    factors, fibres = [], []
    core = exact
    for axis, rank in enumerate(ranks):
        unfolded = exact.movedim(axis, 0).flatten(1)
        most = min(unfolded.shape)
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"ranks: expected ints, got {type(rank).__name__}")
        if not 1 <= rank <= most:
            raise ValueError(f"ranks: expected 1 to {most} for axis {axis}, got {rank}")
        chosen = pick(_scores(unfolded, rank, a.dtype), rank, generator)
        chosen = chosen.sort().values
        factor = unfolded[:, chosen.to(a.device)]
        fibres.append(chosen)
        factors.append(factor.to(a.dtype))
        inverse = torch.linalg.pinv(factor, rtol=rounding(a.dtype, 4 * rank))
        core = _along(core, inverse, axis)
    core = core.to(torch.promote_types(a.dtype, torch.float32))
    return ModewiseCUR(core, (*factors,), (*fibres,))  # type: ignore[arg-type]


def _scores(unfolded: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """‖V(j, 1:r)‖² of every column j of a wide matrix, computed from its leading left vectors."""
    squares, vectors = torch.linalg.eigh(unfolded @ unfolded.mT)
    squares, vectors = squares[-rank:], vectors[:, -rank:]
    # What is rounding of the numbers, or of the squares, has no direction.
    rounded, of_squares = (rounding(each, len(unfolded)) for each in (dtype, squares.dtype))
    real = squares > squares.max() * max(rounded**2, of_squares)
    weights = torch.where(real, squares, torch.inf).rsqrt()
    return ((vectors * weights).mT @ unfolded).square().sum(0)


def _along(a: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """a ×_axis matrix: the axis of length q becomes one of length p for a matrix ``[p, q]``."""
    return torch.tensordot(matrix, a, ([1], [axis])).movedim(0, axis)
