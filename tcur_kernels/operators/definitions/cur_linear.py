"""``cur_linear``: applies consecutive slices of W_eff to tokens, without forming W_eff.

The tokens pass through R, the core and C one after the other. A product of its own applies the base
weights. The transposed map goes the other way, from the features of outputs to those of inputs.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .. import bf16_products, contract, reference
from ..contract import CurLinear, Derivative, Operator, WEffLinear, gradients
from ..core_gradient import core_gradient
from ..flops import per_bin
from .given import check_cur_linear
from .spectra import unpacked


def fake(a: CurLinear | WEffLinear) -> Tensor:
    """Returns the result without its numbers: [..., slices * n1], or transposed [..., n2]."""
    features = a.horizontal_hat.shape[1] if a.transposed else a.slices * a.lateral_hat.shape[0]
    return a.x.new_empty((*a.x.shape[:-1], features))


def _plain(a: CurLinear) -> Tensor:
    base: Tensor | None = None
    if a.weight is not None:
        base = a.x @ a.weight if a.transposed else F.linear(a.x, a.weight, a.bias)
    lateral, horizontal = unpacked(a.lateral_hat, a.horizontal_hat, a.core.shape[-3])
    apply = reference.slice_update_transposed if a.transposed else reference.slice_update
    tokens = bf16_products.rounded(a.x) if a.bf16_operands else a.x
    update = apply(
        tokens, lateral, horizontal, a.core, a.slice_index, a.slices, a.scale, a.adapter_ids
    )
    if base is None:
        return update.to(a.x.dtype)
    return (base.to(update.dtype) + update).to(base.dtype)


def save(ctx: Any, a: CurLinear | WEffLinear, needs_x: bool, needs_core: bool) -> None:
    """Keeps the arguments for the derivative, without those that it will not read.

    The gradient of the core reads the tokens, or z where it is at hand. The gradient of the tokens
    reads the matrix.
    """
    ctx.dtype = a.x.dtype
    contract.keep(
        ctx,
        a,
        x=needs_core and a.z is None,
        z=needs_core,
        weight=needs_x,
        w_eff=needs_x,
        bias=False,
    )


def _save(ctx: Any, a: CurLinear) -> None:
    needs = contract.needs_gradient(ctx, CurLinear)
    save(ctx, a, needs.x, needs.core)


def _backward(ctx: Any, grad_y: Tensor, language: str) -> tuple[Any, ...]:
    a: CurLinear = contract.kept(ctx)
    needs = contract.needs_gradient(ctx, CurLinear)
    grad_x = grad_core = None
    if needs.x:
        back = a._replace(
            x=grad_y, bias=None, transposed=not a.transposed, z=None, dense_grad=False
        )
        grad_x = contract.run(language, back).to(ctx.dtype)
    if needs.core:
        grad_core = core_grad(a, grad_y, language, a.adapter_ids)
    return gradients(CurLinear, x=grad_x, core=grad_core)


def core_grad(
    a: CurLinear | WEffLinear, grad_y: Tensor, language: str, adapter_ids: Tensor | None = None
) -> Tensor:
    """Returns the gradient of the core, [n3, r, r] or [A, n3, r, r] with ``adapter_ids``.

    In a transposed map, the input ``a.x`` and the gradient ``grad_y`` of the output change places.
    """
    is_exchanged = a.transposed and a.z is None
    return a.scale * core_gradient(
        contract.nearest("core_grad_tokens", language, grad_y.device),
        x=grad_y if is_exchanged else a.x,
        z=a.z,
        grad_y=a.x if is_exchanged else grad_y,
        lateral_hat=a.lateral_hat,
        horizontal_hat=a.horizontal_hat,
        core=a.core,
        slice_index=a.slice_index,
        slices=a.slices,
        dense_grad=a.dense_grad,
        adapter_ids=adapter_ids,
        bf16_operands=a.bf16_operands,
    )


def _flops(a: Any) -> int:
    n2, (n1, q), (n3, rank) = a.horizontal_hat[1], a.lateral_hat, a.core[-3:-1]
    first, last = 2 * q * n2, 2 * a.slices * n1 * q
    if a.transposed:
        first, last = last, first
    per_token = (first if a.z is None else 0) + a.slices * per_bin(n3) * rank**2 + last
    if a.weight is not None:
        per_token += 2 * a.slices * n1 * n2
    return math.prod(a.x[:-1]) * per_token


contract.add(
    Operator(
        "cur_linear",
        CurLinear,
        check=check_cur_linear,
        fake=fake,
        plain=_plain,
        flops=_flops,
        derivative=Derivative(_backward, _save),
        is_fresh=True,
    )
)
