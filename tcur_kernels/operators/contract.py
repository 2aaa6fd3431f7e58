"""The operators of namespace ``tcur``: schemas, fakes, derivatives, and the reference kernels.

Every operator exists once per language: ``tcur::name``, whose kernels are compiled and chosen by
the device of the tensors, and ``tcur::name_reference``, plain torch for any device. The contract is
stated once and holds for each of them. (Overloads of one name would say it better, but torch 2.13
aborts at exit when a library that defined several is torn down.)

======================  ==========================================================================
``materialize``         W_eff = W + scale C*U*R for all slices; no weights: the product alone
``core_grad_dense``     its adjoint: G -> Cᵀ*G*Rᵀ
``core_grad_tokens``    the same from tokens of one or more consecutive slices
``core_of_packed``      packed ∂Û of several layers -> the gradient that they make together
``cur_linear``          consecutive slices of W_eff as a linear map, or its transpose
======================  ==========================================================================

``materialize_out`` is ``materialize`` into a buffer, without a derivative. It alone takes layers
that hold several consecutive slices side by side, [n1, slices * n2], as GPT-2's fused projection
does: where any does, ``out`` is flat, n3 * n1 * n2 numbers, the matrices of W_eff one after the
other, each of the shape of its layer's weight.

Factors travel as packed half spectra: ``lateral_hat`` [n1, q] and ``horizontal_hat`` [q, n2] with
q = n3 * rank, column ``plane * rank + a`` (`reference.pack` gives the order of the planes), fp32 or
fp64; the core has their dtype. The operators on tokens take them in bf16 too: the projections
z = x R̂ᵀ and p = dy Ĉ are then products in that precision, and the core stays fp32. Only the core,
``x`` and gradients are differentiable, and the operators are closed under differentiation: the
derivative of each is made of the others. Packed gradients are the exception: ``core_grad_tokens``
with ``packed`` and ``core_of_packed`` are for a backward that nobody differentiates, and say so
where somebody does.

``core_grad_tokens`` without ``horizontal_hat`` takes z [..., q] for ``x``; without ``grad_y`` it
takes one slice of G = dyᵀx, the n1 rows of which are its tokens. ``cur_linear`` takes z where it is
at hand: a forward map by the factors starts from it, and the gradient of the core needs z alone, so
``x`` is not kept. ``dense_grad`` says to form that gradient by way of G instead of the tokens.

With ``adapter_ids``, int64 [B], ``cur_linear`` has a core per token: ``core`` is [A, n3, r, r], the
flattened tokens of ``x`` are B rows of equal length, and token t goes by core
``adapter_ids[t // (tokens / B)]``. ``core_grad_tokens`` returns [adapters, n3, r, r], each core
the sum over its own tokens, in an order that ids and sizes alone determine. That is the factored
way; ``materialized`` and ``dense_grad`` are refused with it.

With ``packed``, ``core_grad_tokens`` returns ∂Û [n3, r, r] as real planes (`reference.pack`), not
transformed back: ∂Û of a stack's layers add up, and ``core_of_packed`` ends the sum, once.
``adapter_ids`` is refused with it.

Nothing is imported here but torch, the reference, and what autocast and the counter of operations
ask for: no Triton, no compiled library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..autocast import keys, outside_autocast
from . import flops, reference

_library = torch.library.Library("tcur", "DEF")

#: Suffix of the operators of each language; "" are those whose kernels are compiled. Those of
#: Triton are defined, under the same contract, when the subpackage ``triton`` is imported.
LANGUAGES = ("", "reference")
#: Compiled for CUDA alone: operands of the products that make C * U * R rounded to TF32.
CUDA_TF32 = "cuda_tf32"

#: Dtypes whose sums are formed in fp32.
HALVES = (torch.bfloat16, torch.float16)

#: Autograd's notes of what is a view.
VIEWS = keys("ADInplaceOrView")

#: Tokens that are widened to fp32 together.
_BLOCK = 4096

_SCHEMAS = {
    "materialize": (
        "(Tensor[] weights, Tensor lateral_hat, Tensor horizontal_hat, Tensor core, float scale,"
        " ScalarType out_dtype) -> Tensor"
    ),
    "core_grad_dense": "(Tensor grad, Tensor lateral_hat, Tensor horizontal_hat) -> Tensor",
    "core_grad_tokens": (
        "(Tensor x, Tensor? grad_y, Tensor lateral_hat, Tensor? horizontal_hat, int n3,"
        " int slice_index, int slices, Tensor? adapter_ids=None, SymInt adapters=1,"
        " bool packed=False) -> Tensor"
    ),
    "core_of_packed": "(Tensor packed, float scale) -> Tensor",
    "cur_linear": (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor lateral_hat, Tensor horizontal_hat,"
        " Tensor core, int slice_index, int slices, float scale, bool materialized,"
        " bool transposed, Tensor? z=None, bool dense_grad=False, Tensor? adapter_ids=None)"
        " -> Tensor"
    ),
}
_OUT_SCHEMA = (
    "(Tensor[] weights, Tensor lateral_hat, Tensor horizontal_hat, Tensor core, float scale, *,"
    " Tensor(a!) out) -> ()"
)


def _full_name(name: str, language: str) -> str:
    return f"{name}_{language}" if language else name


def _qualified(name: str, language: str) -> str:
    return f"tcur::{_full_name(name, language)}"


def operator(name: str, language: str = "") -> torch._ops.OpOverload:
    """The registered operator ``tcur::name`` in one language."""
    found: torch._ops.OpOverload = getattr(torch.ops.tcur, _full_name(name, language)).default
    return found


def _compute_dtype(factor: Tensor) -> torch.dtype:
    """dtype of a core and its gradient, which is fp32 for factors in bf16."""
    return torch.promote_types(factor.dtype, torch.float32)


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def plain(name: str) -> Callable[..., Any]:
    """An operator as plain torch, which functorch and forward mode can transform.

    Its derivatives are those of the mathematics: z and ``dense_grad`` change nothing, and W_eff
    handed over would hide the core.
    """
    return _REFERENCE[name]


# -- fakes


def _materialize_fake(
    weights: Sequence[Tensor],
    lateral_hat: Tensor,
    horizontal_hat: Tensor,
    core: Tensor,
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    shape = (core.shape[0], lateral_hat.shape[0], horizontal_hat.shape[1])
    return core.new_empty(shape, dtype=out_dtype)


def _core_grad_dense_fake(grad: Tensor, lateral_hat: Tensor, horizontal_hat: Tensor) -> Tensor:
    n3 = grad.shape[0]
    rank = lateral_hat.shape[1] // n3
    return lateral_hat.new_empty((n3, rank, rank), dtype=_compute_dtype(lateral_hat))


def _core_grad_tokens_fake(
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
    rank = lateral_hat.shape[1] // n3
    shape = (n3, rank, rank) if adapter_ids is None else (adapters, n3, rank, rank)
    return lateral_hat.new_empty(shape, dtype=_compute_dtype(lateral_hat))


def _core_of_packed_fake(packed: Tensor, scale: float) -> Tensor:
    return packed.new_empty(packed.shape[1:])


def _cur_linear_fake(
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
    features = horizontal_hat.shape[1] if transposed else slices * lateral_hat.shape[0]
    return x.new_empty((*x.shape[:-1], features))


# -- reference kernels


def _refuse_with_ids(adapter_ids: Tensor | None, what: str) -> None:
    if adapter_ids is not None:
        raise RuntimeError(f"tcur: adapter_ids goes by the factors, without {what}")


def _spectra(lateral_hat: Tensor, horizontal_hat: Tensor | None, n3: int) -> tuple[Tensor, Tensor]:
    """Packed factors -> half spectra [K, n1, r] and [K, r, n2]."""
    n1, q = lateral_hat.shape
    if horizontal_hat is None:
        horizontal_hat = _identity(q, lateral_hat)
    dtype = _compute_dtype(lateral_hat)
    lateral_hat, horizontal_hat = lateral_hat.to(dtype), horizontal_hat.to(dtype)
    lateral = lateral_hat.reshape(n1, n3, q // n3).movedim(0, 1)
    horizontal = horizontal_hat.reshape(n3, q // n3, horizontal_hat.shape[1])
    return reference.unpack(lateral), reference.unpack(horizontal)


def _stacked(weights: Sequence[Tensor]) -> Tensor | None:
    if not weights:
        return None
    return weights[0] if weights[0].ndim == 3 else torch.stack(list(weights))


def _materialize_reference(
    weights: Sequence[Tensor],
    lateral_hat: Tensor,
    horizontal_hat: Tensor,
    core: Tensor,
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    spectra = _spectra(lateral_hat, horizontal_hat, core.shape[0])
    w_eff = reference.materialize(_stacked(weights), *spectra, core, scale)
    return w_eff.to(out_dtype)


def _materialize_reference_out(
    weights: Sequence[Tensor],
    lateral_hat: Tensor,
    horizontal_hat: Tensor,
    core: Tensor,
    scale: float,
    *,
    out: Tensor,
) -> None:
    factors, n3 = (lateral_hat, horizontal_hat, core, scale), core.shape[0]
    if not weights or weights[0].ndim == 3 or len(weights) == n3:
        out.copy_(_materialize_reference(weights, *factors, out.dtype))
        return
    each = [weight.split(horizontal_hat.shape[1], 1) for weight in weights]
    w_eff = _materialize_reference([part for parts in each for part in parts], *factors, out.dtype)
    if out.shape != (w_eff.numel(),):
        raise RuntimeError(f"tcur: out must be flat, [{w_eff.numel()}], got {list(out.shape)}")
    matrices = [torch.cat([*part], 1).flatten() for part in w_eff.split([*map(len, each)])]
    out.copy_(torch.cat(matrices))


def _core_grad_dense_reference(grad: Tensor, lateral_hat: Tensor, horizontal_hat: Tensor) -> Tensor:
    spectra = _spectra(lateral_hat, horizontal_hat, grad.shape[0])
    return reference.core_grad_dense(grad.to(lateral_hat.dtype), *spectra)


def _core_grad_tokens_reference(
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
    if packed and adapter_ids is not None:
        raise RuntimeError("tcur: adapter_ids goes without packed gradients")
    spectra = _spectra(lateral_hat, horizontal_hat, n3)
    if grad_y is None:
        _refuse_with_ids(adapter_ids, "a dense gradient")
        grad_y = _identity(lateral_hat.shape[0], x)
    where = (n3, slice_index, slices)
    return reference.core_grad_tokens(x, grad_y, *spectra, *where, adapter_ids, adapters, packed)


def _core_of_packed_reference(packed: Tensor, scale: float) -> Tensor:
    return reference.core_of_packed(packed, scale)


def _cur_linear_reference(
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
    base: Tensor | None = None
    if weight is not None:
        base = x @ weight if transposed else torch.nn.functional.linear(x, weight, bias)
    if materialized or dense_grad:
        _refuse_with_ids(adapter_ids, "W_eff or a dense gradient")
    if materialized:
        assert base is not None
        return base
    spectra = _spectra(lateral_hat, horizontal_hat, core.shape[-3])
    apply = reference.slice_update_transposed if transposed else reference.slice_update
    update = apply(x, *spectra, core, slice_index, slices, scale, adapter_ids)
    if base is None:
        return update.to(x.dtype)
    return (base.to(update.dtype) + update).to(base.dtype)


# -- derivatives


def _register_materialize_autograd(language: str) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weights, lateral_hat, horizontal_hat, _, scale, _ = inputs
        ctx.save_for_backward(lateral_hat, horizontal_hat)
        ctx.scale = scale
        ctx.n_weights = len(weights)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        core_grad = operator("core_grad_dense", language)(grad, *ctx.saved_tensors)
        return [None] * ctx.n_weights, None, None, ctx.scale * core_grad, None, None

    torch.library.register_autograd(
        _qualified("materialize", language), backward, setup_context=setup_context, lib=_library
    )


def _register_core_grad_dense_autograd(language: str) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, lateral_hat, horizontal_hat = inputs
        ctx.save_for_backward(lateral_hat, horizontal_hat)
        ctx.dtype = grad.dtype

    def backward(ctx: Any, grad_core: Tensor) -> tuple[Any, ...]:
        product = operator("materialize", language)
        return product([], *ctx.saved_tensors, grad_core, 1.0, ctx.dtype), None, None

    torch.library.register_autograd(
        _qualified("core_grad_dense", language),
        backward,
        setup_context=setup_context,
        lib=_library,
    )


def _register_core_grad_tokens_autograd(language: str) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, grad_y, lateral_hat, horizontal_hat, _, *where, adapter_ids, _, ctx.packed = inputs
        ctx.save_for_backward(x, grad_y, lateral_hat, horizontal_hat, adapter_ids)
        ctx.where = where
        ctx.dtype = None if grad_y is None else grad_y.dtype

    def backward(ctx: Any, grad_core: Tensor) -> tuple[Any, ...]:
        if ctx.packed:
            raise _no_derivative()
        x, grad_y, lateral_hat, horizontal_hat, adapter_ids = ctx.saved_tensors
        if horizontal_hat is None:
            horizontal_hat = _identity(lateral_hat.shape[1], lateral_hat)
        if grad_y is None:
            grad_y = _identity(lateral_hat.shape[0], x)
        update = operator("cur_linear", language)

        def apply(tokens: Tensor, transposed: bool) -> Tensor:
            factors = (lateral_hat, horizontal_hat, grad_core)
            how = (*ctx.where, 1.0, False, transposed, None, False, adapter_ids)
            return update(tokens, None, None, *factors, *how)

        grad_x = apply(grad_y, True).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_grad_y = apply(x, False).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return (grad_x, grad_grad_y, *[None] * 8)

    torch.library.register_autograd(
        _qualified("core_grad_tokens", language),
        backward,
        setup_context=setup_context,
        lib=_library,
    )


def _no_derivative() -> RuntimeError:
    return RuntimeError(
        "tcur: packed gradients cannot be differentiated; core_grad_tokens with packed=False can"
    )


def _register_core_of_packed_autograd(language: str) -> None:
    def backward(ctx: Any, grad_core: Tensor) -> tuple[Any, ...]:
        raise _no_derivative()

    torch.library.register_autograd(_qualified("core_of_packed", language), backward, lib=_library)


def core_gradient(
    core_grad_tokens: torch._ops.OpOverload,
    x: Tensor | None,
    z: Tensor | None,
    grad_y: Tensor,
    lateral_hat: Tensor,
    horizontal_hat: Tensor,
    core: Tensor,
    slice_index: int,
    slices: int,
    dense: bool,
    adapter_ids: Tensor | None,
    packed: bool = False,
) -> Tensor:
    """The gradient of ``core`` by a layer of scale 1: from z, from x, or ``dense`` from dyᵀx.

    ``packed``: what of it `core_grad_tokens` returns then.
    """
    n3, first = core.shape[-3], slice_index
    where = (n3, first, slices)
    ids = (adapter_ids, 1 if adapter_ids is None else core.shape[0], packed)
    grad: Tensor
    if z is not None:
        grad = core_grad_tokens(z, grad_y, lateral_hat, None, *where, *ids)
        return grad
    assert x is not None
    if not dense:
        grad = core_grad_tokens(x, grad_y, lateral_hat, horizontal_hat, *where, *ids)
        return grad
    count = math.prod(x.shape[:-1])
    tokens, grads = (t.reshape(count, t.shape[-1]) for t in (x, grad_y))
    total = _sum_over_tokens(grads, tokens)
    each = total.view(slices, total.shape[0] // slices, total.shape[1])
    parts = [
        core_grad_tokens(each[s], None, lateral_hat, horizontal_hat, n3, first + s, 1, *ids)
        for s in range(slices)
    ]
    return parts[0] if slices == 1 else torch.stack(parts).sum(0)


def _sum_over_tokens(grads: Tensor, tokens: Tensor) -> Tensor:
    """G = dyᵀx, in fp32 for tokens in 16 bits, whose own dtype loses digits or overflows."""
    if tokens.dtype not in HALVES:
        return grads.mT @ tokens
    is_recorded = torch.is_grad_enabled() and (grads.requires_grad or tokens.requires_grad)
    if is_recorded or torch.compiler.is_compiling():
        return grads.float().mT @ tokens.float()
    if tokens.numel() and tokens.device.type == "cuda" and torch.version.hip is None:
        return torch.mm(grads.mT, tokens, out_dtype=torch.float32)
    # No other device has such a product. Copies of all tokens in fp32 may be more than there is
    # memory for.
    total = tokens.new_zeros(grads.shape[1], tokens.shape[1], dtype=torch.float32)
    for some_grads, some in zip(grads.split(_BLOCK), tokens.split(_BLOCK), strict=True):
        total = total + some_grads.float().mT @ some.float()  # not in place: may be a batch
    return total


def _register_cur_linear_autograd(language: str) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, lateral_hat, horizontal_hat, core, *rest = inputs
        *rest, z, ctx.dense_grad, adapter_ids = rest
        # x only serves the gradient of the core, and the core only that of x (by W_eff otherwise).
        needs_x, needs_core = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        ctx.save_for_backward(
            x if needs_core and z is None else None,
            z if needs_core else None,
            weight if needs_x else None,
            lateral_hat,
            horizontal_hat,
            core,
            adapter_ids,
        )
        ctx.slice_index, ctx.slices, ctx.scale, ctx.materialized, ctx.transposed = rest
        ctx.dtype = x.dtype

    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        # Once: checkpointing allows no second look.
        x, z, weight, lateral_hat, horizontal_hat, core, adapter_ids = ctx.saved_tensors
        grad_x = grad_core = None
        if ctx.needs_input_grad[0]:
            grad_x = operator("cur_linear", language)(
                grad_y,
                weight,
                None,
                lateral_hat,
                horizontal_hat,
                core,
                ctx.slice_index,
                ctx.slices,
                ctx.scale,
                ctx.materialized,
                not ctx.transposed,
                None,
                False,
                adapter_ids,
            ).to(ctx.dtype)
        if ctx.needs_input_grad[5]:
            tokens, grads = (grad_y, x) if ctx.transposed and z is None else (x, grad_y)
            grad_core = ctx.scale * core_gradient(
                operator("core_grad_tokens", language),
                tokens,
                z,
                grads,
                lateral_hat,
                horizontal_hat,
                core,
                ctx.slice_index,
                ctx.slices,
                ctx.dense_grad,
                adapter_ids,
            )
        return (grad_x, *[None] * 4, grad_core, *[None] * 8)

    torch.library.register_autograd(
        _qualified("cur_linear", language), backward, setup_context=setup_context, lib=_library
    )


# -- registration


def _register_autocast(name: str, language: str) -> None:
    """An operator decides its own precision: autocast must not reach the products inside it."""

    def decided(device: torch.device) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with outside_autocast(device):
                return operator(name, language)(*args, **kwargs)

        return call

    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(_full_name(name, language), decided(torch.device(device_type)), key)


def _register_fresh_results(name: str, language: str) -> None:
    """Results are no views of what a kernel made, so that they may be changed in place.

    The products of torch within a kernel return views of their own results, of which autograd
    would take note.
    """

    def call(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(VIEWS):
            return operator(name, language)(*args)

    _library.impl(_full_name(name, language), call, "ADInplaceOrView")


_FAKES: dict[str, Callable[..., Any]] = {
    "materialize": _materialize_fake,
    "core_grad_dense": _core_grad_dense_fake,
    "core_grad_tokens": _core_grad_tokens_fake,
    "core_of_packed": _core_of_packed_fake,
    "cur_linear": _cur_linear_fake,
    "materialize_out": lambda *args, **kwargs: None,
}
_REFERENCE: dict[str, Callable[..., Any]] = {
    "materialize": _materialize_reference,
    "core_grad_dense": _core_grad_dense_reference,
    "core_grad_tokens": _core_grad_tokens_reference,
    "core_of_packed": _core_of_packed_reference,
    "cur_linear": _cur_linear_reference,
    "materialize_out": _materialize_reference_out,
}
_AUTOGRAD: dict[str, Callable[[str], None]] = {
    "materialize": _register_materialize_autograd,
    "core_grad_dense": _register_core_grad_dense_autograd,
    "core_grad_tokens": _register_core_grad_tokens_autograd,
    "core_of_packed": _register_core_of_packed_autograd,
    "cur_linear": _register_cur_linear_autograd,
}


def complete(language: str) -> None:
    """Gives the operators of a language, defined already, their fakes, derivatives, autocast."""
    for name, fake in _FAKES.items():
        torch.library.register_fake(_qualified(name, language), fake, lib=_library)
        _register_autocast(name, language)
        flops.count(name, operator(name, language).overloadpacket)
    _register_fresh_results("cur_linear", language)
    for register_autograd in _AUTOGRAD.values():
        register_autograd(language)


def _register_all() -> None:
    schemas = {**_SCHEMAS, "materialize_out": _OUT_SCHEMA}
    for language in (*LANGUAGES, CUDA_TF32):
        for name, schema in schemas.items():
            torch.library.define(_qualified(name, language), schema, lib=_library)
        complete(language)
    for name, kernel in _REFERENCE.items():
        _library.impl(f"{name}_reference", kernel, "CompositeExplicitAutograd")


_register_all()
