"""Slices in safetensors files, which may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files.shards import Shards
from ..matrices import LAYOUTS, Layout, shape_of
from .slices import MAX_WORKSPACE, Slices


@dataclass(frozen=True)
class FileMatrix:
    """A matrix in a checkpoint, or some of its rows.

    Attributes:
        name: of the tensor.
        layout: how the tensor holds the matrix.
        first, rows: the first row and the number of rows of the matrix; None for all further ones.
    """

    name: str
    layout: Layout = "matrix"
    first: int = 0
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {self.layout!r}")


class FileSlices(Slices):
    """A stack whose slices are rows of matrices in safetensors files.

    Args:
        shards: the checkpoint.
        matrices: names or `FileMatrix`, in the order of their slices. A matrix of m * n1 rows makes
            m slices.
        n1: rows of a slice, by default those of the smallest matrix.
        max_workspace, progress: see `tensor_cur`.

    Raises:
        TypeError: a dtype is not floating.
        ValueError: a name is missing, or matrices disagree in shape or dtype.
    """

    def __init__(
        self,
        shards: Shards,
        matrices: Sequence[str | FileMatrix],
        n1: int | None = None,
        max_workspace: int = MAX_WORKSPACE,
        progress: bool = False,
    ) -> None:
        if len(matrices) == 0:
            raise ValueError("names: expected at least one tensor, got none")
        parts = [FileMatrix(m) if isinstance(m, str) else m for m in matrices]
        missing = [part.name for part in parts if part.name not in shards.files]
        if missing:
            raise ValueError(
                f"weights: expected {', '.join(missing[:5])} in {shards.path}, got "
                f"{len(shards.files)} other tensors"
            )
        for part in parts:
            stored = shards.shapes[part.name]
            if shape_of(stored, part.layout) is None:
                raise ValueError(
                    f"weights: expected {part.name} to be a matrix ({part.layout}), got {stored}"
                )
        shapes = [_shape(shards, part) for part in parts]
        if n1 is None:
            n1 = min(rows for rows, _ in shapes)
        first, n2, dtype = parts[0].name, shapes[0][1], shards.dtype(parts[0].name)
        for part, (rows, width) in zip(parts, shapes, strict=True):
            file = shards.files[part.name].name
            if width != n2 or rows % n1:
                raise ValueError(
                    f"weights: expected {part.name} to be made of {n1} x {n2} slices as {first}, "
                    f"got {rows} x {width} in {file}"
                )
            if shards.dtype(part.name) != dtype:
                raise ValueError(
                    f"weights: expected {part.name} to be {dtype} as {first}, got "
                    f"{shards.dtype(part.name)} in {file}"
                )
        self._shards = shards
        #: Matrix and first row of every slice.
        self._origins = [
            (part, part.first + start)
            for part, (rows, _) in zip(parts, shapes, strict=True)
            for start in range(0, rows, n1)
        ]
        sizes = (len(self._origins), n1, n2)
        super().__init__("weights", sizes, dtype, torch.device("cpu"), max_workspace, progress)

    def _read(self, start: int, stop: int) -> Tensor:
        block = torch.empty(self.n3, stop - start, self.n2, dtype=self.dtype, device="cpu")
        # The files are not mapped: mapped pages would count as memory of this process, in the end
        # for the whole stack.
        with ExitStack() as opened:
            files = {
                file: opened.enter_context(self._shards.open(file))
                for file in {self._shards.files[part.name] for part, _ in self._origins}
            }
            for rows, (part, first) in zip(block, self._origins, strict=True):
                file = files[self._shards.files[part.name]]
                begin = self._shards.offset(part.name)
                if part.layout != "transposed":
                    file.fill(rows, begin + (first + start) * self.n2 * self.dtype.itemsize)
                    continue
                stored = torch.empty(self.n2, stop - start, dtype=self.dtype, device="cpu")
                width = self._shards.shapes[part.name][1]
                for index, line in enumerate(stored):
                    place = index * width + first + start
                    file.fill(line, begin + place * self.dtype.itemsize)
                rows.copy_(stored.T)
        return block

    def _slice_name(self, index: int) -> str:
        part, first = self._origins[index]
        file = self._shards.files[part.name].name
        axis = "columns" if part.layout == "transposed" else "rows"
        return f"weights: {part.name}, {axis} {first} to {first + self.n1 - 1}, in {file}"


def open_stack(
    path: str | Path,
    names: Iterable[str | FileMatrix],
    n1: int | None = None,
    max_workspace: int = MAX_WORKSPACE,
    progress: bool = False,
) -> FileSlices:
    """The stack of matrices ``names`` in safetensors files, for `tensor_cur`; nothing is read yet.

    Arguments and errors: `Shards` and `FileSlices`.
    """
    return FileSlices(Shards(path), list(names), n1, max_workspace, progress)


def _shape(shards: Shards, part: FileMatrix) -> tuple[int, int]:
    """Rows and columns of a part, as the stack sees it."""
    shape = shape_of(shards.shapes[part.name], part.layout)
    assert shape is not None  # was checked
    rows, columns = shape
    wanted = rows - part.first if part.rows is None else part.rows
    if not 0 <= part.first < part.first + wanted <= rows:
        raise ValueError(
            f"names: expected rows within the {rows} of {part.name}, got {wanted} from {part.first}"
        )
    return wanted, columns
