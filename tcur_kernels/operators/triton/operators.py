"""Registers the kernels as operators: ``tcur::<name>_triton``, and ``tcur::<name>_triton_tf32``.

The second family multiplies fp32 numbers as TF32. Each is a `torch.library.triton_op`, so that
`torch.compile` sees the launches and not a black box. The one thing it cannot see through are
weights of separate layers: the kernel needs their addresses, which exist when the graph runs and
not when it is traced. They go by ``materialize_out``, an opaque operator, which a compiled graph
calls with real tensors. In Triton's interpreter there is no kernel to trace, and all operators are
opaque.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from .. import contract
from . import core_grad_dense, core_grad_tokens, core_of_packed, cur_linear, materialize
from .products import product_kernel

#: Whether kernels run in Triton's interpreter, on the CPU. Triton decides when it is imported.
INTERPRETED = not isinstance(product_kernel, JITFunction)


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's device the current one: that is where Triton launches, whatever it is given.

    All launches are made under it, here and nowhere else. A compiled graph has a guard of its own.
    """
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def _define(language: str, precision: str) -> None:
    operator = torch.library.custom_op if INTERPRETED else torch.library.triton_op

    def qualified(name: str) -> str:
        return f"tcur::{name}_{language}"

    @torch.library.custom_op(qualified("materialize_out"), mutates_args=("out",))
    def materialize_out(
        weights: Sequence[Tensor],
        lateral_hat: Tensor,
        horizontal_hat: Tensor,
        core: Tensor,
        scale: float,
        out: Tensor,
    ) -> None:
        with _device_of(out):
            materialize.run(weights, lateral_hat, horizontal_hat, core, scale, out, precision)

    @operator(qualified("materialize"), mutates_args=())
    def _materialize(
        weights: Sequence[Tensor],
        lateral_hat: Tensor,
        horizontal_hat: Tensor,
        core: Tensor,
        scale: float,
        out_dtype: torch.dtype,
    ) -> Tensor:
        shape = (core.shape[0], lateral_hat.shape[0], horizontal_hat.shape[1])
        out = core.new_empty(shape, dtype=out_dtype)
        args = (weights, lateral_hat, horizontal_hat, core, scale, out)
        if len(weights) > 0 and weights[0].ndim == 2:
            materialize_out(*args)
        else:
            with _device_of(out):
                materialize.run(*args, precision)
        return out

    @operator(qualified("core_grad_dense"), mutates_args=())
    def _core_grad_dense(grad: Tensor, lateral_hat: Tensor, horizontal_hat: Tensor) -> Tensor:
        with _device_of(grad):
            return core_grad_dense.run(grad, lateral_hat, horizontal_hat, precision)

    @operator(qualified("core_grad_tokens"), mutates_args=())
    def _core_grad_tokens(
        x: Tensor,
        grad_y: Tensor | None,
        lateral_hat: Tensor,
        horizontal_hat: Tensor | None,
        n3: int,
        slice_index: int,
        slices: int,
        adapter_ids: Tensor | None = None,
        adapters: int = 1,
        packed: bool = False,
    ) -> Tensor:
        with _device_of(x):
            return core_grad_tokens.run(
                x,
                grad_y,
                lateral_hat,
                horizontal_hat,
                n3,
                slice_index,
                slices,
                adapter_ids,
                adapters,
                packed,
                precision,
            )

    @operator(qualified("core_of_packed"), mutates_args=())
    def _core_of_packed(packed: Tensor, scale: float) -> Tensor:
        with _device_of(packed):
            return core_of_packed.run(packed, scale)

    @operator(qualified("cur_linear"), mutates_args=())
    def _cur_linear(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lateral_hat: Tensor,
        horizontal_hat: Tensor,
        core: Tensor,
        slice_index: int,
        slices: int,
        scale: float,
        materialized: bool,
        transposed: bool,
        z: Tensor | None = None,
        dense_grad: bool = False,
        adapter_ids: Tensor | None = None,
    ) -> Tensor:
        with _device_of(x):
            return cur_linear.run(
                x,
                weight,
                bias,
                lateral_hat,
                horizontal_hat,
                core,
                slice_index,
                slices,
                scale,
                materialized,
                transposed,
                z,
                adapter_ids,
                precision,
            )

    contract.complete(language)


for _language, _precision in (("triton", "ieee"), ("triton_tf32", "tf32")):
    _define(_language, _precision)
