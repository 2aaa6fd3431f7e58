"""Refuses arguments that would make kernels read out of bounds, or numbers of a wrong type.

`functional` has checked them already, with clearer errors. These checks are for those who call the
operators directly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def expect(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Checks the shape of a tensor.

    Raises:
        ValueError: it has another shape.
    """
    if list(tensor.shape) != list(shape):
        raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")


def check_factors(
    lateral_hat: Tensor, horizontal_hat: Tensor | None, n3: int, rank: int, core: Tensor | None
) -> None:
    """Checks the packed factors and the core.

    Raises:
        ValueError: the factors are not [n1, n3 * rank] and [n3 * rank, n2] with a rank of at least
            1, or the core is not [..., n3, rank, rank].
        TypeError: the factors are not both fp32 or both bf16, or the core is not fp32.
    """
    if rank < 1:
        raise ValueError(f"lateral_hat: expected a multiple of {n3} columns, got none")
    expect("lateral_hat", lateral_hat, [lateral_hat.shape[0], n3 * rank])
    if lateral_hat.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"lateral_hat: expected float32 or bfloat16, got {lateral_hat.dtype}")
    if horizontal_hat is not None:
        expect("horizontal_hat", horizontal_hat, [n3 * rank, horizontal_hat.shape[1]])
        if horizontal_hat.dtype != lateral_hat.dtype:
            raise TypeError(
                f"horizontal_hat: expected {lateral_hat.dtype}, got {horizontal_hat.dtype}"
            )
    if core is not None:
        expect("core", core, [*core.shape[:-3], n3, rank, rank])
        if core.dtype != torch.float32:
            raise TypeError(f"core: expected float32, got {core.dtype}")


def check_tokens(
    n3: int, slice_index: int, slices: int, tokens: int, adapter_ids: Tensor | None
) -> None:
    """Checks the slices of a layer and the ids of its tokens.

    Raises:
        ValueError: slices are not in 0 ... n3 - 1, or the ids are not int64, or there is no whole
            number of tokens for each id.
    """
    if slice_index < 0 or slices < 1 or slice_index + slices > n3:
        raise ValueError(
            f"slice_index: expected 0 to {n3 - slices} for {slices} of {n3} slices, "
            f"got {slice_index}"
        )
    if adapter_ids is not None:
        rows = adapter_ids.shape[0]
        if adapter_ids.dtype != torch.int64 or (tokens % rows if rows else tokens):
            raise ValueError(
                f"adapter_ids: expected int64 for rows of equal length of {tokens} tokens, "
                f"got {adapter_ids.dtype}, {rows} rows"
            )
