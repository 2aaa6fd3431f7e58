"""Stacks of weights that are sharded over processes as DTensors (FSDP2, tensor parallel)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..processes import is_sharded
from .slices import MAX_WORKSPACE, Slices, check_matrices


class ShardedSlices(Slices):
    """Slices of DTensors; every process reads its own rows or columns.

    Scores, sketches and chosen slices are sums over processes. Rules therefore see the same numbers
    as on a single process, except that sums may be rounded differently, and they choose the same
    slices. Every process must make the same calls.

    Args:
        name: the name of the weights in errors.
        weights: matrices in the order of their slices, on one device mesh. A matrix of m·n1 rows
            makes m slices. If they are sharded by rows (``Shard(0)``, every matrix one slice) or
            by columns (``Shard(1)``), they are read in place. Anything else is first redistributed
            to columns, which costs a copy of this process's share.
        n1: rows of a slice, by default those of the smallest matrix.
        max_workspace, progress: see `tensor_cur`; only the first process shows the bar.

    Raises:
        TypeError, ValueError: matrices disagree in shape, dtype or device mesh.
    """

    def __init__(
        self,
        name: str,
        weights: Sequence[Any],
        n1: int | None = None,
        max_workspace: int = MAX_WORKSPACE,
        progress: bool = False,
    ) -> None:
        from torch.distributed.tensor import Replicate, Shard

        n1 = check_matrices(name, weights, n1)
        mesh = weights[0].device_mesh
        for weight in weights:
            if not is_sharded(weight) or weight.device_mesh != mesh:
                raise ValueError(f"{name}: expected DTensors on one device mesh, got several")
        self._mesh = mesh
        placements = list(weights[0].placements)
        dims = [dim for dim, placement in enumerate(placements) if type(placement) is Shard]
        self._dim = dims[0] if dims else 0
        by_rows, by_columns = (
            [Shard(axis) if dim == self._dim else Replicate() for dim in range(mesh.ndim)]
            for axis in (0, 1)
        )
        is_by_rows = all(
            list(weight.placements) == by_rows and weight.shape[0] == n1 for weight in weights
        )
        target = by_rows if is_by_rows else by_columns
        local: list[Tensor] = []
        for weight in weights:
            piece = weight.detach().redistribute(mesh, target).to_local()
            local += [piece] if is_by_rows else piece.split(n1)
        self._slices = local
        n2 = weights[0].shape[1]
        # DTensor shards like torch.chunk: all parts have this length, except the last ones, which
        # may be shorter or empty.
        total = n1 if is_by_rows else n2
        length = -(-total // mesh.size(self._dim))
        start = min(mesh.get_local_rank(self._dim) * length, total)
        mine = range(start, min(start + length, total))
        self._held = (mine, range(n2)) if is_by_rows else (range(n1), mine)
        is_first = all(place == 0 for place in mesh.get_coordinate())
        super().__init__(
            name,
            (len(local), n1, n2),
            weights[0].dtype,
            local[0].device,
            max_workspace,
            progress and is_first,
        )

    @property
    def held(self) -> tuple[range, range]:
        """The rows and columns that this process holds."""
        return self._held

    def sum(self, partial: Tensor) -> Tensor:
        """Adds up the partial sums of all processes, in place."""
        wide = partial.float() if partial.dtype.itemsize < 4 else partial.contiguous()
        torch.distributed.all_reduce(wide, group=self._mesh.get_group(self._dim))
        return partial.copy_(wide)

    def agree(self, drawn: Tensor) -> Tensor:
        """The indices that the first process of the mesh drew, since generators may differ."""
        agreed = drawn.to(self.device)
        for dim in range(self._mesh.ndim):
            group = self._mesh.get_group(dim)
            first = torch.distributed.get_global_rank(group, 0)
            torch.distributed.broadcast(agreed, first, group=group)
        return agreed.to(drawn.device)

    def largest(self, number: int) -> int:
        """The largest number that any process has."""
        shared = torch.tensor([number], device=self.device)
        torch.distributed.all_reduce(
            shared, torch.distributed.ReduceOp.MAX, group=self._mesh.get_group(self._dim)
        )
        return int(shared)

    def _read(self, start: int, stop: int) -> Tensor:
        first = self._held[0].start
        with without_autocast():
            return torch.stack([piece[start - first : stop - first] for piece in self._slices])
