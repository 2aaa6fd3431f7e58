"""Computes the gradient of a core by one layer, from z, from x, or from G = dyᵀx; and G itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .contract import HALVES, CoreGradTokens

#: How many tokens are converted to fp32 at a time.
_BLOCK = 4096


def core_gradient(
    core_grad_tokens: torch._ops.OpOverload,
    *,
    x: Tensor | None,
    z: Tensor | None,
    grad_y: Tensor,
    lateral_hat: Tensor,
    horizontal_hat: Tensor,
    core: Tensor,
    slice_index: int,
    slices: int,
    dense_grad: bool,
    adapter_ids: Tensor | None = None,
    packed: bool = False,
    bf16_operands: bool = False,
) -> Tensor:
    """Computes the gradient of ``core`` by a layer of scale 1.

    It uses z if that is given, dyᵀx with ``dense_grad``, and x otherwise. ``x`` may be None if z is
    given. Other arguments are those of the operator `core_grad_tokens`.
    """
    tokens = x if z is None else z
    assert tokens is not None
    a = CoreGradTokens(
        x=tokens,
        grad_y=grad_y,
        lateral_hat=lateral_hat,
        horizontal_hat=horizontal_hat if z is None else None,
        n3=core.shape[-3],
        slice_index=slice_index,
        slices=slices,
        adapter_ids=adapter_ids,
        adapters=1 if adapter_ids is None else core.shape[0],
        packed=packed,
        bf16_operands=bf16_operands,
    )
    if dense_grad and z is None:
        return _by_dense_gradient(core_grad_tokens, a, grad_y)
    grad: Tensor = core_grad_tokens(*a)
    return grad


def _by_dense_gradient(
    core_grad_tokens: torch._ops.OpOverload, a: CoreGradTokens, grad_y: Tensor
) -> Tensor:
    count = math.prod(a.x.shape[:-1])
    tokens, grads = (t.reshape(count, t.shape[-1]) for t in (a.x, grad_y))
    if a.lateral_hat.dtype == torch.float64:  # as the products of tokens with factors are
        tokens, grads = tokens.double(), grads.double()
    total = _sum_over_tokens(grads, tokens)
    each = total.view(a.slices, total.shape[0] // a.slices, total.shape[1])
    parts = [
        core_grad_tokens(
            *a._replace(x=each[s], grad_y=None, slice_index=a.slice_index + s, slices=1)
        )
        for s in range(a.slices)
    ]
    return parts[0] if a.slices == 1 else torch.stack(parts).sum(0)


def _sum_over_tokens(grads: Tensor, tokens: Tensor) -> Tensor:
    """Computes G = dyᵀx. Sums 16-bit tokens in fp32, since their dtype may overflow."""
    if tokens.dtype not in HALVES:
        return grads.mT @ tokens
    is_recorded = torch.is_grad_enabled() and (grads.requires_grad or tokens.requires_grad)
    if is_recorded or torch.compiler.is_compiling():
        return grads.float().mT @ tokens.float()
    if tokens.numel() and tokens.device.type == "cuda" and torch.version.hip is None:
        return torch.mm(grads.mT, tokens, out_dtype=torch.float32)
    # Other devices have no product of 16-bit tokens with a result in fp32. Copies of all tokens in
    # fp32 may not fit into memory, so they are made in blocks.
    total = tokens.new_zeros(grads.shape[1], tokens.shape[1], dtype=torch.float32)
    for some_grads, some in zip(grads.split(_BLOCK), tokens.split(_BLOCK), strict=True):
        total = total + some_grads.float().mT @ some.float()  # no +=: may be batched by vmap
    return total


def add_over_tokens(total: Tensor, grad_y: Tensor, x: Tensor, *, is_first: bool) -> None:
    """Adds G = dyᵀx to ``total``, or overwrites it; sums 16-bit tokens in fp32."""
    count = math.prod(x.shape[:-1])
    grads, tokens = (t.reshape(count, t.shape[-1]) for t in (grad_y, x))
    if tokens.dtype in HALVES and tokens.device.type == "cuda":
        part = _sum_over_tokens(grads, tokens)
        total.copy_(part) if is_first else total.add_(part)
        return
    size = max(1, count) if tokens.dtype == total.dtype else _BLOCK
    for some_grads, some in zip(grads.split(size), tokens.split(size), strict=True):
        # With a beta of 0, what was in the memory does not count, not even NaN.
        beta = 0.0 if is_first else 1.0
        total.addmm_(some_grads.to(total.dtype).mT, some.to(total.dtype), beta=beta)
        is_first = False
