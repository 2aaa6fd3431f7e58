"""``materialize``: computes W_eff = W + scale C*U*R for all slices, or scale C*U*R alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import contract, reference
from ..contract import CoreGradDense, Derivative, Materialize, Operator, gradients
from ..flops import per_bin
from .given import check_materialize
from .spectra import unpacked


def _fake(a: Materialize) -> Tensor:
    shape = (a.core.shape[0], a.lateral_hat.shape[0], a.horizontal_hat.shape[1])
    return a.core.new_empty(shape, dtype=a.out_dtype)


def plain(a: Materialize) -> Tensor:
    """Computes W_eff, [n3, n1, n2] in ``a.out_dtype``, in plain torch."""
    spectra = unpacked(a.lateral_hat, a.horizontal_hat, a.core.shape[0])
    w_eff = reference.materialize(_stacked(a.weights), *spectra, a.core, a.scale)
    return w_eff.to(a.out_dtype).contiguous()  # a sum takes the strides of the weights


def _stacked(weights: Sequence[Tensor]) -> Tensor | None:
    if not weights:
        return None
    return weights[0] if weights[0].ndim == 3 else torch.stack(list(weights))


def _save(ctx: Any, a: Materialize) -> None:
    ctx.save_for_backward(a.lateral_hat, a.horizontal_hat, a.panels)
    ctx.scale = a.scale
    ctx.no_weights = [None] * len(a.weights)


def _backward(ctx: Any, grad: Tensor, language: str) -> tuple[Any, ...]:
    core_grad = contract.run(language, CoreGradDense(grad, *ctx.saved_tensors))
    all_of_them = gradients(Materialize, weights=ctx.no_weights, core=ctx.scale * core_grad)
    # With a list among the arguments, torch wants as many as were given; it leaves out defaults.
    return all_of_them[: len(ctx.needs_input_grad)]


def flops(a: Any) -> int:
    """Counts the multiplications and additions of C*U*R; ``a`` has the shapes of the tensors."""
    n3, rank = a.core[:2]
    return per_bin(n3) * a.lateral_hat[0] * rank * (rank + a.horizontal_hat[1])


contract.add(
    Operator(
        "materialize",
        Materialize,
        check=check_materialize,
        fake=_fake,
        plain=plain,
        flops=flops,
        derivative=Derivative(_backward, _save),
    )
)
