"""Support for several processes: sharded weights, and which process is the first."""

from __future__ import annotations

import torch
from torch import Tensor


def is_sharded(tensor: object) -> bool:
    """Whether a process holds only a part of the tensor (FSDP2 outside of the module's forward)."""
    return hasattr(tensor, "full_tensor")  # a DTensor; isinstance would need an expensive import


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; if it is sharded, all processes must call this to gather it."""
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def is_first_process() -> bool:
    """Whether this is the only process, or rank 0."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or (
        distributed.get_rank() == 0
    )
