"""``core_grad_tokens`` in Triton: z = x R̂ᵀ and p = dy Ĉ, then diagonal blocks of pᵀz.

z is a product of its own, so that what has it already (layers that share their input do) begins
with it. No n1 x n2 gradient is formed, and of the q x q numbers of pᵀz only the blocks of the bins:
see `blocks`.
"""

from __future__ import annotations

import math

from torch import Tensor

from . import launch
from .blocks import core_gradient
from .contract import check_factors, check_tokens, expect
from .products import product


def run(
    x: Tensor,
    grad_y: Tensor | None,
    lateral_hat: Tensor,
    horizontal_hat: Tensor | None,
    n3: int,
    slice_index: int,
    slices: int,
    adapter_ids: Tensor | None,
    adapters: int,
    packed: bool,
    precision: str,
) -> Tensor:
    """Launches the kernels: the gradient of the core, [n3, r, r], or of each of the cores."""
    n1, q = lateral_hat.shape
    arch = launch.arch_of(x.device)
    exact, precision = launch.dot_precisions(arch, precision, lateral_hat.dtype)
    tokens = math.prod(x.shape[:-1])
    check_factors(lateral_hat, horizontal_hat, n3, q // n3, None)
    check_tokens(n3, slice_index, slices, tokens, adapter_ids)
    if packed and adapter_ids is not None:
        raise ValueError("packed: expected False with adapter_ids, got True")
    expect("x", x, [*x.shape[:-1], q if horizontal_hat is None else horizontal_hat.shape[1]])
    if grad_y is None:
        expect("x", x, [n1, x.shape[-1]])
    else:
        expect("grad_y", grad_y, [*x.shape[:-1], slices * n1])
    z = x.reshape(tokens, x.shape[-1])
    if horizontal_hat is not None:
        z = product(z, horizontal_hat.mT, arch, precision)
    if grad_y is None:
        p = lateral_hat.contiguous()  # the tokens are the rows of G, dy the identity
    else:
        p = product(grad_y.reshape(tokens * slices, n1), lateral_hat, arch, precision)
    p = p.reshape(tokens, slices * q)
    where = (n3, q // n3, slice_index, slices)
    return core_gradient(p, z.contiguous(), *where, arch, exact, adapter_ids, adapters, packed)
