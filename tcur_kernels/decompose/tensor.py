"""Tensor CUR under the t-product: a ≈ C * U * R with lateral and horizontal slices of a."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..processes import is_sharded
from ..t_product import check_tensor, t_product
from ..values import HoldsTensors
from .cores import CORES, Core, make_core
from .rules import Selection, select
from .sharded import ShardedSlices
from .slices import MAX_WORKSPACE, HeldSlices, Slices, check_rank, half_spectrum


@dataclass(frozen=True, eq=False, repr=False)
class TensorCUR(HoldsTensors):
    """Result of `tensor_cur`.

    Attributes:
        lateral: C = a[:, :, columns], ``[n3, n1, r]``.
        core: U, ``[n3, r, r]``, in fp32 if the slices have 16 bits.
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
        """C * U * R, ``[n3, n1, n2]``, in the dtype of the slices."""
        dtype = self.core.dtype
        product = t_product(t_product(self.lateral.to(dtype), self.core), self.horizontal.to(dtype))
        return product.to(self.lateral.dtype)

    def relative_error(self, a: Tensor | Slices, max_workspace: int = MAX_WORKSPACE) -> float:
        """‖a - C * U * R‖ / ‖a‖ in the Frobenius norm; 0 if both are zero.

        The error is summed in fp64, block by block, so C * U * R is never built. If ``a`` is a
        stack, its own workspace applies.
        """
        stack = as_slices("a", a, max_workspace)
        expected = [*self.lateral.shape[:2], self.horizontal.shape[2]]
        if [stack.n3, stack.n1, stack.n2] != expected:
            raise ValueError(f"a: expected shape {expected}, got {[stack.n3, stack.n1, stack.n2]}")
        left = half_spectrum(self.lateral) @ half_spectrum(self.core)
        right = half_spectrum(self.horizontal)
        held = 16 * (left.numel() + right.numel())
        squares = torch.zeros(2, dtype=torch.float64, device=stack.device)
        for rows, columns, block in stack.blocks("error", held):
            product = left[:, rows] @ right[:, :, columns]
            exact = block.double()
            rest = exact - torch.fft.irfft(product, n=stack.n3, dim=0)
            squares += torch.stack([rest.square().sum(), exact.square().sum()])
        error, norm = stack.sum(squares).sqrt().tolist()
        return error / norm if norm > 0 else error


def tensor_cur(
    a: Tensor | Slices,
    rank: int,
    selection: Selection = "norm",
    core: Core = "intersection",
    generator: torch.Generator | None = None,
    rcond: float | None = None,
    max_workspace: int = MAX_WORKSPACE,
    progress: bool = False,
) -> TensorCUR:
    """Decomposes ``a`` into C * U * R with ``rank`` lateral and ``rank`` horizontal slices of it.

    Args:
        a: ``[n3, n1, n2]``, floating and finite: a tensor (a DTensor too, sharded by rows or
            columns), or a stack that is read block by block (`open_stack`).
        rank: number r of slices, 1 ≤ r ≤ min(n1, n2). The decomposition is exact if, at every
            frequency, the intersection of the chosen rows and columns has the rank of the whole
            matrix at that frequency.
        selection: "norm" (the tCURLoRA rule), "norm2", "leverage", "deim", "inverse", "uniform";
            your own rule ``rule(stack, rank, generator) -> (rows, columns)``; or a pair
            ``(rows, columns)`` of index sequences. Formulas and sources: `decompose.rules`.
        core: "intersection", U = a[rows, columns]^† per frequency; "projection",
            U = C^† * a * R^†, the best core for these slices in the Frobenius norm; "zero", the
            start of an adapter.
        generator: CPU generator. If given, slices are drawn in proportion to their scores.
            Otherwise the largest scores are taken; only "uniform" is then random.
        rcond: of the pseudo-inverses, see `decompose.cores.make_core`.
        max_workspace: most bytes to use in addition to ``a`` and the result.
        progress: whether to show a bar for every pass over the data.

    Raises:
        TypeError: ``a`` is not a floating tensor, or given indices are not integers.
        ValueError: the shape, rank, rule or an index is bad; the tensor is not finite; the rule
            draws nothing but a generator is given; or the workspace is too small for the rule.
    """
    stack = as_slices("a", a, max_workspace, progress)
    check_rank("rank", rank, stack.n1, stack.n2)
    if core not in CORES:
        raise ValueError(f"core: expected one of {', '.join(CORES)}, got {core!r}")
    if rcond is not None and not 0 <= rcond < 1:
        raise ValueError(f"rcond: expected a number in [0, 1), got {rcond}")
    rows, columns = select(stack, rank, selection, generator)
    lateral, horizontal = stack.columns(columns), stack.rows(rows)
    stack.check_finite()
    made = make_core(stack, lateral, horizontal, rows, core, rcond)
    return TensorCUR(lateral, made, horizontal, columns, rows)


def as_slices(
    name: str,
    a: Tensor | Sequence[Tensor] | Slices,
    max_workspace: int = MAX_WORKSPACE,
    progress: bool = False,
    n1: int | None = None,
) -> Slices:
    """Makes a stack of a tensor or of a list of matrices; returns a stack unchanged."""
    if isinstance(a, Slices):
        return a
    if isinstance(a, Tensor) or not isinstance(a, Sequence) or isinstance(a, str):
        check_tensor(name, a)
        matrices = _slices_of(a)
    else:
        matrices = list(a)
    if matrices and is_sharded(matrices[0]):
        return ShardedSlices(name, matrices, n1, max_workspace, progress)
    return HeldSlices(name, matrices, n1, max_workspace, progress)


def _slices_of(a: Tensor) -> list[Tensor]:
    if not is_sharded(a):
        return list(a)
    from torch.distributed.tensor import Replicate, Shard

    # If the tensor is sharded along the frontal slices, shard it by columns instead.
    sharded = [p.dim if type(p) is Shard else None for p in a.placements]  # type: ignore[attr-defined]
    placements = [Replicate() if dim is None else Shard(dim or 2) for dim in sharded]
    return list(a.redistribute(a.device_mesh, placements).unbind())  # type: ignore[attr-defined]


def select_slices(
    slices: Sequence[Tensor] | Slices,
    rank: int,
    selection: Selection = "norm",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows I and columns J of a stack, given as its frontal slices ``[n1, n2]``.

    The slices are never copied into one tensor. Returns int64 ``[r]`` rows and columns, ascending,
    on the CPU.
    """
    return select(as_slices("slices", slices), rank, selection, generator)
