"""Tensor CUR under the t-product: a ≈ C * U * R with lateral and horizontal slices of a.

The cores "intersection" and "projection" are those of the tensor-CUR literature; the rule "norm" is
the one of tCURLoRA (MICCAI 2025): the r lateral slices with the largest sum over all frequencies of
the column 2-norms, then the r horizontal slices with the largest such sum *within the lateral
slices already chosen*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .tubal import t_pinv, t_product

SELECTIONS = ("norm", "uniform")
CORES = ("intersection", "projection", "zero")

#: A selection rule by name, or (rows, columns) given.
Selection = str | tuple[Sequence[int] | Tensor, Sequence[int] | Tensor]

#: Elements transformed at once while slices are scored: bounds the workspace, about 100 MiB.
_SCORE_BLOCK = 1 << 22


@dataclass(frozen=True)
class TensorCUR:
    """Result of `tensor_cur`.

    Attributes:
        lateral: C = a[:, :, columns], ``[n3, n1, r]``.
        core: U, ``[n3, r, r]``.
        horizontal: R = a[:, rows, :], ``[n3, r, n2]``.
        columns: int64 ``[r]``, ascending.
        rows: int64 ``[r]``, ascending.
    """

    lateral: Tensor
    core: Tensor
    horizontal: Tensor
    columns: Tensor
    rows: Tensor

    def reconstruct(self) -> Tensor:
        """C * U * R, ``[n3, n1, n2]``."""
        return t_product(t_product(self.lateral, self.core), self.horizontal)

    def relative_error(self, a: Tensor) -> float:
        """‖a - C * U * R‖ / ‖a‖ in the Frobenius norm, 0 for a zero tensor that is met exactly."""
        if a.shape != (self.lateral.shape[0], self.lateral.shape[1], self.horizontal.shape[2]):
            expected = [*self.lateral.shape[:2], self.horizontal.shape[2]]
            raise ValueError(f"a: expected shape {expected}, got {list(a.shape)}")
        norm = a.double().norm()
        error = (a.double() - self.reconstruct().double()).norm()
        return float(error / norm) if norm > 0 else float(error)


def tensor_cur(
    a: Tensor,
    rank: int,
    selection: Selection = "norm",
    core: str = "intersection",
    generator: torch.Generator | None = None,
) -> TensorCUR:
    """Decomposes ``a`` into C * U * R with ``rank`` lateral and ``rank`` horizontal slices of it.

    Args:
        a: ``[n3, n1, n2]``, floating and finite.
        rank: number r of slices, 1 ≤ r ≤ min(n1, n2). The decomposition is exact if in every
            frequency the chosen rows and columns meet in a matrix of the rank of that frequency.
        selection: "norm" (deterministic, the tCURLoRA rule), "uniform" (random without
            replacement), or a pair ``(rows, columns)`` of index sequences.
        core: "intersection", U = a[rows, columns]^† per frequency; "projection",
            U = C^† * a * R^†, which no other core beats in the Frobenius norm for these slices;
            "zero", the start of an adapter.
        generator: for "uniform"; CPU generator.

    Raises:
        TypeError: ``a`` is no floating tensor, or given indices are no integers.
        ValueError: bad shape, rank, rule or index, a tensor that is not finite, or a generator for
            a rule that draws nothing.
    """
    check_stack("a", a)
    check_rank("rank", rank, a.shape[1], a.shape[2])
    if core not in CORES:
        raise ValueError(f"core: expected one of {', '.join(CORES)}, got {core!r}")
    rows, columns = select_slices(list(a), rank, selection, generator)
    lateral = a[:, :, columns].contiguous()
    horizontal = a[:, rows, :].contiguous()
    return TensorCUR(lateral, _core(a, lateral, horizontal, rows, core), horizontal, columns, rows)


def select_slices(
    slices: Sequence[Tensor],
    rank: int,
    selection: Selection = "norm",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows I and columns J of a stack given as its frontal slices, each ``[n1, n2]``.

    The stack itself is never built: slices are scored in blocks of rows. Returns int64 ``[r]``
    rows and columns, ascending, on the CPU.
    """
    n1, n2 = slices[0].shape
    if isinstance(selection, str):
        if selection not in SELECTIONS:
            raise ValueError(
                f"selection: expected one of {', '.join(SELECTIONS)} or (rows, columns), "
                f"got {selection!r}"
            )
        if selection == "uniform":
            columns = torch.randperm(n2, generator=generator)[:rank].sort().values
            return torch.randperm(n1, generator=generator)[:rank].sort().values, columns
        if generator is not None:
            raise ValueError("generator: expected None, selection 'norm' draws nothing")
        columns = _largest(_column_scores(slices), rank)
        chosen = torch.stack([w[:, columns.to(w.device)] for w in slices])
        return _largest(_column_scores(list(chosen.mT)), rank), columns
    if not isinstance(selection, tuple | list) or len(selection) != 2:
        raise ValueError(f"selection: expected a rule or a pair (rows, columns), got {selection!r}")
    if generator is not None:
        raise ValueError("generator: expected None, the indices are given")
    return (
        _indices("rows", selection[0], rank, n1, "n1"),
        _indices("columns", selection[1], rank, n2, "n2"),
    )


def check_stack(name: str, a: Tensor) -> None:
    """Refuses anything but a finite floating tensor [n3, n1, n2]."""
    if not isinstance(a, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(a).__name__}")
    if not a.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype, got {a.dtype}")
    if a.ndim != 3 or 0 in a.shape:
        raise ValueError(f"{name}: expected [n3, n1, n2] with no empty axis, got {list(a.shape)}")
    if not torch.isfinite(a).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or Inf")


def check_rank(name: str, rank: int, n1: int, n2: int) -> None:
    """Refuses a rank that is no integer in 1 … min(n1, n2)."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{name}: expected an int, got {type(rank).__name__}")
    if not 1 <= rank <= min(n1, n2):
        raise ValueError(
            f"{name}: expected 1 to min(n1, n2) = {min(n1, n2)} for {n1} x {n2} slices, got {rank}"
        )


def _column_scores(slices: Sequence[Tensor]) -> Tensor:
    """Σ_k w_k ‖Â_k(:, j)‖₂ for every column j, fp64 on the CPU.

    The half spectrum stands for the whole one: every pair of bins counts twice, w = 1, 2, …, 2, 1.
    """
    n3, (n1, n2) = len(slices), slices[0].shape
    weights = torch.full((n3 // 2 + 1, 1), 2.0, dtype=torch.float64)
    weights[0] = 1.0
    if n3 % 2 == 0:
        weights[-1] = 1.0
    block = max(1, _SCORE_BLOCK // (n3 * n2))
    squares = torch.zeros(n3 // 2 + 1, n2, dtype=torch.float64)
    for start in range(0, n1, block):
        rows = torch.stack([w.detach()[start : start + block] for w in slices]).double()
        norms = torch.linalg.vector_norm(torch.fft.rfft(rows, dim=0), dim=1)
        squares += norms.square().cpu()
    return (weights * squares.sqrt()).sum(0)


def _largest(scores: Tensor, rank: int) -> Tensor:
    """Indices of the largest scores, ascending; of equal scores the first win."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:rank].sort().values


def _indices(name: str, given: Sequence[int] | Tensor, rank: int, size: int, axis: str) -> Tensor:
    indices = torch.as_tensor(given).cpu()
    if indices.dtype.is_floating_point or indices.dtype in (torch.bool, torch.complex64):
        raise TypeError(f"{name}: expected integers, got {indices.dtype}")
    if indices.shape != (rank,):
        raise ValueError(f"{name}: expected {rank} indices (the rank), got {list(indices.shape)}")
    indices = indices.long()
    if indices.min() < 0 or indices.max() >= size:
        raise ValueError(f"{name}: expected 0 to {axis} - 1 = {size - 1}, got {indices.tolist()}")
    if indices.unique().numel() != rank:
        raise ValueError(f"{name}: expected distinct indices, got {indices.tolist()}")
    return indices.sort().values


def _core(a: Tensor, lateral: Tensor, horizontal: Tensor, rows: Tensor, core: str) -> Tensor:
    """The core, computed in fp64: pseudo-inverses square what rounding does to small slices."""
    n3, _, rank = lateral.shape
    if core == "zero":
        return a.new_zeros(n3, rank, rank)
    # Singular values that are rounding of the *given* numbers, not of fp64, are zero.
    rtol = 4 * rank * torch.finfo(a.dtype).eps
    c, r = lateral.double(), horizontal.double()
    if core == "intersection":
        return t_pinv(c[:, rows.to(c.device), :], rtol).to(a.dtype)
    return t_product(t_product(t_pinv(c, rtol), a.double()), t_pinv(r, rtol)).to(a.dtype)
