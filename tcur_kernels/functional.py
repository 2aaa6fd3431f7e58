"""Validated entry points to the operators: packed factors, choice of backend, clear errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native, ops, reference

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")


class CURFactors:
    """The frozen factors C and R of one stack, with their packed half spectra.

    Args:
        lateral: C, ``[n3, n1, r]``, floating, finite, without gradient.
        horizontal: R, ``[n3, r, n2]``, same dtype and device.

    Attributes:
        lateral_hat: packed spectrum of C, ``[n1, n3 * r]``, fp32 (fp64 for fp64 factors).
        horizontal_hat: packed spectrum of R, ``[n3 * r, n2]``.
        n1, n2, n3, rank: sizes.

    Raises:
        TypeError: no tensors, or dtypes that are not floating or differ.
        ValueError: shapes that do not fit, numbers that are not finite, devices that differ, or a
            factor that requires grad: only the core is trained.
    """

    def __init__(self, lateral: Tensor, horizontal: Tensor) -> None:
        for name, factor in (("lateral", lateral), ("horizontal", horizontal)):
            _check_floating(name, factor)
            if factor.ndim != 3 or 0 in factor.shape:
                shape = "[n3, n1, r]" if name == "lateral" else "[n3, r, n2]"
                raise ValueError(f"{name}: expected {shape}, got {list(factor.shape)}")
            _check_frozen(name, factor)
        if lateral.dtype != horizontal.dtype:
            raise TypeError(
                f"horizontal: expected {lateral.dtype} as lateral, got {horizontal.dtype}"
            )
        _check_device("horizontal", horizontal, lateral.device)
        n3, n1, rank = lateral.shape
        if horizontal.shape[:2] != (n3, rank):
            raise ValueError(
                f"horizontal: expected [{n3}, {rank}, n2] to go with lateral "
                f"{list(lateral.shape)}, got {list(horizontal.shape)}"
            )
        if rank > min(n1, horizontal.shape[2]):
            raise ValueError(
                f"lateral: expected a rank of at most min(n1, n2) = "
                f"{min(n1, horizontal.shape[2])}, got {rank}"
            )
        for name, factor in (("lateral", lateral), ("horizontal", horizontal)):
            if not torch.isfinite(factor).all():
                raise ValueError(f"{name}: expected finite numbers, got NaN or Inf")
        dtype = torch.promote_types(lateral.dtype, torch.float32)
        self.lateral, self.horizontal = lateral.detach(), horizontal.detach()
        # Transformed in fp64 and rounded once: spectra are made once and used in every step.
        planes = reference.pack(reference.half_spectrum(self.lateral.double()), n3)
        self.lateral_hat = planes.movedim(0, 1).reshape(n1, n3 * rank).to(dtype).contiguous()
        planes = reference.pack(reference.half_spectrum(self.horizontal.double()), n3)
        self.horizontal_hat = planes.reshape(n3 * rank, -1).to(dtype).contiguous()
        self.n1, self.n2, self.n3, self.rank = n1, horizontal.shape[2], n3, rank

    @classmethod
    def from_packed(
        cls, lateral: Tensor, horizontal: Tensor, lateral_hat: Tensor, horizontal_hat: Tensor
    ) -> CURFactors:
        """Factors whose packed spectra are at hand already; nothing is checked or transformed."""
        self = cls.__new__(cls)
        self.lateral, self.horizontal = lateral, horizontal
        self.lateral_hat, self.horizontal_hat = lateral_hat, horizontal_hat
        self.n3, self.n1, self.rank = lateral.shape
        self.n2 = horizontal.shape[2]
        return self

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the packed spectra and of the core: fp32 or fp64."""
        return self.lateral_hat.dtype

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return self.lateral_hat.device

    def to(self, device: torch.device | str) -> CURFactors:
        """The same factors on another device."""
        return CURFactors.from_packed(
            self.lateral.to(device),
            self.horizontal.to(device),
            self.lateral_hat.to(device),
            self.horizontal_hat.to(device),
        )

    def __repr__(self) -> str:
        return (
            f"CURFactors(n3={self.n3}, n1={self.n1}, n2={self.n2}, rank={self.rank}, "
            f"dtype={self.dtype}, device='{self.device}')"
        )


def cur_product(factors: CURFactors, core: Tensor, backend: str = "auto") -> Tensor:
    """C * U * R, ``[n3, n1, n2]`` in the dtype of the core; the gradient reaches the core.

    Args:
        factors: frozen C and R.
        core: U, ``[n3, r, r]``, dtype and device of the factors.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
    """
    _check_core(core, factors)
    op = ops.operator("materialize", _language(backend, factors.device))
    product: Tensor = op([], *_packed(factors), core, 1.0, core.dtype)
    return product


def materialize(
    weight: Tensor | Sequence[Tensor],
    factors: CURFactors,
    core: Tensor,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """W_eff = W + scale * C * U * R for all slices in one pass, ``[n3, n1, n2]``.

    Args:
        weight: W as one tensor ``[n3, n1, n2]`` or as n3 tensors ``[n1, n2]`` (the layers' own
            weights; no stacked copy is made). Frozen; fp32, bf16, fp16, or fp64 with fp64 factors.
        factors: frozen C and R.
        core: U, ``[n3, r, r]``; the gradient reaches it.
        scale: alpha.
        out_dtype: dtype of the result, default that of the weight. The sum is formed in the dtype
            of the core and rounded once.
        out: buffer ``[n3, n1, n2]`` to write into and return; no gradient then.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        TypeError, ValueError: bad dtype, shape, device, a weight that requires grad, or a core that
            requires grad together with ``out`` while gradients are recorded.
    """
    _check_core(core, factors)
    weights = _check_weights(weight, factors)
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    language = _language(backend, factors.device)
    if out is None:
        dtype = weights[0].dtype if out_dtype is None else out_dtype
        if not dtype.is_floating_point:
            raise TypeError(f"out_dtype: expected a floating dtype, got {dtype}")
        op = ops.operator("materialize", language)
        w_eff: Tensor = op(weights, *_packed(factors), core, scale, dtype)
        return w_eff
    _check_out(out, out_dtype, factors)
    if core.requires_grad and torch.is_grad_enabled():
        raise ValueError("out: expected None while the core requires grad; use torch.no_grad()")
    op = ops.operator("materialize_out", language)
    op(weights, *_packed(factors), core, scale, out=out)
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
) -> Tensor:
    """A linear layer on slice ``slice_index`` of W + scale * C * U * R.

    ``y = x (W_l + scale (C*U*R)_l)ᵀ + bias``, by way of the factors: no W_eff is built unless it is
    given as ``effective``. The gradient reaches ``core`` and ``x``.

    Args:
        x: ``[..., n2]``, dtype of the weight.
        weight: ``[slices * n1, n2]``: one slice, or several consecutive ones from ``slice_index``
            on (a fused q, k, v projection is three). Frozen.
        bias: ``[slices * n1]`` or None. Frozen.
        factors: frozen C and R.
        core: U, ``[n3, r, r]``.
        slice_index: first slice, 0 … n3 - slices.
        scale: alpha.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        effective: these slices of W_eff for this very core, ``[slices * n1, n2]``, if they are at
            hand (`materialize`): the product is then one matrix product, and the factors serve the
            gradient of the core alone.

    Returns:
        ``[..., slices * n1]``, dtype of ``x``.
    """
    _check_core(core, factors)
    _check_floating("x", x)
    _check_floating("weight", weight)
    _check_frozen("weight", weight)
    n1, n2 = factors.n1, factors.n2
    if weight.ndim != 2 or weight.shape[1] != n2 or weight.shape[0] % n1 or weight.shape[0] == 0:
        raise ValueError(
            f"weight: expected [slices * {n1}, {n2}] for these factors, got {list(weight.shape)}"
        )
    if x.ndim < 1 or x.shape[-1] != n2:
        raise ValueError(f"x: expected [..., {n2}], got {list(x.shape)}")
    _check_dtype("x", x, weight.dtype)
    _check_precision("weight", weight, factors)
    for name, tensor in (("x", x), ("weight", weight)):
        _check_device(name, tensor, factors.device)
    if bias is not None:
        _check_frozen("bias", bias)
        _check_dtype("bias", bias, weight.dtype)
        _check_device("bias", bias, factors.device)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    slices = weight.shape[0] // n1
    _check_slice(slice_index, slices, factors.n3)
    if effective is not None:
        _check_frozen("effective", effective)
        _check_dtype("effective", effective, x.dtype)
        if effective.shape != weight.shape:
            raise ValueError(
                f"effective: expected {list(weight.shape)}, got {list(effective.shape)}"
            )
        weight = effective
    op = ops.operator("cur_linear", _language(backend, factors.device))
    y: Tensor = op(
        x,
        weight,
        bias,
        *_packed(factors),
        core,
        slice_index,
        slices,
        float(scale),
        effective is not None,
        False,
    )
    return y


def build_info() -> dict[str, Any]:
    """What was compiled and what of it runs here.

    Keys: ``version``, ``torch``, ``backends`` (those that run here), ``cpu`` (compiler, torch
    target, instruction sets compiled, runnable and chosen) and ``cuda`` (architectures, or
    "not built").
    """
    from . import __version__

    cpu = _native.cpu_facts()
    return {
        "version": __version__,
        "torch": torch.__version__,
        "backends": ["reference"] + (["cpu"] if cpu["built"] else []),
        "cpu": cpu,
        "cuda": "not built",
    }


def _language(backend: str, device: torch.device) -> str:
    """Language of the operators for a backend name; see `ops.LANGUAGES`."""
    if backend == "reference":
        return "reference"
    if backend == "auto":
        native = device.type == "cpu" and _native.cpu_error() is None
        return "" if native else "reference"
    if backend == "cpu":
        if device.type != "cpu":
            raise ValueError(f"backend: expected one for tensors on {device}, got 'cpu'")
        if _native.cpu_error() is not None:
            raise RuntimeError(
                f"backend: 'cpu' is not built here ({_native.cpu_error()}); install the package "
                "with a C++17 compiler: pip install --no-build-isolation ."
            )
        return ""
    if backend in BACKENDS:
        raise RuntimeError(
            f"backend: '{backend}' is not built: this version has no {backend} kernels; use "
            "'auto', 'cpu' or 'reference'"
        )
    raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def _packed(factors: CURFactors) -> tuple[Tensor, Tensor]:
    return factors.lateral_hat, factors.horizontal_hat


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")


def _check_frozen(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(
            f"{name}: expected a frozen tensor, got requires_grad=True; only the core is trained"
        )


def _check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")


def _check_precision(name: str, weight: Tensor, factors: CURFactors) -> None:
    if weight.dtype == torch.float64 and factors.dtype != torch.float64:
        raise TypeError(
            f"{name}: expected at most the precision of fp32 factors, got torch.float64"
        )


def _check_core(core: Tensor, factors: CURFactors) -> None:
    if not isinstance(factors, CURFactors):
        raise TypeError(f"factors: expected CURFactors, got {type(factors).__name__}")
    _check_floating("core", core)
    shape = (factors.n3, factors.rank, factors.rank)
    if core.shape != shape:
        raise ValueError(f"core: expected {list(shape)}, got {list(core.shape)}")
    _check_dtype("core", core, factors.dtype)
    _check_device("core", core, factors.device)


def _check_weights(weight: Tensor | Sequence[Tensor], factors: CURFactors) -> list[Tensor]:
    n1, n2, n3 = factors.n1, factors.n2, factors.n3
    if isinstance(weight, Tensor):
        weights, shape = [weight], [n3, n1, n2]
    else:
        weights, shape = list(weight), [n1, n2]
        if len(weights) != n3:
            raise ValueError(f"weight: expected {n3} tensors [{n1}, {n2}], got {len(weights)}")
    for tensor in weights:
        _check_floating("weight", tensor)
        _check_frozen("weight", tensor)
        if list(tensor.shape) != shape:
            raise ValueError(f"weight: expected {shape}, got {list(tensor.shape)}")
        _check_dtype("weight", tensor, weights[0].dtype)
        _check_device("weight", tensor, factors.device)
    _check_precision("weight", weights[0], factors)
    return weights


def _check_out(out: Tensor, out_dtype: torch.dtype | None, factors: CURFactors) -> None:
    _check_floating("out", out)
    shape = (factors.n3, factors.n1, factors.n2)
    if out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous {list(shape)}, got {list(out.shape)}")
    if out_dtype is not None:
        _check_dtype("out", out, out_dtype)
    _check_device("out", out, factors.device)


def _check_slice(slice_index: int, slices: int, n3: int) -> None:
    if isinstance(slice_index, bool) or not isinstance(slice_index, int):
        raise TypeError(f"slice_index: expected an int, got {type(slice_index).__name__}")
    if not 0 <= slice_index <= n3 - slices:
        raise ValueError(
            f"slice_index: expected 0 to {n3 - slices} for {slices} of {n3} slices, "
            f"got {slice_index}"
        )
