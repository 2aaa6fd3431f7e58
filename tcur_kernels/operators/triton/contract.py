"""What Triton's kernels ask of arguments beside `definitions.given`, which has looked before.

They lack some dtypes. And they compare sizes once more, for graphs that are traced. There sizes may
be symbols, and `given` takes what it does not know of them to fit; here each comparison becomes a
guard of the graph.
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
        ValueError: the factors are not [n1, n3 * rank] and [n3 * rank, n2], or the core is not
            [..., n3, rank, rank].
        TypeError: the factors are in fp64.
    """
    expect("lateral_hat", lateral_hat, [lateral_hat.shape[0], n3 * rank])
    if lateral_hat.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"lateral_hat: expected float32 or bfloat16, got {lateral_hat.dtype}")
    if horizontal_hat is not None:
        expect("horizontal_hat", horizontal_hat, [n3 * rank, horizontal_hat.shape[1]])
    if core is not None:
        expect("core", core, [*core.shape[:-3], n3, rank, rank])


def check_tokens(
    n3: int, slice_index: int, slices: int, tokens: int, adapter_ids: Tensor | None
) -> None:
    """Checks the slices of a layer and the rows of its tokens.

    Raises:
        ValueError: slices are not in 0 ... n3 - 1, or there is no whole number of tokens for each
            id.
    """
    if slice_index < 0 or slices < 1 or slice_index + slices > n3:
        raise ValueError(
            f"slice_index: expected 0 to {n3 - slices} for {slices} of {n3} slices, "
            f"got {slice_index}"
        )
    if adapter_ids is not None:
        rows = adapter_ids.shape[0]
        if tokens % rows if rows else tokens:
            raise ValueError(
                f"adapter_ids: expected rows of equal length of {tokens} tokens, got {rows} rows"
            )
