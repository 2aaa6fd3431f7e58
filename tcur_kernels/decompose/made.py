"""Stacks of matrices that are made when they are read, such as weights that are quantised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..autocast import without_autocast
from .slices import BYTES_PER_ELEMENT, MAX_WORKSPACE, Slices


class MadeSlices(Slices):
    """Slices of matrices that functions make; only one whole matrix exists at a time.

    A block holds rows of every matrix, and each matrix has to be made to get them. Blocks are
    small, so the rows of several blocks are read at once, in the half of the workspace that the
    rule leaves. One matrix comes on top of the workspace.

    Args:
        name: the name of the slices in errors.
        makers: functions that return the matrices ``[m * n1, n2]``, in the order of their slices.
        counts: how many slices each matrix makes.
        n1, n2: rows and columns of a slice.
        dtype, device: of the slices; matrices in a narrower dtype are converted.
        max_workspace, progress: see `tensor_cur`.
    """

    def __init__(
        self,
        name: str,
        makers: Sequence[Callable[[], Tensor]],
        counts: Sequence[int],
        n1: int,
        n2: int,
        dtype: torch.dtype,
        device: torch.device,
        max_workspace: int = MAX_WORKSPACE,
        progress: bool = False,
    ) -> None:
        super().__init__(name, (sum(counts), n1, n2), dtype, device, max_workspace, progress)
        self._makers, self._counts = tuple(makers), tuple(counts)
        self._reserved = 0
        self._start, self._band = 0, torch.empty(self.n3, 0, n2, dtype=dtype, device=device)

    def blocks(self, label: str, reserved: int = 0) -> Iterator[tuple[slice, slice, Tensor]]:
        """One pass over the data, see `Slices.blocks`."""
        free = self.max_workspace - reserved - self.n3 * self.n2 * BYTES_PER_ELEMENT
        stack = self.n3 * self.n1 * self.n2 * self.dtype.itemsize
        self._reserved = min(stack, max(0, free) // 2)
        try:
            yield from super().blocks(label, reserved + self._reserved)
        finally:
            self._reserved = 0
            self._band = self._band[:, :0].clone()

    def rows(self, indices: Tensor) -> Tensor:
        """R = stack[:, indices, :], ``[n3, r, n2]``."""
        chosen = indices.to(self.device)
        return self._gathered(lambda slices: slices[:, chosen])

    def columns(self, indices: Tensor) -> Tensor:
        """C = stack[:, :, indices], ``[n3, n1, r]``."""
        chosen = indices.to(self.device)
        return self._gathered(lambda slices: slices[:, :, chosen])

    def _read(self, start: int, stop: int) -> Tensor:
        if not self._start <= start <= stop <= self._start + self._band.shape[1]:
            height = self._reserved // (self.n3 * self.n2 * self.dtype.itemsize)
            end = min(self.n1, max(stop, start + height))
            self._band = self._band[:, :0].clone()  # frees the last one first
            self._band = self._gathered(lambda slices: slices[:, start:end])
            self._start = start
        return self._band[:, start - self._start : stop - self._start]

    def _gathered(self, part: Callable[[Tensor], Tensor]) -> Tensor:
        """A part of all slices; ``part`` is given the slices of one matrix ``[m, n1, n2]``."""
        gathered: Tensor | None = None
        first = 0
        with without_autocast(), torch.no_grad():
            for make, count in zip(self._makers, self._counts, strict=True):
                own = part(make().detach().unflatten(0, (count, self.n1)))
                if gathered is None:
                    gathered = own.new_empty((self.n3, *own.shape[1:]), dtype=self.dtype)
                gathered[first : first + count] = own
                del own  # it may be a view of the whole matrix
                first += count
        assert gathered is not None
        return gathered
