"""How a tensor holds the matrix of a linear map, as modules and files store it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor

#: "matrix": ``[out, in]``. "transposed": ``[in, out]``, as GPT-2's ``Conv1D``. "convolution":
#: ``[out, in, *kernel]``; the matrix is ``[out, in * kernel]``. "experts": ``[experts, n1, n2]``;
#: the matrix has the experts below each other, ``[experts * n1, n2]``.
Layout = Literal["matrix", "transposed", "convolution", "experts"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

#: Files name the first two layouts by whether the tensor is transposed.
_IN_FILES: dict[Layout, bool | str] = {"matrix": False, "transposed": True}


def matrix_of(tensor: Tensor, layout: Layout) -> Tensor:
    """The matrix that a stored tensor holds; no copy if the tensor is contiguous."""
    if layout == "matrix":
        return tensor
    if layout == "transposed":
        return tensor.T
    return tensor.flatten(1) if layout == "convolution" else tensor.flatten(0, 1)


def stored_of(matrix: Tensor, layout: Layout, shape: Sequence[int]) -> Tensor:
    """A matrix as a stored tensor of that shape; the inverse of `matrix_of`."""
    if layout == "matrix":
        return matrix
    return matrix.T if layout == "transposed" else matrix.reshape(tuple(shape))


def shape_of(shape: Sequence[int], layout: Layout) -> tuple[int, int] | None:
    """Rows and columns of the matrix in a stored tensor of that shape; None if there is none."""
    axes = {"convolution": range(3, 6), "experts": range(3, 4)}.get(layout, range(2, 3))
    if len(shape) not in axes or 0 in shape:
        return None
    if layout == "transposed":
        return shape[1], shape[0]
    first = 2 if layout == "experts" else 1
    return math.prod(shape[:first]), math.prod(shape[first:])


def layout_in_file(layout: Layout) -> bool | str:
    """How an adapter file names a layout."""
    return _IN_FILES.get(layout, layout)


def layout_of_file(found: Any) -> Layout:
    """The layout that an adapter file names.

    Raises:
        ValueError: there is no such layout.
    """
    for layout in LAYOUTS:
        if layout_in_file(layout) == found:
            return layout
    raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {found!r}")
