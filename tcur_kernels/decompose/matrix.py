"""Matrix CUR: tensor CUR of a single slice, with the defaults of the matrix literature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..values import HoldsTensors
from .cores import Core
from .rules import Selection
from .slices import MAX_WORKSPACE
from .tensor import TensorCUR, tensor_cur


@dataclass(frozen=True, eq=False, repr=False)
class MatrixCUR(HoldsTensors):
    """Result of `matrix_cur`: a ≈ C U R.

    Attributes:
        lateral: C = a[:, columns], ``[n1, r]``.
        core: U, ``[r, r]``, in fp32 if the slices have 16 bits.
        horizontal: R = a[rows], ``[r, n2]``.
        columns, rows: int64 ``[r]``, ascending.
    """

    lateral: Tensor
    core: Tensor
    horizontal: Tensor
    columns: Tensor
    rows: Tensor

    def reconstruct(self) -> Tensor:
        """C U R, ``[n1, n2]``, in the dtype of the slices."""
        dtype = self.core.dtype
        with without_autocast():
            product = self.lateral.to(dtype) @ self.core @ self.horizontal.to(dtype)
        return product.to(self.lateral.dtype)

    def relative_error(self, a: Tensor) -> float:
        """‖a − C U R‖ / ‖a‖ in the Frobenius norm."""
        parts = (self.lateral[None], self.core[None], self.horizontal[None])
        return TensorCUR(*parts, self.columns, self.rows).relative_error(a[None])


def matrix_cur(
    a: Tensor,
    rank: int,
    selection: Selection = "leverage",
    core: Core = "projection",
    generator: torch.Generator | None = None,
    rcond: float | None = None,
    max_workspace: int = MAX_WORKSPACE,
) -> MatrixCUR:
    """CUR of a matrix ``[n1, n2]`` with columns and rows by leverage scores and U = C⁺ A R⁺.

    Mahoney & Drineas, PNAS 106 (2009). This is `tensor_cur` for n3 = 1; arguments, rules, cores and
    errors are the same.

    Raises:
        TypeError, ValueError: as `tensor_cur`.
    """
    if not isinstance(a, Tensor):
        raise TypeError(f"a: expected a torch.Tensor, got {type(a).__name__}")
    if a.ndim != 2:
        raise ValueError(f"a: expected [n1, n2], got {list(a.shape)}")
    if a.layout != torch.strided:  # of which torch may refuse to make a view
        raise ValueError(f"a: expected a dense tensor, got layout {a.layout}")
    d = tensor_cur(a[None], rank, selection, core, generator, rcond, max_workspace)
    return MatrixCUR(d.lateral[0], d.core[0], d.horizontal[0], d.columns, d.rows)
