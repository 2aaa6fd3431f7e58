"""The functions that users call. They check arguments, choose a backend and call its operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..autocast import outside_autocast
from . import contract, dispatch, eager
from .checks import (
    check_core,
    check_factors,
    check_layer,
    check_linear,
    check_nested,
    check_out,
    check_scale,
    check_slice,
    check_slices,
    check_update,
    check_weights,
    check_x,
)
from .contract import CurLinear, Materialize, MaterializeOut, WEffLinear
from .dispatch import Backend
from .factors import CURFactors, Precision, check_floating, check_floating_dtype


def cur_product(
    factors: CURFactors, core: Tensor, backend: Backend = "auto", *, precision: Precision = "ieee"
) -> Tensor:
    """Computes C * U * R, ``[n3, n1, n2]``, in the dtype of the core. Differentiable in the core.

    Args:
        factors: frozen C and R.
        core: U, ``[n3, r, r]``, with the dtype and device of the factors.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        precision: precision of the products: "ieee", or on GPUs "tf32" or "bf16". The error is at
            most 1e-6, 1e-3 or 6e-3 of the norm of C * U * R.
    """
    check_core(core, factors)
    op = dispatch.operator("materialize", backend, factors, precision)
    lateral_hat, horizontal_hat = factors.packed(precision)
    a = Materialize([], lateral_hat, horizontal_hat, core, 1.0, core.dtype)
    product: Tensor = op(*a._replace(panels=_panels(factors, backend)))
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
    """Computes W_eff = W + scale * C * U * R, ``[n3, n1, n2]``, for all slices in one pass.

    Args:
        weight: W as one tensor ``[n3, n1, n2]``, or as n3 tensors ``[n1, n2]``, which may be the
            layers' own weights: no stacked copy is made. Frozen. Dtypes are fp32, bf16 and fp16,
            and fp64 with fp64 factors. With ``out``, a tensor may be ``[n1, slices * n2]``: it
            holds consecutive slices side by side.
        factors: frozen C and R.
        core: U, ``[n3, r, r]``. The gradient reaches it.
        scale: alpha.
        out_dtype: dtype of the result; by default that of the weight. The sum is computed in the
            dtype of the core and rounded once.
        out: buffer ``[n3, n1, n2]`` to write into and to return. There is no gradient then. If
            slices lie side by side, the buffer is flat, ``[n3 * n1 * n2]``, and receives matrices
            with the shapes of the weights, one after the other.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        precision: precision of the products, as for `cur_product`.

    Raises:
        TypeError, ValueError: a dtype, shape or device is wrong, a weight requires grad, or a core
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
        w_eff: Tensor = op(*Materialize(*of_all, dtype, _panels(factors, backend)))
        return w_eff
    is_flat = weights[0].ndim == 2 and len(weights) < factors.n3
    check_out(out, out_dtype, factors, is_flat)
    if core.requires_grad and torch.is_grad_enabled():
        raise ValueError("out: expected None while the core requires grad; use torch.no_grad()")
    op = dispatch.operator("materialize_out", backend, factors, precision)
    op(*MaterializeOut(*of_all, out, _panels(factors, backend)))
    return out


def _panels(factors: CURFactors, backend: Backend) -> Tensor | None:
    """What the factors keep for the CPU kernels, unless another backend is asked for."""
    return factors.panels() if backend in ("auto", "cpu") else None


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
    """Applies the linear layer of slice l = ``slice_index`` of W + scale * C * U * R.

    Computes ``y = x (W_l + scale (C*U*R)_l)ᵀ + bias`` through the factors. It builds no W_eff, but
    can use one that is given as ``effective``. The gradient reaches ``core`` and ``x``.

    Args:
        x: ``[..., n2]``, in the dtype of the weight. It may be a nested tensor of layout
            ``torch.jagged``.
        weight: ``[slices * n1, n2]``: one slice, or several consecutive slices from
            ``slice_index`` on. A fused q, k, v projection has three. Frozen.
        bias: ``[slices * n1]`` or None. Frozen.
        factors: frozen C and R.
        core: U, ``[n3, r, r]``. With ``adapter_ids``, several cores ``[A, n3, r, r]``.
        slice_index: the first slice, 0 … n3 - slices.
        scale: alpha.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        effective: these slices of W_eff, ``[slices * n1, n2]``, as `materialize` computes them for
            this very core. The layer is then one matrix product, and only the gradient of the core
            uses the factors.
        z: ``project(x, factors)``, ``[..., n3 * r]``, if it exists already. It is kept for the
            gradient of the core in place of ``x``. Layers that share ``x`` (q, k, v) can share it.
        dense_grad: whether to form the gradient of the core from dyᵀx rather than from tokens (see
            `cost`). Not together with ``z``.
        precision: precision of the products of tokens with the factors: "ieee", "bf16", or on GPUs
            "tf32". For "tf32" the backend "cuda" obeys torch's own switch for fp32 products. A
            processor without units for bf16 multiplies operands rounded to bf16 in fp32.
        adapter_ids: int64 ``[B]``: which core each row of the batch uses. The tokens of ``x`` are B
            rows of equal length, and row b uses ``core[adapter_ids[b]]``. Not together with
            ``effective`` or ``dense_grad``.

    Returns:
        ``[..., slices * n1]``, in the dtype of ``x``. Through the factors, a 16-bit result is
        rounded only after the update is added. The rounding is such that an update too small for
        the last bit survives in the mean.
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
    # Within a transform of functorch, W_eff is a constant: no derivative would reach the core.
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
            bf16_operands=factors.bf16_operands(precision),
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
        bf16_operands=factors.bf16_operands(precision),
    )
    op = dispatch.operator("cur_linear", backend, factors, precision)
    if x.dtype in contract.HALVES:
        return _rounded_once(op, by_factors, weight)
    y = op(*by_factors)
    return y


def _rounded_once(op: Callable[..., Any], a: CurLinear, weight: Tensor) -> Tensor:
    """Computes a layer in 16 bits: adds the update to the product before that is rounded."""
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
    """Checks and collects what all calls of one layer have in common, for `eager.run_layer`.

    Arguments are as for `cur_linear`. The backend is the best one for the device of the factors.
    """
    slices = check_layer(weight, bias, factors, slice_index)
    language = dispatch.language_of("cur_linear", "auto", factors, precision)
    return eager.Call(factors, precision, slice_index, slices, language)


def prepare_update(
    factors: CURFactors, slice_index: int, slices: int, precision: Precision
) -> eager.Call:
    """Like `prepare`, for a layer that computes its update alone; see `update_linear`."""
    language = dispatch.language_of("cur_linear", "auto", factors, precision)
    return eager.Call(factors, precision, slice_index, slices, language)


def update_linear(
    x: Tensor,
    factors: CURFactors,
    core: Tensor,
    slice_index: int,
    slices: int = 1,
    scale: float = 1.0,
    backend: Backend = "auto",
    *,
    precision: Precision = "ieee",
    adapter_ids: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Computes what the update alone makes of tokens, ``x (scale C*U*R)_lᵀ``.

    It serves layers whose base weight only another library, or the model itself, multiplies by. The
    gradient reaches ``core`` and ``x``. Arguments are as for `cur_linear`.

    Args:
        x: ``[..., n2]``, in any floating dtype; fp64 only with fp64 factors.
        slices: how many consecutive slices the layer has.
        transposed: whether to compute ``x (scale C*U*R)_l`` of ``x`` ``[..., slices * n1]``.

    Returns:
        ``[..., slices * n1]``, if ``transposed`` ``[..., n2]``, in the dtype of ``x``.
    """
    check_floating("x", x)
    check_update(x, factors, core, slice_index, slices, scale, adapter_ids, transposed)
    lateral_hat, horizontal_hat = factors.packed(precision)
    update_alone = CurLinear(
        x=x,
        weight=None,
        bias=None,
        lateral_hat=lateral_hat,
        horizontal_hat=horizontal_hat,
        core=core,
        slice_index=slice_index,
        slices=slices,
        scale=float(scale),
        transposed=transposed,
        adapter_ids=adapter_ids,
        bf16_operands=factors.bf16_operands(precision),
    )
    with outside_autocast(x.device):
        op = dispatch.operator("cur_linear", backend, factors, precision)
        update: Tensor = op(*update_alone)
    return update


def slice_update(
    factors: CURFactors,
    core: Tensor,
    slice_index: int,
    slices: int = 1,
    scale: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """Computes scale * C * U * R for some consecutive slices only.

    It serves where one layer's update is wanted and building all slices takes too much memory. The
    gradient reaches ``core``. Arguments are as for `cur_linear`.

    Returns:
        ``[slices * n1, n2]``, in the dtype of the core.
    """
    check_core(core, factors)
    check_slices(slices, factors.n3)
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
    """Computes z = x R̂ᵀ, ``[..., n3 * r]``, from ``x`` ``[..., n2]``.

    The update and the gradient of the core need nothing else of ``x``. The dtype of z is that of
    the factors, or bf16 for the precision "bf16". torch computes the product, so it is as exact as
    fp32 for "tf32" too, unless torch's own switch allows TF32.
    """
    check_floating("x", x)
    check_factors(factors)
    check_x(x, factors)
    _, horizontal_hat = factors.packed(precision)
    with outside_autocast(x.device):
        return eager.project(x, horizontal_hat, factors.bf16_operands(precision))


def _nested_as(x: Any, values: Tensor) -> Tensor:
    """Returns a nested tensor with the rows of ``x`` and other values."""
    nested: Tensor = torch.nested.nested_tensor_from_jagged(
        values, x.offsets(), x.lengths(), jagged_dim=x._ragged_idx
    )
    return nested
