"""Registers the kernels as operators: ``tcur::<name>_triton``, and ``tcur::<name>_triton_tf32``.

The second family multiplies fp32 numbers as TF32. Each operator is a `torch.library.triton_op`, so
`torch.compile` sees the launches inside it. ``materialize_out`` is the exception. Its kernel needs
the addresses of the weights of separate layers. These addresses exist when a graph runs, but not
while it is traced. So ``materialize_out`` is an opaque operator: a compiled graph calls it as a
whole, with real tensors. ``materialize`` calls it for weights of separate layers. In Triton's
interpreter there is no compiled kernel to trace, so all operators are opaque.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from .. import contract
from ..contract import Materialize, MaterializeOut
from . import core_grad_dense, core_grad_tokens, core_of_packed, cur_linear, materialize
from .products import product_kernel

#: Whether kernels run in Triton's interpreter, on the CPU. Triton decides it when it is imported.
INTERPRETED = not isinstance(product_kernel, JITFunction)


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Returns a context in which the tensor's device is the current one.

    Triton launches on the current device, whatever device its arguments are on. Every kernel is
    launched within this context. A compiled graph has a guard of its own.
    """
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def _add(name: str, language: str, run: Callable[[Any], Tensor | None], opaque: bool) -> None:
    """Defines an operator of the contract in a language, with ``run`` as its kernel."""
    entry = contract.OPERATORS[name]
    checked = contract.checked(entry, run)

    def kernel(*args: Any) -> Tensor | None:
        arguments = entry.arguments(*args)
        with _device_of(next(each for each in arguments if isinstance(each, Tensor))):
            return checked(arguments)

    # `triton_op` infers a schema from the signature, and ignores the one it is given (torch 2.13).
    kernel.__signature__ = contract.signature_of(entry.arguments)  # type: ignore[attr-defined]
    register = torch.library.custom_op if opaque or INTERPRETED else torch.library.triton_op
    written = contract.written_by(entry.arguments)
    qualified = contract.qualified(name, language)
    register(qualified, kernel, mutates_args=written, schema=entry.schema)


def _define(language: str, precision: str) -> None:
    run = partial(materialize.run, precision=precision)

    def into_new_memory(a: Materialize) -> Tensor:
        shape = (a.core.shape[0], a.lateral_hat.shape[0], a.horizontal_hat.shape[1])
        out = a.core.new_empty(shape, dtype=a.out_dtype)
        written = MaterializeOut(*a[:5], out)
        if len(a.weights) > 0 and a.weights[0].ndim == 2:
            contract.operator("materialize_out", language)(*written)
        else:
            run(written)
        return out

    _add("materialize_out", language, run, opaque=True)
    _add("materialize", language, into_new_memory, opaque=False)
    for module in (core_grad_dense, core_grad_tokens, core_of_packed, cur_linear):
        name = module.__name__.rpartition(".")[2]
        _add(name, language, partial(module.run, precision=precision), opaque=False)
    contract.complete(language)


for _language, _precision in (("triton", "ieee"), ("triton_tf32", "tf32")):
    _define(_language, _precision)
