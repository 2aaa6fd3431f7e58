"""``core_grad_tokens`` in Triton: computes z = x R̂ᵀ and p = dy Ĉ, then diagonal blocks of pᵀz.

z is a product of its own. Layers that share their input x can so compute z once and pass it on. No
gradient of n1 x n2 numbers is formed. Of the q x q numbers of pᵀz, only the blocks of the bins are
computed: see `blocks`.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..contract import CoreGradTokens
from . import launch
from .blocks import core_gradient
from .contract import check_factors, check_tokens, expect
from .products import product


def run(a: CoreGradTokens, precision: str) -> Tensor:
    """Launches the kernels and returns the gradient of the core, in fp32.

    It is [n3, r, r], or [adapters, n3, r, r] with ``adapter_ids``; with ``packed`` it is ∂Û.

    Raises:
        TypeError, ValueError: dtypes, shapes or slices do not fit, or ``adapter_ids`` are given
            together with ``packed`` or a dense gradient.
    """
    x, lateral_hat, horizontal_hat = a.x, a.lateral_hat, a.horizontal_hat
    n1, q = lateral_hat.shape
    rank, tokens = q // a.n3, math.prod(x.shape[:-1])
    arch = launch.arch_of(x.device)
    precision = "bf16" if a.bf16_operands else precision
    exact, precision = launch.dot_precisions(arch, precision, lateral_hat.dtype)
    check_factors(lateral_hat, horizontal_hat, a.n3, rank, None)
    check_tokens(a.n3, a.slice_index, a.slices, tokens, a.adapter_ids)
    expect("x", x, [*x.shape[:-1], q if horizontal_hat is None else horizontal_hat.shape[1]])
    if a.grad_y is None:
        expect("x", x, [n1, x.shape[-1]])
    else:
        expect("grad_y", a.grad_y, [*x.shape[:-1], a.slices * n1])
    z = x.reshape(tokens, x.shape[-1])
    if horizontal_hat is not None:
        z = product(z, horizontal_hat.mT, arch, precision)
    if a.grad_y is None:
        p = lateral_hat.contiguous()  # the tokens are the rows of G, so dy is the identity
    else:
        p = product(a.grad_y.reshape(tokens * a.slices, n1), lateral_hat, arch, precision)
    p, z = p.reshape(tokens, a.slices * q), z.contiguous()
    where, whose = (a.n3, rank, a.slice_index, a.slices), (a.adapter_ids, a.adapters, a.packed)
    return core_gradient(p, z, *where, arch, exact, *whose)
