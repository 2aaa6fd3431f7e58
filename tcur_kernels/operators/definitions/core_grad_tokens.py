"""``core_grad_tokens``: computes the gradient of the core from tokens of consecutive slices.

The tokens are the input x of a layer, and dy is the gradient of its output. The operator does not
form G = dyᵀx.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .. import bf16_products, contract, reference
from ..contract import CoreGradTokens, CurLinear, Derivative, Operator, gradients
from ..flops import per_bin
from .core_of_packed import no_derivative
from .given import check_core_grad_tokens
from .spectra import compute_dtype, identity, unpacked


def _fake(a: CoreGradTokens) -> Tensor:
    rank = a.lateral_hat.shape[1] // a.n3
    adapters = [] if a.adapter_ids is None else [a.adapters]
    return a.lateral_hat.new_empty(
        [*adapters, a.n3, rank, rank], dtype=compute_dtype(a.lateral_hat)
    )


def _plain(a: CoreGradTokens) -> Tensor:
    # Without grad_y, the tokens are the rows of G. As G is Iᵀ G, dy is then the identity.
    grad_y = identity(a.lateral_hat.shape[0], a.x) if a.grad_y is None else a.grad_y
    x = a.x
    if a.bf16_operands:
        grad_y = bf16_products.rounded(grad_y)
        x = x if a.horizontal_hat is None else bf16_products.rounded(x)  # z meets no factor
    lateral, horizontal = unpacked(a.lateral_hat, a.horizontal_hat, a.n3)
    return reference.core_grad_tokens(
        x,
        grad_y,
        lateral,
        horizontal,
        a.n3,
        a.slice_index,
        a.slices,
        a.adapter_ids,
        a.adapters,
        a.packed,
    )


def _save(ctx: Any, a: CoreGradTokens) -> None:
    ctx.dtype = None if a.grad_y is None else a.grad_y.dtype
    contract.keep(ctx, a)


def _backward(ctx: Any, grad_core: Tensor, language: str) -> tuple[Any, ...]:
    """Computes the gradients of x and dy by `cur_linear`, with ``grad_core`` as its core.

    The result of the operator is linear in x and linear in dy.
    """
    if ctx.kept.packed:
        raise no_derivative()
    a: CoreGradTokens = contract.kept(ctx)
    horizontal_hat = a.horizontal_hat
    if horizontal_hat is None:  # x is z already
        horizontal_hat = identity(a.lateral_hat.shape[1], a.lateral_hat)
    by_x = CurLinear(
        x=a.x,
        weight=None,
        bias=None,
        lateral_hat=a.lateral_hat,
        horizontal_hat=horizontal_hat,
        core=grad_core,
        slice_index=a.slice_index,
        slices=a.slices,
        scale=1.0,
        transposed=False,
        adapter_ids=a.adapter_ids,
        bf16_operands=a.bf16_operands,
    )
    needs = contract.needs_gradient(ctx, CoreGradTokens)
    grad_x = grad_grad_y = None
    if needs.x:
        grad_y = identity(a.lateral_hat.shape[0], a.x) if a.grad_y is None else a.grad_y
        by_grad_y = by_x._replace(x=grad_y, transposed=True)
        grad_x = contract.run(language, by_grad_y).to(a.x.dtype)
    if needs.grad_y:
        grad_grad_y = contract.run(language, by_x).to(ctx.dtype)
    return gradients(CoreGradTokens, x=grad_x, grad_y=grad_grad_y)


def _flops(a: Any) -> int:
    n1, q = a.lateral_hat
    per_token = a.slices * per_bin(a.n3) * (q // a.n3) ** 2
    if a.horizontal_hat is not None:
        per_token += 2 * q * a.horizontal_hat[1]
    if a.grad_y is not None:
        per_token += 2 * a.slices * n1 * q
    return math.prod(a.x[:-1]) * per_token


contract.add(
    Operator(
        "core_grad_tokens",
        CoreGradTokens,
        check=check_core_grad_tokens,
        fake=_fake,
        plain=_plain,
        flops=_flops,
        derivative=Derivative(_backward, _save),
    )
)
