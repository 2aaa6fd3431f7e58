"""What the kernels in plain torch share: they convert packed factors for `reference`.

A packed half spectrum has the real and imaginary parts of its bins as planes of real numbers.
`reference` works on complex numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference


def compute_dtype(factor: Tensor) -> torch.dtype:
    """Returns the dtype of the core and its gradient: fp32, or fp64 for factors in fp64."""
    return torch.promote_types(factor.dtype, torch.float32)


def identity(size: int, like: Tensor) -> Tensor:
    """Returns the identity matrix [size, size], with the dtype and device of ``like``."""
    return torch.eye(size, dtype=like.dtype, device=like.device)


def unpacked(lateral_hat: Tensor, horizontal_hat: Tensor | None, n3: int) -> tuple[Tensor, Tensor]:
    """Converts packed factors into complex half spectra [K, n1, r] and [K, r, n2], K = n3 // 2 + 1.

    Args:
        lateral_hat: packed spectrum of C, [n1, n3 * r].
        horizontal_hat: packed spectrum of R, [n3 * r, n2]. If it is None, the tokens are z = x R̂ᵀ
            already, and the identity takes the place of R̂.
        n3: number of slices.

    Returns:
        complex64 for factors in fp32 or bf16, complex128 for fp64.
    """
    n1, q = lateral_hat.shape
    if horizontal_hat is None:
        horizontal_hat = identity(q, lateral_hat)
    dtype = compute_dtype(lateral_hat)
    lateral_hat, horizontal_hat = lateral_hat.to(dtype), horizontal_hat.to(dtype)
    lateral = lateral_hat.reshape(n1, n3, q // n3).movedim(0, 1)
    horizontal = horizontal_hat.reshape(n3, q // n3, horizontal_hat.shape[1])
    return reference.unpack(lateral), reference.unpack(horizontal)
