"""``core_of_packed`` in Triton: adds up packed ∂Û and transforms the sum back, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import CoreOfPacked
from . import launch
from .blocks import core_of_partials
from .contract import expect


def run(a: CoreOfPacked, precision: str) -> Tensor:
    """Launches the kernel and returns the gradient of the core, [n3, r, r] in fp32.

    The products are exact to fp32, whatever ``precision`` is.

    Raises:
        TypeError, ValueError: ``packed`` is not fp32, or its last two sizes differ.
    """
    packed = a.packed
    expect("packed", packed, [*packed.shape[:3], packed.shape[2]])
    if packed.dtype != torch.float32:
        raise TypeError(f"packed: expected float32, got {packed.dtype}")
    arch = launch.arch_of(packed.device)
    exact, _ = launch.dot_precisions(arch, "ieee", packed.dtype)
    return core_of_partials(packed.contiguous(), a.scale, arch, exact)
