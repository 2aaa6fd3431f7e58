"""``core_grad_dense``: computes the gradient of the core U from the gradient G of C*U*R.

The result is Cᵀ*G*Rᵀ. This map of G is the adjoint of the map from U to C*U*R.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import contract, reference
from ..contract import CoreGradDense, Derivative, Materialize, Operator, gradients
from ..flops import per_bin
from .given import check_core_grad_dense
from .spectra import compute_dtype, unpacked


def _fake(a: CoreGradDense) -> Tensor:
    n3 = a.grad.shape[0]
    rank = a.lateral_hat.shape[1] // n3
    return a.lateral_hat.new_empty((n3, rank, rank), dtype=compute_dtype(a.lateral_hat))


def _plain(a: CoreGradDense) -> Tensor:
    spectra = unpacked(a.lateral_hat, a.horizontal_hat, a.grad.shape[0])
    return reference.core_grad_dense(a.grad.to(compute_dtype(a.lateral_hat)), *spectra)


def _save(ctx: Any, a: CoreGradDense) -> None:
    ctx.save_for_backward(a.lateral_hat, a.horizontal_hat, a.panels)
    ctx.dtype = a.grad.dtype


def _backward(ctx: Any, grad_core: Tensor, language: str) -> tuple[Any, ...]:
    # The adjoint of the adjoint is the product itself, with the incoming gradient as its core.
    lateral_hat, horizontal_hat, panels = ctx.saved_tensors
    product = Materialize(
        weights=[],
        lateral_hat=lateral_hat,
        horizontal_hat=horizontal_hat,
        core=grad_core,
        scale=1.0,
        out_dtype=ctx.dtype,
        panels=panels,
    )
    return gradients(CoreGradDense, grad=contract.run(language, product))


def _flops(a: Any) -> int:
    n3, n1, n2 = a.grad
    rank = a.lateral_hat[1] // n3
    return per_bin(n3) * rank * n2 * (n1 + rank)


contract.add(
    Operator(
        "core_grad_dense",
        CoreGradDense,
        check=check_core_grad_dense,
        fake=_fake,
        plain=_plain,
        flops=_flops,
        derivative=Derivative(_backward, _save),
    )
)
