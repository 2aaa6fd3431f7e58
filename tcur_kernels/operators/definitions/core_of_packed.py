"""``core_of_packed``: packed ∂Û of several layers -> the gradient that they make together."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import contract, reference
from ..contract import CoreOfPacked, Derivative, Operator


def no_derivative() -> RuntimeError:
    """What a derivative of packed gradients says."""
    return RuntimeError(
        "tcur: packed gradients cannot be differentiated; core_grad_tokens with packed=False can"
    )


def _fake(a: CoreOfPacked) -> Tensor:
    return a.packed.new_empty(a.packed.shape[1:])


def _plain(a: CoreOfPacked) -> Tensor:
    return reference.core_of_packed(a.packed, a.scale)


def _backward(ctx: Any, grad_core: Tensor, language: str) -> tuple[Any, ...]:
    raise no_derivative()


def _flops(a: Any) -> int:
    return 0


contract.add(
    Operator(
        "core_of_packed",
        CoreOfPacked,
        fake=_fake,
        plain=_plain,
        flops=_flops,
        derivative=Derivative(_backward),
    )
)
