"""What the operators' plain kernels have in common: packed factors, as the reference takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference


def compute_dtype(factor: Tensor) -> torch.dtype:
    """dtype of a core and its gradient, which is fp32 for factors in bf16."""
    return torch.promote_types(factor.dtype, torch.float32)


def identity(size: int, like: Tensor) -> Tensor:
    """The matrix that changes nothing, in dtype and on device of another tensor."""
    return torch.eye(size, dtype=like.dtype, device=like.device)


def unpacked(lateral_hat: Tensor, horizontal_hat: Tensor | None, n3: int) -> tuple[Tensor, Tensor]:
    """Packed factors -> half spectra [K, n1, r] and [K, r, n2]."""
    n1, q = lateral_hat.shape
    if horizontal_hat is None:
        horizontal_hat = identity(q, lateral_hat)
    dtype = compute_dtype(lateral_hat)
    lateral_hat, horizontal_hat = lateral_hat.to(dtype), horizontal_hat.to(dtype)
    lateral = lateral_hat.reshape(n1, n3, q // n3).movedim(0, 1)
    horizontal = horizontal_hat.reshape(n3, q // n3, horizontal_hat.shape[1])
    return reference.unpack(lateral), reference.unpack(horizontal)
