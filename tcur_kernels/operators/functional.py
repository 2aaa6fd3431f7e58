"""Validated entry points to the operators: packed factors, choice of backend, clear errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..autocast import outside_autocast
from . import contract, cost, eager, native
from .factors import (
    PRECISIONS,
    CURFactors,
    check_device,
    check_dtype,
    check_floating,
    check_floating_dtype,
    check_frozen,
)

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

#: Looked for once, imported when it runs.
_TRITON_INSTALLED = find_spec("triton") is not None


def cur_product(
    factors: CURFactors, core: Tensor, backend: str = "auto", *, precision: str = "ieee"
) -> Tensor:
    """C * U * R, ``[n3, n1, n2]`` in the dtype of the core; the gradient reaches the core.

    Args:
        factors: frozen C and R.
        core: U, ``[n3, r, r]``, dtype and device of the factors.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        precision: of the products, "ieee", and on GPUs "tf32" or "bf16": an error of at most
            1e-6, 1e-3 or 6e-3 of the norm of C * U * R.
    """
    _check_core(core, factors)
    op = _operator("materialize", backend, factors, precision)
    product: Tensor = op([], *factors.packed(precision), core, 1.0, core.dtype)
    return product


def materialize(
    weight: Tensor | Sequence[Tensor],
    factors: CURFactors,
    core: Tensor,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
    *,
    precision: str = "ieee",
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
    _check_core(core, factors)
    weights = _check_weights(weight, factors, out is not None)
    _check_scale(scale)
    if out is None:
        dtype = weights[0].dtype if out_dtype is None else out_dtype
        check_floating_dtype("out_dtype", dtype)
        op = _operator("materialize", backend, factors, precision)
        w_eff: Tensor = op(weights, *factors.packed(precision), core, scale, dtype)
        return w_eff
    is_flat = weights[0].ndim == 2 and len(weights) < factors.n3
    _check_out(out, out_dtype, factors, is_flat)
    if core.requires_grad and torch.is_grad_enabled():
        raise ValueError("out: expected None while the core requires grad; use torch.no_grad()")
    op = _operator("materialize_out", backend, factors, precision)
    op(weights, *factors.packed(precision), core, scale, out=out)
    return out


def cur_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: CURFactors,
    core: Tensor,
    slice_index: int,
    scale: float = 1.0,
    backend: str = "auto",
    *,
    effective: Tensor | None = None,
    z: Tensor | None = None,
    dense_grad: bool = False,
    precision: str = "ieee",
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
        _check_core(core, factors)
        _check_nested(x, factors, z, adapter_ids)
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
    if adapter_ids is None:
        _check_core(core, factors)
    else:
        check_cores(core, factors, adapter_ids)
        _check_rows(adapter_ids, x)
    slices = _check_layer(weight, bias, factors, slice_index)
    _check_scale(scale)
    if x.ndim < 1 or x.shape[-1] != factors.n2:
        raise ValueError(f"x: expected [..., {factors.n2}], got {list(x.shape)}")
    check_dtype("x", x, weight.dtype)
    check_device("x", x, factors.device)
    if effective is not None:
        check_frozen("effective", effective)
        check_dtype("effective", effective, x.dtype)
        check_device("effective", effective, x.device)
        if effective.shape != weight.shape:
            raise ValueError(
                f"effective: expected {list(weight.shape)}, got {list(effective.shape)}"
            )
    if z is not None:
        check_floating("z", z)
        check_device("z", z, x.device)
        if z.shape != (*x.shape[:-1], factors.n3 * factors.rank):
            raise ValueError(
                f"z: expected {[*x.shape[:-1], factors.n3 * factors.rank]}, got {list(z.shape)}"
            )
        if dense_grad:
            raise ValueError("dense_grad: expected False where z is given, got True")
    if adapter_ids is not None and (effective is not None or dense_grad):
        raise ValueError(
            "adapter_ids: expected None with effective or dense_grad, which have one core, got ids"
        )
    op = _operator("cur_linear", backend, factors, precision)
    where = (*factors.packed(precision), core, slice_index, slices, float(scale))
    if eager.is_transformed():
        effective = None  # through which no derivative of the core would come
    materialized = effective is not None
    if effective is not None:
        weight = effective
    if not materialized and x.dtype in contract.HALVES:
        with outside_autocast(x.device):
            update = op(x, None, None, *where, False, False, z, dense_grad, adapter_ids)
            added = update
            if bias is not None and eager.is_transformed():
                added = eager.dithered_by_torch(update, bias)
            elif bias is not None:
                added = eager.Dithered.apply(update, bias)
            return eager.added_to_product(x, weight, added)
    y: Tensor = op(x, weight, bias, *where, materialized, False, z, dense_grad, adapter_ids)
    return y


def prepare(
    weight: Tensor, bias: Tensor | None, factors: CURFactors, slice_index: int, precision: str
) -> eager.Call:
    """What all calls of one layer of a stack have in common, for `eager.run_layer`; checked here.

    Args as for `cur_linear`; the backend is the best one for the factors' device.
    """
    slices = _check_layer(weight, bias, factors, slice_index)
    language = _language("auto", "cur_linear", factors, precision)
    return eager.Call(*factors.packed(precision), slice_index, slices, language)


def slice_update(
    factors: CURFactors,
    core: Tensor,
    slice_index: int,
    slices: int = 1,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """scale * C * U * R at consecutive slices alone, ``[slices * n1, n2]``, dtype of the core.

    For one layer's update where building all slices would take too much memory. The gradient
    reaches ``core``. Arguments as for `cur_linear`.
    """
    _check_core(core, factors)
    if isinstance(slices, bool) or not isinstance(slices, int):
        raise TypeError(f"slices: expected an int, got {type(slices).__name__}")
    if not 1 <= slices <= factors.n3:
        raise ValueError(f"slices: expected 1 to {factors.n3}, got {slices}")
    _check_slice(slice_index, slices, factors.n3)
    _check_scale(scale)
    rows = torch.eye(slices * factors.n1, dtype=core.dtype, device=core.device)
    op = _operator("cur_linear", backend, factors, "ieee")
    where = (slice_index, slices, float(scale), False, True)
    update: Tensor = op(rows, None, None, *factors.packed(), core, *where)
    return update


def project(x: Tensor, factors: CURFactors, precision: str = "ieee") -> Tensor:
    """z = x R̂ᵀ, ``[..., n3 * r]``: all that the core and its gradient need of ``x`` [..., n2].

    The dtype is that of the factors, bf16 for that precision. A product of torch, which is exact to
    fp32 for "tf32" too, unless torch itself is told otherwise.
    """
    check_floating("x", x)
    if x.ndim < 1 or x.shape[-1] != factors.n2:
        raise ValueError(f"x: expected [..., {factors.n2}], got {list(x.shape)}")
    _, horizontal_hat = factors.packed(precision)
    with outside_autocast(x.device):
        return eager.project(x, horizontal_hat)


def check_precision(precision: str, device: torch.device) -> None:
    """Refuses a precision that products on a device cannot have.

    Raises:
        ValueError: no precision, or "tf32" where no kernels for a GPU run. Tensors on the meta
            device may be meant for any other.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision != "tf32" or device.type == "meta":
        return
    absence = f"tensors on {device}"
    if device.type == "cuda":
        if _TRITON_INSTALLED or native.cuda_absence(device) is None:
            return
        absence += " without Triton or compiled CUDA kernels"
    raise ValueError(f"precision: expected ieee or bf16 for {absence}, got 'tf32'")


def build_info() -> dict[str, Any]:
    """What was compiled and what of it runs here.

    Keys: ``version``, ``torch``, ``backends`` (those that run here), ``cpu`` (compiler, torch
    target, instruction sets compiled, runnable and chosen) and ``cuda`` (architectures compiled).
    The last two have ``built``, and ``error`` where they do not run: not built, or of ``cuda`` for
    other GPUs than those here. ``backend="auto"`` then takes Triton or the reference.
    """
    from .. import __version__

    cpu, cuda = native.cpu_facts(), native.cuda_facts()
    runs = {"cpu": cpu["built"], "cuda": cuda["error"] is None}
    if _TRITON_INSTALLED:
        from . import triton

        runs["triton"] = torch.cuda.is_available() or triton.INTERPRETED
    return {
        "version": __version__,
        "torch": torch.__version__,
        "backends": ["reference", *(name for name, is_here in runs.items() if is_here)],
        "cpu": cpu,
        "cuda": cuda,
    }


def _operator(name: str, backend: str, factors: CURFactors, precision: str) -> Callable[..., Any]:
    """Operator ``name`` for a backend name; plain torch where functions are transformed."""
    language = _language(backend, name.removesuffix("_out"), factors, precision)
    if not eager.is_transformed():
        return contract.operator(name, language)
    kernel = contract.plain(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with outside_autocast(factors.device):
            return kernel(*args, **kwargs)

    return call


def _language(backend: str, name: str, factors: CURFactors, precision: str) -> str:
    """Language of operator ``name`` for a backend name; see `contract.LANGUAGES`."""
    device = factors.device
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    # Only kernels for GPUs round operands to TF32, and those of C * U * R itself to bf16.
    rounds = precision == "tf32" or (precision == "bf16" and name == "materialize")
    if backend == "auto":
        backend = _best_backend(name, factors)
    if rounds and backend not in ("triton", "cuda"):
        raise ValueError(
            f"precision: expected {'ieee' if name == 'materialize' else 'ieee or bf16'} for "
            f"backend '{backend}', got '{precision}', which is for backends 'triton' and 'cuda'"
        )
    if backend == "reference":
        return "reference"
    if backend == "triton":
        _check_triton(factors)
        return "triton_tf32" if precision == "tf32" else "triton"
    if device.type != backend:
        raise ValueError(f"backend: expected one for tensors on {device}, got '{backend}'")
    absence, needs = _BUILT_BY[backend]
    if (reason := absence(device)) is not None:
        raise RuntimeError(
            f"backend: '{backend}' is not built here ({reason}); install the package "
            f"with {needs}: pip install --no-build-isolation ."
        )
    if backend == "cuda" and not cost.cuda_takes(factors.n3, factors.dtype):
        raise ValueError(
            f"backend: expected fp32 factors of at most {cost.CUDA_SLICES} slices for 'cuda', "
            f"got {factors.dtype} and {factors.n3}; use 'auto' or 'reference'"
        )
    return contract.CUDA_TF32 if precision == "tf32" else ""


def _best_backend(name: str, factors: CURFactors) -> str:
    if factors.device.type == "cuda":
        here = ["triton"] if _TRITON_INSTALLED else []
        if native.cuda_absence(factors.device) is None:
            here.append("cuda")
        n3, dtype = factors.n3, factors.dtype
        return cost.choose_gpu_backend(name, n3=n3, dtype=dtype, available=here)
    if factors.device.type == "cpu" and native.cpu_error() is None:
        return "cpu"
    return "reference"


def _check_triton(factors: CURFactors) -> None:
    """Refuses what Triton cannot run, and imports the kernels."""
    if not _TRITON_INSTALLED:
        raise RuntimeError(
            "backend: 'triton' is not installed here; pip install 'tcur_kernels[triton]'"
        )
    if factors.dtype != torch.float32:
        raise TypeError(f"factors: expected dtype torch.float32 for 'triton', got {factors.dtype}")
    from . import triton

    if factors.device.type != "cuda" and not triton.INTERPRETED:
        raise ValueError(
            f"backend: expected one for tensors on {factors.device}, got 'triton', which runs on "
            "CUDA devices (on the CPU in Triton's interpreter alone: TRITON_INTERPRET=1)"
        )


#: Backend -> why a device goes without it, and what it is built with.
_BUILT_BY = {
    "cpu": (lambda device: native.cpu_error(), "a C++17 compiler"),
    "cuda": (lambda device: native.cuda_absence(device), "CUDA's nvcc, for the GPUs here"),
}


def _check_precision(name: str, weight: Tensor, factors: CURFactors) -> None:
    if weight.dtype == torch.float64 and factors.dtype != torch.float64:
        raise TypeError(
            f"{name}: expected at most the precision of fp32 factors, got torch.float64"
        )


def _check_core(core: Tensor, factors: CURFactors) -> None:
    if not isinstance(factors, CURFactors):
        raise TypeError(f"factors: expected CURFactors, got {type(factors).__name__}")
    check_floating("core", core)
    shape = (factors.n3, factors.rank, factors.rank)
    if core.shape != shape:
        raise ValueError(f"core: expected {list(shape)}, got {list(core.shape)}")
    check_dtype("core", core, factors.dtype)
    check_device("core", core, factors.device)


def check_cores(cores: Tensor, factors: CURFactors, adapter_ids: Tensor) -> None:
    """Refuses cores that are not ``[A, n3, r, r]`` for these factors, and ids that are not int64.

    Ids must be ``[B]`` on that device, each 0 to A - 1.
    """
    if not isinstance(factors, CURFactors):
        raise TypeError(f"factors: expected CURFactors, got {type(factors).__name__}")
    check_floating("core", cores)
    shape = [factors.n3, factors.rank, factors.rank]
    if cores.ndim != 4 or list(cores.shape[1:]) != shape:
        expected = ", ".join(map(str, ["adapters", *shape]))
        raise ValueError(f"core: expected [{expected}], got {list(cores.shape)}")
    check_dtype("core", cores, factors.dtype)
    check_device("core", cores, factors.device)
    check_adapter_ids(adapter_ids, cores.shape[0], factors.device)


def _check_nested(
    x: Tensor, factors: CURFactors, z: Tensor | None, adapter_ids: Tensor | None
) -> None:
    """Refuses nested tensors of the old layout, and what has no meaning for rows that differ."""
    if x.layout != torch.jagged:
        raise ValueError(f"x: expected layout torch.jagged of a nested tensor, got {x.layout}")
    if x.shape[-1] != factors.n2:  # the axis that differs from row to row, for one
        raise ValueError(f"x: expected [..., {factors.n2}], got {list(x.shape)}")
    for name, given in (("z", z), ("adapter_ids", adapter_ids)):
        if given is not None:
            raise ValueError(f"{name}: expected None with a nested x, got a tensor")


def _nested_as(x: Any, values: Tensor) -> Tensor:
    """A nested tensor with the rows of ``x`` and other values."""
    nested: Tensor = torch.nested.nested_tensor_from_jagged(
        values, x.offsets(), x.lengths(), jagged_dim=x._ragged_idx
    )
    return nested


def _check_rows(adapter_ids: Tensor, x: Tensor) -> None:
    if x.ndim:
        rows, tokens = adapter_ids.shape[0], math.prod(x.shape[:-1])
        if tokens % rows if rows else tokens:
            raise ValueError(
                f"adapter_ids: expected as many as x {list(x.shape)} has rows, got {rows}"
            )


def check_adapter_ids(adapter_ids: Tensor, adapters: int, device: torch.device) -> None:
    """Refuses anything but int64 [B] on that device, each 0 to adapters - 1."""
    if not isinstance(adapter_ids, Tensor):
        raise TypeError(f"adapter_ids: expected a torch.Tensor, got {type(adapter_ids).__name__}")
    check_dtype("adapter_ids", adapter_ids, torch.int64)
    if adapter_ids.ndim != 1:
        raise ValueError(f"adapter_ids: expected [B], got {list(adapter_ids.shape)}")
    check_device("adapter_ids", adapter_ids, device)
    # Elsewhere a look at the values would wait for the device, or there are none to look at.
    if adapter_ids.device.type != "cpu" or eager.is_traced():
        return
    if adapter_ids.numel() and not 0 <= adapter_ids.min() <= adapter_ids.max() < adapters:
        raise ValueError(
            f"adapter_ids: expected 0 to {adapters - 1} for {adapters} cores, got "
            f"{adapter_ids.min()} to {adapter_ids.max()}"
        )


def _check_weights(
    weight: Tensor | Sequence[Tensor], factors: CURFactors, beside: bool
) -> list[Tensor]:
    """The weights as a list; ``beside``: layers may hold several slices side by side."""
    n1, n2, n3 = factors.n1, factors.n2, factors.n3
    if isinstance(weight, Tensor):
        weights, shape = [weight], [n3, n1, n2]
    else:
        weights, shape = list(weight), [n1, n2]
        if not weights or (len(weights) != n3 and not beside):
            raise ValueError(f"weight: expected {n3} tensors [{n1}, {n2}], got {len(weights)}")
    slices = 0
    for tensor in weights:
        check_floating("weight", tensor)
        check_frozen("weight", tensor)
        count = max(1, tensor.shape[-1] // n2) if beside and tensor.ndim == 2 else 1
        if list(tensor.shape) != [*shape[:-1], count * n2]:
            expected = f"[{n1}, slices * {n2}]" if beside and len(shape) == 2 else shape
            raise ValueError(f"weight: expected {expected}, got {list(tensor.shape)}")
        slices += count
        check_dtype("weight", tensor, weights[0].dtype)
        check_device("weight", tensor, factors.device)
    if len(shape) == 2 and slices != n3:
        raise ValueError(f"weight: expected {n3} slices [{n1}, {n2}] together, got {slices}")
    _check_precision("weight", weights[0], factors)
    return weights


def _check_out(
    out: Tensor, out_dtype: torch.dtype | None, factors: CURFactors, is_flat: bool
) -> None:
    check_floating("out", out)
    shape: tuple[int, ...] = (factors.n3, factors.n1, factors.n2)
    if is_flat:
        shape = (math.prod(shape),)
    if out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous {list(shape)}, got {list(out.shape)}")
    if out_dtype is not None:
        check_dtype("out", out, out_dtype)
    check_device("out", out, factors.device)


def _check_layer(weight: Tensor, bias: Tensor | None, factors: CURFactors, slice_index: int) -> int:
    """Refuses a layer that is not frozen or does not fit the factors; how many slices it has."""
    check_floating("weight", weight)
    check_frozen("weight", weight)
    n1, n2 = factors.n1, factors.n2
    if weight.ndim != 2 or weight.shape[1] != n2 or weight.shape[0] % n1 or weight.shape[0] == 0:
        raise ValueError(
            f"weight: expected [slices * {n1}, {n2}] for these factors, got {list(weight.shape)}"
        )
    _check_precision("weight", weight, factors)
    check_device("weight", weight, factors.device)
    if bias is not None:
        check_frozen("bias", bias)
        check_dtype("bias", bias, weight.dtype)
        check_device("bias", bias, factors.device)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    slices = weight.shape[0] // n1
    _check_slice(slice_index, slices, factors.n3)
    return slices


def _check_scale(scale: float) -> None:
    if isinstance(scale, Tensor):  # a gradient would not reach it
        raise TypeError("scale: expected a number, got a torch.Tensor")
    if not torch.compiler.is_compiling() and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")


def _check_slice(slice_index: int, slices: int, n3: int) -> None:
    if isinstance(slice_index, bool) or not isinstance(slice_index, int):
        raise TypeError(f"slice_index: expected an int, got {type(slice_index).__name__}")
    if not 0 <= slice_index <= n3 - slices:
        raise ValueError(
            f"slice_index: expected 0 to {n3 - slices} for {slices} of {n3} slices, "
            f"got {slice_index}"
        )
