"""Tensor CUR under the t-product: a ≈ C * U * R with lateral and horizontal slices of a."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..processes import is_sharded
from ..t_product import check_tensor, t_product
from ..values import HoldsTensors
from .cores import CORES, make_core
from .rules import Selection, select
from .sharded import ShardedSlices
from .slices import MAX_WORKSPACE, HeldSlices, Slices, check_rank, half_spectrum


@dataclass(frozen=True, eq=False, repr=False)
class TensorCUR(HoldsTensors):
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

    def relative_error(self, a: Tensor | Slices, max_workspace: int = MAX_WORKSPACE) -> float:
        """‖a - C * U * R‖ / ‖a‖ in the Frobenius norm, 0 for a zero tensor that is met exactly.

        Summed in fp64, block by block: C * U * R is never built. ``a`` may be a stack, whose own
        workspace holds then.
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
    core: str = "intersection",
    generator: torch.Generator | None = None,
    rcond: float | None = None,
    max_workspace: int = MAX_WORKSPACE,
    progress: bool = False,
) -> TensorCUR:
    """Decomposes ``a`` into C * U * R with ``rank`` lateral and ``rank`` horizontal slices of it.

    Args:
        a: ``[n3, n1, n2]``, floating and finite: a tensor (a DTensor too, sharded by rows or
            columns), or a stack that is read block by block (`open_stack`).
        rank: number r of slices, 1 ≤ r ≤ min(n1, n2). The decomposition is exact if in every
            frequency the chosen rows and columns meet in a matrix of the rank of that frequency.
        selection: "norm" (the tCURLoRA rule), "norm2", "leverage", "deim", "inverse", "uniform";
            a rule of one's own, ``rule(stack, rank, generator) -> (rows, columns)``; or a pair
            ``(rows, columns)`` of index sequences. Formulas and sources: `decompose.rules`.
        core: "intersection", U = a[rows, columns]^† per frequency; "projection",
            U = C^† * a * R^†, which no other core beats in the Frobenius norm for these slices;
            "zero", the start of an adapter.
        generator: CPU generator. With one, slices are drawn, in proportion to their scores, where
            the rule knows scores; without, the largest are taken, and nothing is random but
            "uniform".
        rcond: of the pseudo-inverses, see `decompose.cores.make_core`.
        max_workspace: bytes used at most beside ``a`` and the result.
        progress: shows a bar for every pass over the data.

    Raises:
        TypeError: ``a`` is no floating tensor, or given indices are no integers.
        ValueError: bad shape, rank, rule or index, a tensor that is not finite, a generator for a
            rule that draws nothing, or a workspace too small for the rule.
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
    """The stack that a tensor is, or a list of matrices of some slices each; a stack as it is."""
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

    # A tensor of which whole frontal slices are sharded is cut by columns instead.
    sharded = [p.dim if type(p) is Shard else None for p in a.placements]  # type: ignore[attr-defined]
    placements = [Replicate() if dim is None else Shard(dim or 2) for dim in sharded]
    return list(a.redistribute(a.device_mesh, placements).unbind())  # type: ignore[attr-defined]


def select_slices(
    slices: Sequence[Tensor] | Slices,
    rank: int,
    selection: Selection = "norm",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows I and columns J of a stack given as its frontal slices, each ``[n1, n2]``.

    The stack itself is never built. Returns int64 ``[r]`` rows and columns, ascending, on the CPU.
    """
    return select(as_slices("slices", slices), rank, selection, generator)
