"""``core_of_packed``: adds up the packed ∂Û of several layers and returns the gradient of the core.

The ∂Û of a layer is the Fourier transform of what that layer adds to the gradient. The sum is
transformed back once, and scaled.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import contract, reference
from ..contract import CoreOfPacked, Derivative, Operator
from .given import check_core_of_packed


def no_derivative() -> RuntimeError:
    """Returns the error to raise when somebody differentiates packed gradients."""
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
        check=check_core_of_packed,
        fake=_fake,
        plain=_plain,
        flops=_flops,
        derivative=Derivative(_backward),
    )
)
