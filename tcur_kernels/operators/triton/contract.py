"""What kernels must never be given: they would read out of bounds.

The functional face has refused it with more words; this is for direct calls of the operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def expect(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Refuses another shape."""
    if list(tensor.shape) != list(shape):
        raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")


def check_factors(
    lateral_hat: Tensor, horizontal_hat: Tensor | None, n3: int, rank: int, core: Tensor | None
) -> None:
    """Refuses packed spectra that are not [n1, n3 r] and [n3 r, n2] of fp32 or bf16, or a core."""
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
    """Refuses slices outside of the tube, and rows that do not divide the tokens."""
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
