"""A stack of frontal slices that decompositions read block by block, in a bounded workspace.

The slices may be in memory, in files, or sharded over processes. In each case a rule reads blocks
``[n3, b, c]`` of some rows and columns of all slices, and `Slices.sum` completes sums over blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ..autocast import without_autocast

#: Default of every ``max_workspace``, in bytes.
MAX_WORKSPACE = 1 << 30

#: Most elements of a block, even if the workspace allows more; larger blocks do not fit the cache.
_BLOCK_ELEMENTS = 1 << 22

#: Bytes that a rule needs per element of a block: the element itself, its fp64 copy, the half
#: spectrum (16 bytes for every second element), copies inside transforms and products, and as much
#: again for memory of the previous block that the allocator keeps.
BYTES_PER_ELEMENT = 80


class Slices(ABC):
    """Frontal slices of one shape, read in blocks of rows; the input of a selection rule.

    Attributes:
        n3, n1, n2: number of slices, and rows and columns of a slice.
        dtype: of the slices.
        device: of the blocks and sums.
        max_workspace: bytes that a rule may use in addition to the stack itself and its result.
        progress: whether passes over the data show a bar.
    """

    def __init__(
        self,
        name: str,
        sizes: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        max_workspace: int = MAX_WORKSPACE,
        progress: bool = False,
    ) -> None:
        if isinstance(max_workspace, bool) or not isinstance(max_workspace, int):
            raise TypeError(
                f"max_workspace: expected a number of bytes, got {type(max_workspace).__name__}"
            )
        self.name = name
        self.n3, self.n1, self.n2 = sizes
        self.dtype, self.device = dtype, device
        self.max_workspace, self.progress = max_workspace, progress
        self._is_finite = False
        self.require(self.n3 * self.n2 * BYTES_PER_ELEMENT, "one row of every slice")

    @property
    def bins(self) -> int:
        """Length of the half spectrum, n3 // 2 + 1."""
        return self.n3 // 2 + 1

    @property
    def held(self) -> tuple[range, range]:
        """Rows and columns that this process reads: all of them, unless the stack is sharded."""
        return range(self.n1), range(self.n2)

    def sum(self, partial: Tensor) -> Tensor:
        """Completes a sum over blocks: adds up the partial sums of all processes, in place."""
        return partial

    def agree(self, drawn: Tensor) -> Tensor:
        """The indices that the first process drew."""
        return drawn

    def require(self, size: int, what: str) -> None:
        """Checks that ``size`` bytes fit into the workspace.

        Raises:
            ValueError: they do not; the message names ``max_workspace`` and ``what`` needs more.
        """
        if size > self.max_workspace:
            raise ValueError(
                f"max_workspace: expected at least {size:,} bytes for {what} of {self.n3} slices "
                f"of {self.n1} x {self.n2}, got {self.max_workspace:,}"
            )

    def blocks(self, label: str, reserved: int = 0) -> Iterator[tuple[slice, slice, Tensor]]:
        """One pass over the data: yields rows, columns, and their block ``[n3, b, c]`` as stored.

        Args:
            label: what the pass is for; the progress bar shows it.
            reserved: bytes of the workspace that the caller uses during the pass.

        Raises:
            ValueError: the first pass found numbers that are not finite; or the workspace is too
                small.
        """
        rows, columns = self.held
        row = self.n3 * max(1, len(columns))
        self.require(reserved + row * BYTES_PER_ELEMENT, label)
        elements = min(_BLOCK_ELEMENTS, (self.max_workspace - reserved) // BYTES_PER_ELEMENT)
        height = max(1, elements // row)
        where = slice(columns.start, columns.stop)
        culprit = -1
        bar = tqdm(total=len(rows), desc=label, unit="row", leave=False, disable=not self.progress)
        with bar:
            for start in range(rows.start, rows.stop, height):
                stop = min(start + height, rows.stop)
                block = self._read(start, stop)
                if not self._is_finite and culprit < 0:
                    culprit = _first_bad_slice(block)
                yield slice(start, stop), where, block
                bar.update(stop - start)
        if not self._is_finite:
            self._settle(culprit)

    def check_finite(self) -> None:
        """Refuses NaN and Inf; reads the data only if there was no complete pass yet.

        Raises:
            ValueError: some number is not finite; the message says where.
        """
        if not self._is_finite:
            for _ in self.blocks("finite"):
                pass

    def columns(self, indices: Tensor) -> Tensor:
        """C = stack[:, :, indices], ``[n3, n1, r]``; reads every row."""
        lateral = torch.zeros(self.n3, self.n1, len(indices), dtype=self.dtype, device=self.device)
        for rows, columns, block in self.blocks("columns"):
            mine = (indices >= columns.start) & (indices < columns.stop)
            chosen = (indices[mine] - columns.start).to(block.device)
            lateral[:, rows, mine] = block[:, :, chosen].to(self.device)
        return self.sum(lateral)

    def rows(self, indices: Tensor) -> Tensor:
        """R = stack[:, indices, :], ``[n3, r, n2]``; reads only those rows."""
        horizontal = torch.zeros(
            self.n3, len(indices), self.n2, dtype=self.dtype, device=self.device
        )
        rows, columns = self.held
        for place, index in enumerate(indices.tolist()):
            if index in rows:
                row = self._read(index, index + 1)[:, 0]
                horizontal[:, place, columns.start : columns.stop] = row
        return self.sum(horizontal)

    @abstractmethod
    def _read(self, start: int, stop: int) -> Tensor:
        """Reads rows start … stop-1 of all slices, in the columns held here: ``[n3, b, c]``."""

    def _slice_name(self, index: int) -> str:
        """The name of a frontal slice in errors."""
        return self.name

    def _settle(self, culprit: int) -> None:
        """Ends the first pass: if a slice is not finite, all processes raise an error."""
        worst = self.largest(culprit)
        if worst >= 0:
            raise ValueError(f"{self._slice_name(worst)}: expected finite numbers, got NaN or Inf")
        self._is_finite = True

    def largest(self, number: int) -> int:
        """The largest number that any process has."""
        return number


class HeldSlices(Slices):
    """Slices in memory: matrices in the order of their slices, or the slices of one tensor.

    Args:
        name: the name of the slices in errors.
        matrices: floating ``[m * n1, n2]``; each makes m slices.
        n1: rows of a slice, by default those of the smallest matrix.
        max_workspace, progress: see `tensor_cur`.

    Raises:
        TypeError, ValueError: matrices disagree in shape, dtype or device, or have no numbers.
    """

    def __init__(
        self,
        name: str,
        matrices: Sequence[Tensor],
        n1: int | None = None,
        max_workspace: int = MAX_WORKSPACE,
        progress: bool = False,
    ) -> None:
        n1 = check_matrices(name, matrices, n1)
        if matrices[0].is_meta:
            raise ValueError(f"{name}: expected numbers, got none, since it is on the meta device")
        self._slices = [piece for matrix in matrices for piece in matrix.detach().split(n1)]
        first = self._slices[0]
        sizes = (len(self._slices), n1, first.shape[1])
        super().__init__(name, sizes, first.dtype, first.device, max_workspace, progress)

    def _read(self, start: int, stop: int) -> Tensor:
        with without_autocast():  # autocast to fp16 refuses to stack bf16
            return torch.stack([piece[start:stop] for piece in self._slices])

    def columns(self, indices: Tensor) -> Tensor:
        """C = stack[:, :, indices], ``[n3, n1, r]``."""
        chosen = indices.to(self.device)
        with without_autocast():
            return torch.stack([piece[:, chosen] for piece in self._slices])


def check_matrices(name: str, matrices: Sequence[Tensor], n1: int | None) -> int:
    """Checks that the matrices are floating, with one width, dtype and device, and made of slices.

    Returns n1, the rows of a slice: as given, or those of the smallest matrix.
    """
    if not isinstance(matrices, Sequence):
        raise TypeError(f"{name}: expected a list of matrices, got {type(matrices).__name__}")
    if len(matrices) == 0:
        raise ValueError(f"{name}: expected at least one slice, got none")
    for matrix in matrices:
        if not isinstance(matrix, Tensor):
            raise TypeError(f"{name}: expected torch.Tensors, got {type(matrix).__name__}")
        if not matrix.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating dtype, got {matrix.dtype}")
        if matrix.layout != torch.strided:
            raise ValueError(f"{name}: expected dense matrices, got layout {matrix.layout}")
        if matrix.ndim != 2 or 0 in matrix.shape:
            raise ValueError(
                f"{name}: expected matrices with no empty axis, got {list(matrix.shape)}"
            )
    first = matrices[0]
    if n1 is None:
        n1 = min(matrix.shape[0] for matrix in matrices)
    for index, matrix in enumerate(matrices):
        if matrix.shape[0] % n1 or matrix.shape[1] != first.shape[1]:
            raise ValueError(
                f"{name}: expected matrices made of {n1} x {first.shape[1]} slices, got "
                f"{list(matrix.shape)} in number {index}"
            )
        if (matrix.dtype, matrix.device) != (first.dtype, first.device):
            raise ValueError(
                f"{name}: expected {first.dtype} on {first.device} as the first, got "
                f"{matrix.dtype} on {matrix.device} in number {index}"
            )
    return n1


def check_rank(name: str, rank: int, n1: int, n2: int) -> None:
    """Checks that a rank is an integer in 1 … min(n1, n2)."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{name}: expected an int, got {type(rank).__name__}")
    if not 1 <= rank <= min(n1, n2):
        raise ValueError(
            f"{name}: expected 1 to min(n1, n2) = {min(n1, n2)} for {n1} x {n2} slices, got {rank}"
        )


def bin_weights(n3: int, device: torch.device | None = None) -> Tensor:
    """How often each bin of the half spectrum counts: 1, 2, …, 2, 1, fp64 ``[n3 // 2 + 1]``.

    For odd n3 there is no Nyquist bin, so the last bin is one of a pair and has weight 2.
    """
    weights = torch.full((n3 // 2 + 1,), 2.0, dtype=torch.float64, device=device)
    weights[0] = 1.0
    if n3 % 2 == 0:
        weights[-1] = 1.0
    return weights


def half_spectrum(block: Tensor) -> Tensor:
    """DFT of a block along the slices, in fp64: ``[n3, b, c]`` -> ``[n3 // 2 + 1, b, c]``."""
    return torch.fft.rfft(block.double(), dim=0)


def _first_bad_slice(block: Tensor) -> int:
    """Index of the first slice with NaN or Inf, -1 if all is finite."""
    # If the sum of absolute values is finite, so is every number. For narrower dtypes it cannot
    # overflow in fp64. If it overflows for fp64 numbers, each number is checked below.
    if torch.isfinite(block.abs().sum(dtype=torch.float64)):
        return -1
    bad = ~torch.isfinite(block).flatten(1).all(1)
    return int(bad.nonzero()[0]) if bool(bad.any()) else -1
