"""``w_eff_linear``: applies consecutive slices of a W_eff that is at hand to tokens.

This is one matrix product, or one with the transpose, and torch computes it in every language. The
gradient of the core is computed from the factors, by the kernels of the language.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .. import contract
from ..contract import Derivative, Operator, WEffLinear, gradients
from .cur_linear import core_grad, fake, save
from .given import check_w_eff_linear


def _plain(a: WEffLinear) -> Tensor:
    y = a.x @ a.w_eff if a.transposed else F.linear(a.x, a.w_eff, a.bias)
    return y.contiguous()


def _save(ctx: Any, a: WEffLinear) -> None:
    needs = contract.needs_gradient(ctx, WEffLinear)
    save(ctx, a, needs.x, needs.core)


def _backward(ctx: Any, grad_y: Tensor, language: str) -> tuple[Any, ...]:
    a: WEffLinear = contract.kept(ctx)
    needs = contract.needs_gradient(ctx, WEffLinear)
    grad_x = grad_core = None
    if needs.x:
        back = a._replace(x=grad_y, transposed=not a.transposed, z=None, dense_grad=False)
        grad_x = contract.run(language, back).to(ctx.dtype)
    if needs.core:
        grad_core = core_grad(a, grad_y, language)
    return gradients(WEffLinear, x=grad_x, core=grad_core)


def _flops(a: Any) -> int:
    return 2 * math.prod(a.x[:-1]) * a.slices * a.lateral_hat[0] * a.horizontal_hat[1]


contract.add(
    Operator(
        "w_eff_linear",
        WEffLinear,
        check=check_w_eff_linear,
        fake=fake,
        plain=_plain,
        flops=_flops,
        derivative=Derivative(_backward, _save),
        is_fresh=True,
        serves_all=True,
    )
)
