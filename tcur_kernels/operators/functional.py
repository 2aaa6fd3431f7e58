"""Entry points to the operators: packed factors, choice of backend, clear errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..autocast import outside_autocast
from . import contract, dispatch, eager
from .checks import (
    check_core,
    check_layer,
    check_linear,
    check_nested,
    check_out,
    check_scale,
    check_slice,
    check_weights,
    check_x,
)
from .contract import CurLinear, Materialize, MaterializeOut, WEffLinear
from .dispatch import Backend
from .factors import CURFactors, Precision, check_floating, check_floating_dtype


def cur_product(
    factors: CURFactors, core: Tensor, backend: Backend = "auto", *, precision: Precision = "ieee"
) -> Tensor:
    """C * U * R, ``[n3, n1, n2]`` in the dtype of the core; the gradient reaches the core.

    Args:
        factors: frozen C and R.
        core: U, ``[n3, r, r]``, dtype and device of the factors.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        precision: of the products, "ieee", and on GPUs "tf32" or "bf16": an error of at most
            1e-6, 1e-3 or 6e-3 of the norm of C * U * R.
    """
    check_core(core, factors)
    op = dispatch.operator("materialize", backend, factors, precision)
    lateral_hat, horizontal_hat = factors.packed(precision)
    product: Tensor = op(*Materialize([], lateral_hat, horizontal_hat, core, 1.0, core.dtype))
    return product


def materialize(
    weight: Tensor | Sequence[Tensor],
    factors: CURFactors,
    core: Tensor,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
    *,
    precision: Precision = "ieee",
) -> Tensor:
    """W_eff = W + scale * C * U * R for all slices in one pass, ``[n3, n1, n2]``.

    Args:
        weight: W as one tensor ``[n3, n1, n2]`` or as n3 tensors ``[n1, n2]`` (the layers' own
            weights; no stacked copy is made). Frozen; fp32, bf16, fp16, or fp64 with fp64 factors.
            With ``out``, tensors may be ``[n1, slices * n2]``: consecutive slices side by side.
        factors: frozen C and R.
        core: U, ``[n3, r, r]``; the gradient reaches it.
        scale: alpha.
        out_dtype: dtype of the result, default that of the weight. The sum is formed in the dtype
            of the core and rounded once.
        out: buffer ``[n3, n1, n2]`` to write into and return; no gradient then. Where slices lie
            side by side it is flat, ``[n3 * n1 * n2]``, for matrices of the shapes of the weights,
            one after the other.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        precision: of the products, as for `cur_product`.

    Raises:
        TypeError, ValueError: bad dtype, shape, device, a weight that requires grad, or a core that
            requires grad together with ``out`` while gradients are recorded.
    """
    check_core(core, factors)
    weights = check_weights(weight, factors, out is not None)
    check_scale(scale)
    lateral_hat, horizontal_hat = factors.packed(precision)
    of_all = (weights, lateral_hat, horizontal_hat, core, scale)
    if out is None:
        dtype = weights[0].dtype if out_dtype is None else out_dtype
        check_floating_dtype("out_dtype", dtype)
        op = dispatch.operator("materialize", backend, factors, precision)
        w_eff: Tensor = op(*Materialize(*of_all, dtype))
        return w_eff
    is_flat = weights[0].ndim == 2 and len(weights) < factors.n3
    check_out(out, out_dtype, factors, is_flat)
    if core.requires_grad and torch.is_grad_enabled():
        raise ValueError("out: expected None while the core requires grad; use torch.no_grad()")
    op = dispatch.operator("materialize_out", backend, factors, precision)
    op(*MaterializeOut(*of_all, out))
    return out


def cur_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: CURFactors,
    core: Tensor,
    slice_index: int,
    scale: float = 1.0,
    backend: Backend = "auto",
    *,
    effective: Tensor | None = None,
    z: Tensor | None = None,
    dense_grad: bool = False,
    precision: Precision = "ieee",
    adapter_ids: Tensor | None = None,
) -> Tensor:
    """A linear layer on slice ``slice_index`` of W + scale * C * U * R.

    ``y = x (W_l + scale (C*U*R)_l)ᵀ + bias``, by way of the factors: no W_eff is built unless it is
    given as ``effective``. The gradient reaches ``core`` and ``x``.

    Args:
        x: ``[..., n2]``, dtype of the weight; may be a nested tensor of layout ``torch.jagged``.
        weight: ``[slices * n1, n2]``: one slice, or several consecutive ones from ``slice_index``
            on (a fused q, k, v projection is three). Frozen.
        bias: ``[slices * n1]`` or None. Frozen.
        factors: frozen C and R.
        core: U, ``[n3, r, r]``; several, ``[A, n3, r, r]``, with ``adapter_ids``.
        slice_index: first slice, 0 … n3 - slices.
        scale: alpha.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        effective: these slices of W_eff for this very core, ``[slices * n1, n2]``, if they are at
            hand (`materialize`): the product is then one matrix product, and the factors serve the
            gradient of the core alone.
        z: ``project(x, factors)`` if it is at hand, ``[..., n3 * r]``. It is kept for the gradient
            of the core instead of ``x``, and layers that share ``x`` (q, k, v) can share it.
        dense_grad: form the gradient of the core from dyᵀx rather than from tokens (see `cost`);
            not together with ``z``.
        precision: of the products of tokens with the factors, "ieee" or "bf16", and on GPUs
            "tf32", which the backend 'cuda' leaves to torch's own switch for fp32 products.
        adapter_ids: int64 ``[B]``: a core for each row of the batch. The tokens of ``x`` are B rows
            of equal length, and row b goes by ``core[adapter_ids[b]]``; not together with
            ``effective`` or ``dense_grad``.

    Returns:
        ``[..., slices * n1]``, dtype of ``x``. By way of the factors, 16-bit results are rounded
        with the update in the sum: one too small for their last bit survives in the mean.
    """
    check_floating("x", x)
    if x.is_nested:
        check_core(core, factors)
        check_nested(x, factors, z, adapter_ids)
        tokens = cur_linear(
            x.values(),
            weight,
            bias,
            factors,
            core,
            slice_index,
            scale,
            backend,
            effective=effective,
            dense_grad=dense_grad,
            precision=precision,
        )
        return _nested_as(x, tokens)
    slices = check_linear(
        x,
        weight,
        bias,
        factors,
        core,
        slice_index,
        scale,
        effective=effective,
        z=z,
        dense_grad=dense_grad,
        adapter_ids=adapter_ids,
    )
    lateral_hat, horizontal_hat = factors.packed(precision)
    # W_eff has no derivative for transforms: none of the core would come through it.
    if effective is not None and not eager.is_transformed():
        by_w_eff = WEffLinear(
            x=x,
            w_eff=effective,
            bias=bias,
            lateral_hat=lateral_hat,
            horizontal_hat=horizontal_hat,
            core=core,
            slice_index=slice_index,
            slices=slices,
            scale=float(scale),
            transposed=False,
            z=z,
            dense_grad=dense_grad,
        )
        y: Tensor = dispatch.operator("w_eff_linear", backend, factors, precision)(*by_w_eff)
        return y
    by_factors = CurLinear(
        x=x,
        weight=weight,
        bias=bias,
        lateral_hat=lateral_hat,
        horizontal_hat=horizontal_hat,
        core=core,
        slice_index=slice_index,
        slices=slices,
        scale=float(scale),
        transposed=False,
        z=z,
        dense_grad=dense_grad,
        adapter_ids=adapter_ids,
    )
    op = dispatch.operator("cur_linear", backend, factors, precision)
    if x.dtype in contract.HALVES:
        return _rounded_once(op, by_factors, weight)
    y = op(*by_factors)
    return y


def _rounded_once(op: Callable[..., Any], a: CurLinear, weight: Tensor) -> Tensor:
    """A layer in 16 bits: the update goes into the product, which is rounded with it."""
    with outside_autocast(a.x.device):
        added: Tensor = op(*a._replace(weight=None, bias=None))
        if a.bias is not None and eager.is_transformed():
            added = eager.dithered_by_torch(added, a.bias)
        elif a.bias is not None:
            added = eager.Dithered.apply(added, a.bias)
        return eager.added_to_product(a.x, weight, added)


def prepare(
    weight: Tensor, bias: Tensor | None, factors: CURFactors, slice_index: int, precision: Precision
) -> eager.Call:
    """What all calls of one layer of a stack have in common, for `eager.run_layer`; checked here.

    Args as for `cur_linear`; the backend is the best one for the factors' device.
    """
    slices = check_layer(weight, bias, factors, slice_index)
    language = dispatch.language_of("cur_linear", "auto", factors, precision)
    return eager.Call(*factors.packed(precision), slice_index, slices, language)


def slice_update(
    factors: CURFactors,
    core: Tensor,
    slice_index: int,
    slices: int = 1,
    scale: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """scale * C * U * R at consecutive slices alone, ``[slices * n1, n2]``, dtype of the core.

    For one layer's update where building all slices would take too much memory. The gradient
    reaches ``core``. Arguments as for `cur_linear`.
    """
    check_core(core, factors)
    if isinstance(slices, bool) or not isinstance(slices, int):
        raise TypeError(f"slices: expected an int, got {type(slices).__name__}")
    if not 1 <= slices <= factors.n3:
        raise ValueError(f"slices: expected 1 to {factors.n3}, got {slices}")
    check_slice(slice_index, slices, factors.n3)
    check_scale(scale)
    lateral_hat, horizontal_hat = factors.packed()
    of_rows = CurLinear(
        x=torch.eye(slices * factors.n1, dtype=core.dtype, device=core.device),
        weight=None,
        bias=None,
        lateral_hat=lateral_hat,
        horizontal_hat=horizontal_hat,
        core=core,
        slice_index=slice_index,
        slices=slices,
        scale=float(scale),
        transposed=True,
    )
    update: Tensor = dispatch.operator("cur_linear", backend, factors, "ieee")(*of_rows)
    return update


def project(x: Tensor, factors: CURFactors, precision: Precision = "ieee") -> Tensor:
    """z = x R̂ᵀ, ``[..., n3 * r]``: all that the core and its gradient need of ``x`` [..., n2].

    The dtype is that of the factors, bf16 for that precision. A product of torch, which is exact to
    fp32 for "tf32" too, unless torch itself is told otherwise.
    """
    check_floating("x", x)
    check_x(x, factors)
    _, horizontal_hat = factors.packed(precision)
    with outside_autocast(x.device):
        return eager.project(x, horizontal_hat)


def _nested_as(x: Any, values: Tensor) -> Tensor:
    """A nested tensor with the rows of ``x`` and other values."""
    nested: Tensor = torch.nested.nested_tensor_from_jagged(
        values, x.offsets(), x.lengths(), jagged_dim=x._ragged_idx
    )
    return nested
