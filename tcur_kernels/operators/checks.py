"""Checks of the arguments of `functional`: shapes, dtypes, devices, and what must be frozen.

Every error names the argument, what was expected and what was given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from . import eager
from .factors import CURFactors, check_device, check_dtype, check_floating, check_frozen


def _check_width(name: str, weight: Tensor, factors: CURFactors) -> None:
    if weight.dtype == torch.float64 and factors.dtype != torch.float64:
        raise TypeError(
            f"{name}: expected at most the precision of fp32 factors, got torch.float64"
        )


def check_factors(factors: CURFactors) -> None:
    """Refuses anything but `CURFactors`."""
    if not isinstance(factors, CURFactors):
        raise TypeError(f"factors: expected CURFactors, got {type(factors).__name__}")


def check_core(core: Tensor, factors: CURFactors) -> None:
    """Refuses a core that is not ``[n3, r, r]`` for these factors."""
    check_factors(factors)
    check_floating("core", core)
    shape = (factors.n3, factors.rank, factors.rank)
    if core.shape != shape:
        raise ValueError(f"core: expected {list(shape)}, got {list(core.shape)}")
    check_dtype("core", core, factors.dtype)
    check_device("core", core, factors.device)


def check_cores(cores: Tensor, factors: CURFactors, adapter_ids: Tensor) -> None:
    """Refuses cores that are not ``[A, n3, r, r]`` for these factors, and ids that do not fit.

    Ids must be int64 ``[B]`` on the device of the factors, each from 0 to A - 1.
    """
    check_factors(factors)
    check_floating("core", cores)
    shape = [factors.n3, factors.rank, factors.rank]
    if cores.ndim != 4 or list(cores.shape[1:]) != shape:
        expected = ", ".join(map(str, ["adapters", *shape]))
        raise ValueError(f"core: expected [{expected}], got {list(cores.shape)}")
    check_dtype("core", cores, factors.dtype)
    check_device("core", cores, factors.device)
    check_adapter_ids(adapter_ids, cores.shape[0], factors.device)


def check_nested(
    x: Tensor, factors: CURFactors, z: Tensor | None, adapter_ids: Tensor | None
) -> None:
    """Refuses nested tensors of the old layout, and arguments that need rows of equal length."""
    if x.layout != torch.jagged:
        raise ValueError(f"x: expected layout torch.jagged of a nested tensor, got {x.layout}")
    if x.shape[-1] != factors.n2:  # that may be the axis whose length differs from row to row
        raise ValueError(f"x: expected [..., {factors.n2}], got {list(x.shape)}")
    for name, given in (("z", z), ("adapter_ids", adapter_ids)):
        if given is not None:
            raise ValueError(f"{name}: expected None with a nested x, got a tensor")


def check_x(x: Tensor, factors: CURFactors, width: int | None = None) -> None:
    """Refuses tokens that are not ``[..., width]``, by default ``[..., n2]``."""
    width = factors.n2 if width is None else width
    if x.ndim < 1 or x.shape[-1] != width:
        raise ValueError(f"x: expected [..., {width}], got {list(x.shape)}")


def check_effective(effective: Tensor, weight: Tensor, x: Tensor) -> None:
    """Refuses a W_eff that is not frozen, or not of the shape of the weight."""
    check_floating("effective", effective)
    check_frozen("effective", effective)
    check_dtype("effective", effective, x.dtype)
    check_device("effective", effective, x.device)
    if effective.shape != weight.shape:
        raise ValueError(f"effective: expected {list(weight.shape)}, got {list(effective.shape)}")


def check_z(z: Tensor, x: Tensor, factors: CURFactors) -> None:
    """Refuses a z that is not ``[..., n3 * r]`` with as many tokens as ``x``."""
    check_floating("z", z)
    check_device("z", z, x.device)
    shape = (*x.shape[:-1], factors.n3 * factors.rank)
    if z.shape != shape:
        raise ValueError(f"z: expected {list(shape)}, got {list(z.shape)}")


def check_rows(adapter_ids: Tensor, x: Tensor) -> None:
    """Refuses ids if the tokens of ``x`` cannot be divided into as many rows."""
    if x.ndim:
        rows, tokens = adapter_ids.shape[0], math.prod(x.shape[:-1])
        if tokens % rows if rows else tokens:
            raise ValueError(
                f"adapter_ids: expected as many as x {list(x.shape)} has rows, got {rows}"
            )


def check_adapter_ids(
    adapter_ids: Tensor, adapters: int, device: torch.device, least: int = 0
) -> None:
    """Refuses anything but int64 ``[B]`` on this device, each from ``least`` to adapters - 1."""
    if not isinstance(adapter_ids, Tensor):
        raise TypeError(f"adapter_ids: expected a torch.Tensor, got {type(adapter_ids).__name__}")
    check_dtype("adapter_ids", adapter_ids, torch.int64)
    if adapter_ids.ndim != 1:
        raise ValueError(f"adapter_ids: expected [B], got {list(adapter_ids.shape)}")
    check_device("adapter_ids", adapter_ids, device)
    # On other devices, looking at the values would wait for the device. Under tracing there are
    # no values.
    if adapter_ids.device.type != "cpu" or eager.is_traced():
        return
    if adapter_ids.numel() and not least <= adapter_ids.min() <= adapter_ids.max() < adapters:
        base = " (no adapter)" if least < 0 else ""
        raise ValueError(
            f"adapter_ids: expected {least}{base} to {adapters - 1} for {adapters} cores, got "
            f"{adapter_ids.min()} to {adapter_ids.max()}"
        )


def check_weights(
    weight: Tensor | Sequence[Tensor], factors: CURFactors, beside: bool
) -> list[Tensor]:
    """Returns the weights as a list, after checking them.

    With ``beside``, a tensor may hold several slices side by side.
    """
    n1, n2, n3 = factors.n1, factors.n2, factors.n3
    if isinstance(weight, Tensor):
        weights, shape = [weight], [n3, n1, n2]
    else:
        if not isinstance(weight, Sequence):
            got = type(weight).__name__
            raise TypeError(f"weight: expected a tensor or a list of tensors, got {got}")
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
    _check_width("weight", weights[0], factors)
    return weights


def check_out(
    out: Tensor, out_dtype: torch.dtype | None, factors: CURFactors, is_flat: bool
) -> None:
    """Refuses a buffer that cannot hold W_eff.

    With ``is_flat`` it must be flat, for matrices one after the other.
    """
    check_floating("out", out)
    shape: tuple[int, ...] = (factors.n3, factors.n1, factors.n2)
    if is_flat:
        shape = (math.prod(shape),)
    if out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous {list(shape)}, got {list(out.shape)}")
    if out_dtype is not None:
        check_dtype("out", out, out_dtype)
    check_device("out", out, factors.device)


def check_layer(weight: Tensor, bias: Tensor | None, factors: CURFactors, slice_index: int) -> int:
    """Returns how many slices a layer has. Refuses one that is not frozen or does not fit."""
    check_floating("weight", weight)
    check_frozen("weight", weight)
    n1, n2 = factors.n1, factors.n2
    if weight.ndim != 2 or weight.shape[1] != n2 or weight.shape[0] % n1 or weight.shape[0] == 0:
        raise ValueError(
            f"weight: expected [slices * {n1}, {n2}] for these factors, got {list(weight.shape)}"
        )
    _check_width("weight", weight, factors)
    check_device("weight", weight, factors.device)
    if bias is not None:
        check_floating("bias", bias)
        check_frozen("bias", bias)
        check_dtype("bias", bias, weight.dtype)
        check_device("bias", bias, factors.device)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    slices = weight.shape[0] // n1
    check_slice(slice_index, slices, factors.n3)
    return slices


def check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: CURFactors,
    core: Tensor,
    slice_index: int,
    scale: float,
    *,
    effective: Tensor | None,
    z: Tensor | None,
    dense_grad: bool,
    adapter_ids: Tensor | None,
) -> int:
    """Returns how many slices the layer has. Refuses what `functional.cur_linear` cannot do."""
    if adapter_ids is None:
        check_core(core, factors)
    else:
        check_cores(core, factors, adapter_ids)
        check_rows(adapter_ids, x)
    slices = check_layer(weight, bias, factors, slice_index)
    check_scale(scale)
    check_x(x, factors)
    check_dtype("x", x, weight.dtype)
    check_device("x", x, factors.device)
    if effective is not None:
        check_effective(effective, weight, x)
    if z is not None:
        check_z(z, x, factors)
        if dense_grad:
            raise ValueError("dense_grad: expected False where z is given, got True")
    if adapter_ids is not None and (effective is not None or dense_grad):
        raise ValueError(
            "adapter_ids: expected None with effective or dense_grad, which have one core, got ids"
        )
    return slices


def check_update(
    x: Tensor,
    factors: CURFactors,
    core: Tensor,
    slice_index: int,
    slices: int,
    scale: float,
    adapter_ids: Tensor | None,
    transposed: bool,
) -> None:
    """Refuses what `functional.update_linear` cannot do."""
    if adapter_ids is None:
        check_core(core, factors)
    else:
        check_cores(core, factors, adapter_ids)
        check_rows(adapter_ids, x)
    check_slices(slices, factors.n3)
    check_slice(slice_index, slices, factors.n3)
    check_scale(scale)
    check_x(x, factors, slices * factors.n1 if transposed else factors.n2)
    _check_width("x", x, factors)
    check_device("x", x, factors.device)


def check_scale(scale: float) -> None:
    """Refuses a tensor, and a number that is not finite."""
    if isinstance(scale, Tensor):  # no gradient would reach it
        raise TypeError("scale: expected a number, got a torch.Tensor")
    if not torch.compiler.is_compiling():
        check_finite("scale", scale)


def check_finite(name: str, number: float) -> float:
    """Returns a number as a float; refuses what is none, and what is not finite."""
    if not isinstance(number, Real | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
    try:
        found = float(number)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{name}: expected a finite number, got {str(number)[:30]}")
    return found


def check_slices(slices: int, n3: int) -> None:
    """Refuses a number of slices that is not 1 … n3."""
    if isinstance(slices, bool) or not isinstance(slices, int):
        raise TypeError(f"slices: expected an int, got {type(slices).__name__}")
    if not 1 <= slices <= n3:
        raise ValueError(f"slices: expected 1 to {n3}, got {slices}")


def check_slice(slice_index: int, slices: int, n3: int) -> None:
    """Refuses slices that are not all within 0 … n3 - 1."""
    if isinstance(slice_index, bool) or not isinstance(slice_index, int):
        raise TypeError(f"slice_index: expected an int, got {type(slice_index).__name__}")
    if not 0 <= slice_index <= n3 - slices:
        raise ValueError(
            f"slice_index: expected 0 to {n3 - slices} for {slices} of {n3} slices, "
            f"got {slice_index}"
        )
