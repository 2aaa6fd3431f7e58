"""What every operator refuses: sizes, dtypes and devices of its arguments that do not fit together.

`functional` has refused them already, in the words of its own arguments. These checks are for those
who call the operators directly: the reference, Triton's kernels and the fakes all make them.
``csrc/common/check.h`` states the same for compiled kernels. A language may refuse more, such as a
precision or a length that it does not have.

Sizes of traced graphs may be symbols. What is not known of them is taken to fit, because a guard on
it would compile a graph anew; the kernel looks again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..contract import (
    CoreGradDense,
    CoreGradTokens,
    CoreOfPacked,
    CurLinear,
    Materialize,
    MaterializeOut,
    WEffLinear,
)
from ..factors import check_device, check_dtype, check_floating, check_floating_dtype
from .spectra import compute_dtype

#: Dtypes of packed factors.
_FACTORS = (torch.float32, torch.float64, torch.bfloat16)


def check_materialize(a: Materialize) -> None:
    """Refuses arguments of ``materialize`` that do not fit.

    Raises:
        TypeError, ValueError: a dtype, or a shape or device, is wrong.
    """
    n3, n1, n2 = _check_stack(a)
    check_floating_dtype("out_dtype", a.out_dtype)
    if a.weights and a.weights[0].ndim == 3:
        _check_count(a.weights, 1)
        _check_shape("weights", a.weights[0], [n3, n1, n2])
        return
    if a.weights:
        _check_count(a.weights, n3)
    for weight in a.weights:
        _check_shape("weights", weight, [n1, n2])


def check_materialize_out(a: MaterializeOut) -> None:
    """The same for ``materialize_out``, whose weights may hold slices side by side."""
    n3, n1, n2 = _check_stack(a)
    _check_strided("out", a.out, a.core)
    check_floating("out", a.out)
    is_flat = False
    if a.weights and a.weights[0].ndim == 3:
        _check_count(a.weights, 1)
        _check_shape("weights", a.weights[0], [n3, n1, n2])
    elif a.weights:
        for weight in a.weights:
            count = weight.shape[1] // n2 if weight.ndim == 2 else 0
            if _is_false(count >= 1) or _is_false(weight.shape[1] % n2 == 0):
                expected = f"[{n1}, slices * {n2}]"
                raise ValueError(f"weights: expected {expected}, got {list(weight.shape)}")
            _check_shape("weights", weight, [n1, weight.shape[1]])
        slices = sum(weight.shape[1] // n2 for weight in a.weights)
        if _is_false(slices == n3):
            raise ValueError(f"weights: expected {n3} slices together, got {slices}")
        is_flat = len(a.weights) < n3
    _check_shape("out", a.out, [n3 * n1 * n2] if is_flat else [n3, n1, n2])
    if not a.out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {a.out.stride()}")


def check_core_grad_dense(a: CoreGradDense) -> None:
    """Refuses arguments of ``core_grad_dense`` that do not fit."""
    if a.grad.ndim != 3:
        raise ValueError(f"grad: expected [n3, n1, n2], got {list(a.grad.shape)}")
    n1, n2, _ = _check_packed(a.lateral_hat, a.horizontal_hat, a.grad.shape[0])
    _check_panels(a.panels, a.lateral_hat)
    _check_element("grad", a.grad, a.lateral_hat)
    _check_shape("grad", a.grad, [a.grad.shape[0], n1, n2])


def check_core_grad_tokens(a: CoreGradTokens) -> None:
    """Refuses arguments of ``core_grad_tokens`` that do not fit."""
    n1, n2, _ = _check_packed(a.lateral_hat, a.horizontal_hat, a.n3)
    _check_operands(a.lateral_hat, a.bf16_operands)
    _check_slices(a.slice_index, a.slices, a.n3)
    tokens = _check_tokens("x", a.x, n2, a.lateral_hat)
    if a.grad_y is None:
        if a.adapter_ids is not None:
            raise ValueError(
                "adapter_ids: expected None without grad_y, which adapter_ids goes with: by the "
                "factors, without a dense gradient; got ids"
            )
        if _is_false(a.slices == 1) or _is_false(tokens == n1):
            raise ValueError(f"x: expected [{n1}, {n2}], one slice of G, without grad_y, got "
                             f"{list(a.x.shape)} and {a.slices} slices")  # fmt: skip
    else:
        others = _check_tokens("grad_y", a.grad_y, a.slices * n1, a.lateral_hat)
        if _is_false(others == tokens):
            raise ValueError(f"grad_y: expected the {tokens} tokens of x, got {others}")
    if a.packed and a.adapter_ids is not None:
        raise ValueError(
            "packed: expected False with adapter_ids, got True (adapter_ids goes without packed "
            "gradients)"
        )
    if _is_false(a.adapters >= 0):
        raise ValueError(f"adapters: expected a number of cores, got {a.adapters}")
    _check_ids(a.adapter_ids, tokens, a.lateral_hat, a.adapters)


def check_core_of_packed(a: CoreOfPacked) -> None:
    """Refuses arguments of ``core_of_packed`` that do not fit."""
    shape = list(a.packed.shape)
    if len(shape) != 4 or _is_false(shape[1] >= 1) or _is_false(shape[2] >= 1):
        raise ValueError(f"packed: expected [m, n3, rank, rank], got {shape}")
    _check_strided("packed", a.packed, a.packed)
    _check_shape("packed", a.packed, [*shape[:3], shape[2]])
    if a.packed.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"packed: expected float32 or float64, got {a.packed.dtype}")


def check_cur_linear(a: CurLinear) -> None:
    """Refuses arguments of ``cur_linear`` that do not fit."""
    if a.adapter_ids is not None and a.dense_grad:
        raise ValueError(
            "adapter_ids: expected None with dense_grad, got ids (adapter_ids goes by the "
            "factors, without a dense gradient)"
        )
    _check_linear(a, "weight", a.weight, a.adapter_ids)


def check_w_eff_linear(a: WEffLinear) -> None:
    """Refuses arguments of ``w_eff_linear`` that do not fit."""
    _check_linear(a, "w_eff", a.w_eff, None)


# -- what they have in common


def _check_stack(a: Materialize | MaterializeOut) -> tuple[int, int, int]:
    """Checks the factors, the core and the dtypes of the weights; returns (n3, n1, n2)."""
    if a.core.ndim != 3:
        raise ValueError(f"core: expected [n3, rank, rank], got {list(a.core.shape)}")
    n3 = a.core.shape[0]
    n1, n2, rank = _check_packed(a.lateral_hat, a.horizontal_hat, n3)
    _check_core(a.core, [n3, rank, rank], a.lateral_hat)
    _check_panels(a.panels, a.lateral_hat)
    for weight in a.weights:
        _check_element("weights", weight, a.lateral_hat)
        check_dtype("weights", weight, a.weights[0].dtype)
    return n3, n1, n2


def _check_linear(
    a: CurLinear | WEffLinear, name: str, weight: Tensor | None, adapter_ids: Tensor | None
) -> None:
    """Checks a layer, whose matrix has this name."""
    is_many = adapter_ids is not None
    if a.core.ndim != 3 + is_many:
        n3, rank = a.core.shape[-3:-1] if a.core.ndim > 2 else ("n3", "rank")
        one = f"{n3}, {rank}, {rank}"
        expected = f"[{one}], or [adapters, {one}] with adapter_ids"
        raise ValueError(f"core: expected {expected}, got {list(a.core.shape)}")
    n3 = a.core.shape[-3]
    n1, n2, rank = _check_packed(a.lateral_hat, a.horizontal_hat, n3)
    _check_operands(a.lateral_hat, a.bf16_operands)
    _check_core(a.core, [*a.core.shape[:-3], n3, rank, rank], a.lateral_hat)
    _check_slices(a.slice_index, a.slices, n3)
    rows = a.slices * n1
    tokens = _check_tokens("x", a.x, rows if a.transposed else n2, a.lateral_hat)
    if a.bias is not None and (weight is None or a.transposed):
        raise ValueError("bias: expected None without a weight or in a transposed map, got one")
    if weight is not None:
        _check_strided(name, weight, a.lateral_hat)
        _check_shape(name, weight, [rows, n2])
        check_dtype(name, weight, a.x.dtype)
    if a.bias is not None:
        _check_strided("bias", a.bias, a.lateral_hat)
        _check_shape("bias", a.bias, [rows])
        check_dtype("bias", a.bias, a.x.dtype)
    if a.z is not None:
        if a.transposed:
            raise ValueError("z: expected None in a transposed map, got one")
        _check_element("z", a.z, a.lateral_hat)
        _check_shape("z", a.z, [*a.x.shape[:-1], n3 * rank])
    _check_ids(adapter_ids, tokens, a.lateral_hat, a.core.shape[0])


def _check_packed(
    lateral_hat: Tensor, horizontal_hat: Tensor | None, n3: int
) -> tuple[int, int, int]:
    """Checks the packed factors; returns (n1, n2, rank). Without R̂, n2 is n3 * rank."""
    if _is_false(n3 >= 1):
        raise ValueError(f"n3: expected at least one slice, got {n3}")
    shape = list(lateral_hat.shape)
    fits = len(shape) == 2 and not any(map(_is_false, (shape[0] >= 1, shape[1] >= 1)))
    if not fits or _is_false(shape[1] % n3 == 0):
        raise ValueError(f"lateral_hat: expected [n1, {n3} * rank] with no empty axis, got {shape}")
    _check_strided("lateral_hat", lateral_hat, lateral_hat)
    if lateral_hat.dtype not in _FACTORS:
        raise TypeError(
            f"lateral_hat: expected float32, float64 or bfloat16, got {lateral_hat.dtype}"
        )
    n1, q = shape
    if horizontal_hat is None:
        return n1, q, q // n3
    across = list(horizontal_hat.shape)
    if len(across) != 2 or _is_false(across[0] == q) or _is_false(across[1] >= 1):
        raise ValueError(f"horizontal_hat: expected [{q}, n2] with no empty axis, got {across}")
    _check_strided("horizontal_hat", horizontal_hat, lateral_hat)
    check_dtype("horizontal_hat", horizontal_hat, lateral_hat.dtype)
    return n1, across[1], q // n3


def _check_panels(panels: Tensor | None, lateral_hat: Tensor) -> None:
    """Their sizes are the kernels' own; on meta they would make a result without numbers."""
    if panels is not None:
        _check_strided("panels", panels, lateral_hat)


def _check_operands(lateral_hat: Tensor, bf16_operands: bool) -> None:
    if bf16_operands and lateral_hat.dtype != torch.float32:
        raise TypeError(
            f"lateral_hat: expected float32 with bf16_operands, got {lateral_hat.dtype}"
        )


def _check_core(core: Tensor, shape: Sequence[int], lateral_hat: Tensor) -> None:
    _check_strided("core", core, lateral_hat)
    _check_shape("core", core, shape)
    check_dtype("core", core, compute_dtype(lateral_hat))


def _check_slices(slice_index: int, slices: int, n3: int) -> None:
    fits = slices >= 1 and slice_index >= 0
    if not fits or _is_false(slices <= n3) or _is_false(slice_index <= n3 - slices):
        raise ValueError(
            f"slice_index: expected 0 to {n3 - slices} for {slices} of {n3} slices, "
            f"got {slice_index}"
        )


def _check_tokens(name: str, tensor: Tensor, width: int, lateral_hat: Tensor) -> int:
    """Checks tokens ``[..., width]``; returns how many there are."""
    if tensor.ndim < 1 or _is_false(tensor.shape[-1] == width):
        raise ValueError(f"{name}: expected [..., {width}], got {list(tensor.shape)}")
    _check_element(name, tensor, lateral_hat)
    return math.prod(tensor.shape[:-1])


def _check_ids(adapter_ids: Tensor | None, tokens: int, lateral_hat: Tensor, cores: int) -> None:
    if adapter_ids is None:
        return
    _check_strided("adapter_ids", adapter_ids, lateral_hat)
    rows = adapter_ids.shape[0] if adapter_ids.ndim == 1 else -1
    is_whole = tokens == 0 if _is_false(rows != 0) else tokens % rows == 0
    if adapter_ids.dtype != torch.int64 or _is_false(rows >= 0) or _is_false(is_whole):
        raise ValueError(
            f"adapter_ids: expected int64 for rows of equal length of {tokens} tokens, "
            f"got {adapter_ids.dtype} {list(adapter_ids.shape)}"
        )
    if _is_false(cores >= 1) and _is_false(rows == 0):
        raise ValueError(f"adapter_ids: expected no ids without cores, got {rows} out of range")


def _check_element(name: str, tensor: Tensor, like: Tensor) -> None:
    """Refuses numbers that kernels do not read, or that are elsewhere."""
    check_floating(name, tensor)
    _check_strided(name, tensor, like)


def _check_strided(name: str, tensor: Tensor, like: Tensor) -> None:
    """Refuses a tensor of another device, or without strides."""
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a strided tensor, got layout {tensor.layout}")
    check_device(name, tensor, like.device)


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    found = list(tensor.shape)
    differs = any(_is_false(a == b) for a, b in zip(found, shape, strict=False))
    if len(found) != len(shape) or differs:
        raise ValueError(f"{name}: expected {list(shape)}, got {found}")


def _check_count(weights: Sequence[Tensor], count: int) -> None:
    if _is_false(len(weights) == count):
        raise ValueError(f"weights: expected {count} tensors, got {len(weights)}")


def _is_false(condition: Any) -> bool:
    """Whether a condition is known not to hold; of symbols it is not known."""
    return condition is False
