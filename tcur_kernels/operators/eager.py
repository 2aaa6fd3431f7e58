"""A layer of a stack in eager mode: one node of autograd, without checks.

The values and derivatives are those of the operators. The node saves time on the host, because the
autograd of `torch.library` takes as long as the rest of a layer. `functional.prepare` checks once
what is the same in every call of a layer. The stack checks what changes from call to call. Traced
graphs go through the operators instead. What functorch or forward mode transforms goes through
plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from ..autocast import without_autocast as without_autocast
from . import bf16_products, contract
from .contract import CurLinear, WEffLinear
from .core_gradient import core_gradient
from .factors import CURFactors, Precision
from .gradient_sum import Ending, GradientSum
from .guards import kernels_alone, without_views


def is_traced() -> bool:
    """Whether a compiler, a tracer or a transform of functions looks at what runs."""
    return (
        torch.compiler.is_compiling()
        or is_transformed()
        or torch._C._get_tracing_state() is not None
    )


def is_transformed() -> bool:
    """Whether functorch or forward mode transforms what runs, for which operators have no rules."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _nothing() -> None:
    """The default of `Call.on_gradient`."""


class Call:
    """What all calls of one layer have in common: factors, slices, operators.

    Args:
        factors: frozen C and R.
        precision: of the products with them.
        slice_index, slices: of the layer.
        language: of the operators. If it has no kernel of an operator, the reference is taken.

    Attributes:
        lateral_hat, horizontal_hat: packed factors in that precision.
        bf16_operands: whether they hold bf16 in fp32; see `contract`.
        ending: what the gradient of the whole core is computed with.
        on_gradient: called when a gradient of the core is formed.
    """

    __slots__ = (
        "bf16_operands",
        "core_grad_tokens",
        "cur_linear",
        "ending",
        "horizontal_hat",
        "lateral_hat",
        "on_gradient",
        "slice_index",
        "slices",
        "w_eff_linear",
    )

    def __init__(
        self,
        factors: CURFactors,
        precision: Precision,
        slice_index: int,
        slices: int,
        language: str,
    ) -> None:
        self.lateral_hat, self.horizontal_hat = factors.packed(precision)
        self.bf16_operands = factors.bf16_operands(precision)
        self.slice_index, self.slices = slice_index, slices
        self.on_gradient: Callable[[], None] = _nothing
        device = factors.device
        self.cur_linear = contract.nearest("cur_linear", language, device)
        self.w_eff_linear = contract.nearest("w_eff_linear", language, device)
        self.core_grad_tokens = contract.nearest("core_grad_tokens", language, device)
        self.ending = Ending(
            contract.nearest("core_of_packed", language, device),
            contract.nearest("core_grad_dense", language, device),
            factors,
        )


def project(x: Tensor, horizontal_hat: Tensor, bf16_operands: bool) -> Tensor:
    """z = x R̂ᵀ in the dtype of the factors, or in bf16 if they hold bf16 in fp32."""
    if bf16_operands:
        return F.linear(bf16_products.rounded(x), horizontal_hat).to(torch.bfloat16)
    return F.linear(x.to(horizontal_hat.dtype), horizontal_hat)


class Way(NamedTuple):
    """How a layer's product is formed; ``weight`` is what that way takes.

    Attributes:
        value: the result.
        grad_x: the gradient of the tokens.
        grad_x_again: the same, to be differentiated again.
    """

    value: Callable[[Call, Tensor, Any, Tensor | None, Tensor, float, Any, Any], Tensor]
    grad_x: Callable[[Call, Tensor, Any, Tensor, float, Tensor | None], Tensor]
    grad_x_again: Callable[[Call, Tensor, Any, Tensor, float, Tensor | None], Tensor]


def run_layer(
    call: Call,
    way: Way,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    core: Tensor,
    scale: float,
    *,
    z: Tensor | None,
    dense_grad: bool,
    adapter_ids: Tensor | None,
    gradient_sum: GradientSum | None,
) -> Tensor:
    """A layer on the slices of ``call``; arguments as for `functional.cur_linear`, all fitting.

    Args:
        way: `BY_FACTORS`; `BY_W_EFF`: ``weight`` is then W_eff, not the base; or `BY_UPDATE`:
            ``weight`` is None.
        gradient_sum: that of ``core``, or None: the gradient reaches ``core`` from here.
    """
    if torch.is_grad_enabled() and (x.requires_grad or core.requires_grad):
        addend = None if gradient_sum is None else gradient_sum.addends[call.slice_index]
        # Inside a tuple, z is not an input of the node. Otherwise this backward would run through
        # z's own graph and free it, and other layers that share z need it later.
        how = (call, way, scale, dense_grad)
        y: Tensor = _apply(x, core, (z,), weight, bias, adapter_ids, addend, gradient_sum, *how)
        return y
    return way.value(call, x, weight, bias, core, scale, z, adapter_ids)


def _forward(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    core: Tensor,
    scale: float,
    z: Tensor | None,
    adapter_ids: Tensor | None,
) -> CurLinear:
    """The arguments of a forward map by the factors; without ``weight`` of the update alone."""
    return CurLinear(
        x=x,
        weight=weight,
        bias=bias,
        lateral_hat=call.lateral_hat,
        horizontal_hat=call.horizontal_hat,
        core=core,
        slice_index=call.slice_index,
        slices=call.slices,
        scale=scale,
        transposed=False,
        z=z,
        adapter_ids=adapter_ids,
        bf16_operands=call.bf16_operands,
    )


def _value_by_factors(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    core: Tensor,
    scale: float,
    z: Tensor | None,
    adapter_ids: Tensor | None,
) -> Tensor:
    is_half = x.dtype in contract.HALVES
    own, added = (None, None) if is_half else (weight, bias)
    arguments = _forward(call, x, own, added, core, scale, z, adapter_ids)
    with kernels_alone():
        y: Tensor = call.cur_linear(*arguments)
        if not is_half:
            return y
        return added_to_product(x, weight, y if bias is None else _dithered(y, bias))


def _grad_x_by_factors(
    call: Call,
    grad_y: Tensor,
    weight: Tensor | None,
    core: Tensor,
    scale: float,
    adapter_ids: Tensor | None,
) -> Tensor:
    arguments = CurLinear(
        x=grad_y,
        weight=weight,
        bias=None,
        lateral_hat=call.lateral_hat,
        horizontal_hat=call.horizontal_hat,
        core=core,
        slice_index=call.slice_index,
        slices=call.slices,
        scale=scale,
        transposed=True,
        adapter_ids=adapter_ids,
        bf16_operands=call.bf16_operands,
    )
    grad_x: Tensor = call.cur_linear(*arguments)
    return grad_x


def _update_alone(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    core: Tensor,
    scale: float,
    z: Tensor | None,
    adapter_ids: Tensor | None,
) -> Tensor:
    arguments = _forward(call, x, None, None, core, scale, z, adapter_ids)
    with kernels_alone():
        update: Tensor = call.cur_linear(*arguments)
    return update


def _value_by_w_eff(
    call: Call,
    x: Tensor,
    w_eff: Tensor,
    bias: Tensor | None,
    core: Tensor,
    scale: float,
    z: Tensor | None,
    adapter_ids: Tensor | None,
) -> Tensor:
    with without_views():
        return F.linear(x, w_eff, bias)


def _grad_x_by_w_eff(
    call: Call,
    grad_y: Tensor,
    w_eff: Tensor,
    core: Tensor,
    scale: float,
    adapter_ids: Tensor | None,
) -> Tensor:
    return grad_y @ w_eff


def _grad_x_again_by_w_eff(
    call: Call,
    grad_y: Tensor,
    w_eff: Tensor,
    core: Tensor,
    scale: float,
    adapter_ids: Tensor | None,
) -> Tensor:
    arguments = WEffLinear(
        x=grad_y,
        w_eff=w_eff,
        bias=None,
        lateral_hat=call.lateral_hat,
        horizontal_hat=call.horizontal_hat,
        core=core,
        slice_index=call.slice_index,
        slices=call.slices,
        scale=scale,
        transposed=True,
        bf16_operands=call.bf16_operands,
    )
    grad_x: Tensor = call.w_eff_linear(*arguments)
    return grad_x


BY_FACTORS = Way(_value_by_factors, _grad_x_by_factors, _grad_x_by_factors)
#: The update without the product of the base weight, which is given as None.
BY_UPDATE = Way(_update_alone, _grad_x_by_factors, _grad_x_by_factors)
BY_W_EFF = Way(_value_by_w_eff, _grad_x_by_w_eff, _grad_x_again_by_w_eff)


class _Layer(torch.autograd.Function):
    """The node: the gradient reaches ``x`` and ``core``, or in place of that its ``addend``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        core: Tensor,
        held: tuple[Tensor | None],
        weight: Tensor | None,
        bias: Tensor | None,
        adapter_ids: Tensor | None,
        addend: Tensor | None,
        gradient_sum: GradientSum | None,
        call: Call,
        way: Way,
        scale: float,
        dense_grad: bool,
    ) -> Tensor:
        needs_x, needs_core, *_ = ctx.needs_input_grad
        (z,) = held
        ctx.save_for_backward(
            x if needs_core and z is None else None,
            z if needs_core else None,
            weight if needs_x else None,
            core,
            adapter_ids,
        )
        ctx.how = (call, way, scale, dense_grad)
        ctx.gradient_sum = gradient_sum  # alive for as long as this node is
        return way.value(call, x, weight, bias, core, scale, z, adapter_ids)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: checkpointing allows no second look
        needs_x, needs_core, *_ = ctx.needs_input_grad
        args = (needs_x, needs_core, saved, ctx.how, grad_y)
        grad_core = grad_addend = None
        if torch.is_grad_enabled():  # to be differentiated again, which the operators can be
            grad_x, grad_core = _gradients(*args, again=True, gradient_sum=None)
        else:
            with kernels_alone():
                grad_x, grad = _gradients(*args, again=False, gradient_sum=ctx.gradient_sum)
            grad_core, grad_addend = (grad, None) if ctx.gradient_sum is None else (None, grad)
        return (grad_x, grad_core, *[None] * 4, grad_addend, *[None] * 5)


def _gradients(
    needs_x: bool,
    needs_core: bool,
    saved: tuple[Any, ...],
    how: tuple[Call, Way, float, bool],
    grad_y: Tensor,
    again: bool,
    gradient_sum: GradientSum | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the core; of the latter, what goes to the node of ``gradient_sum``."""
    x, z, weight, core, adapter_ids = saved
    call, way, scale, dense_grad = how
    grad_x = grad_core = None
    if needs_x:
        form = way.grad_x_again if again else way.grad_x
        grad_x = form(call, grad_y, weight, core, scale, adapter_ids)
    if needs_core:
        call.on_gradient()
        # G of all layers takes the memory of W_eff, so only where that was spent already.
        gathering = gradient_sum if dense_grad and way is BY_W_EFF else None
        if gathering is not None and gathering.gather(grad_y, x, call.slice_index):
            return grad_x, None
        grad_core = core_gradient(
            call.core_grad_tokens,
            x=x,
            z=z,
            grad_y=grad_y,
            lateral_hat=call.lateral_hat,
            horizontal_hat=call.horizontal_hat,
            core=core,
            slice_index=call.slice_index,
            slices=call.slices,
            dense_grad=dense_grad,
            adapter_ids=adapter_ids,
            packed=gradient_sum is not None,
            bf16_operands=call.bf16_operands,
        )
        if scale != 1.0 and gradient_sum is None:
            grad_core = scale * grad_core
    return grad_x, grad_core


#: Without the wrapper for functorch, whose transforms do not come here.
_apply = super(torch.autograd.Function, _Layer).apply


def added_to_product(x: Tensor, weight: Tensor, added: Tensor) -> Tensor:
    """``x weightᵀ + added`` in 16 bits, where a small update in ``added`` must not be lost.

    Added to a product that is rounded already, an update below half a unit in the last place is
    lost nearly always. Added within the product it decides on the rounding, and survives in the
    mean.
    """
    tokens = math.prod(x.shape[:-1])
    addend = added.reshape(tokens, added.shape[-1])
    y = torch.addmm(addend, x.reshape(tokens, x.shape[-1]), weight.mT)
    # Autograd must not take this for a view of y, so that the caller may change it in place.
    result: Tensor = torch.ops.aten._unsafe_view.default(y, added.shape)
    return result


class Dithered(torch.autograd.Function):
    """``update + bias`` rounded up or down so that the mean stays; a bias alone stays as it is.

    The noise is a hash of the sum, so the result is a function of the input: checkpointing
    and every process get the same.
    """

    @staticmethod
    def forward(update: Tensor, bias: Tensor) -> Tensor:
        """The sum in fp32, noise below the last bit that is kept, the rest cut off."""
        return _dithered(update, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is needed: the derivative is one."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """As if the sum were exact."""
        return grad, None


def added_to_rounded(product: Tensor, update: Tensor) -> Tensor:
    """``product + update`` for a product that is rounded already; rounded once more, to its dtype.

    In 16 bits the sum is rounded up or down so that the mean stays, as in `Dithered`. Where the
    update is zero, the product stays as it is, bit for bit, also if it is a negative zero.
    """
    if is_traced():
        return _added_by_torch(product, update)
    if not (torch.is_grad_enabled() and (product.requires_grad or update.requires_grad)):
        return _added(product, update)
    added: Tensor = _apply_added(product, update)
    return added


class _AddedToRounded(torch.autograd.Function):
    """The node of `added_to_rounded`: its derivatives are those of an exact sum."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, update: Tensor) -> Tensor:
        ctx.dtypes = product.dtype, update.dtype
        return _added(product, update)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        own, other = ctx.dtypes
        return grad.to(own), grad.to(other)


#: Without the wrapper for functorch, as `_apply`.
_apply_added = super(torch.autograd.Function, _AddedToRounded).apply


def _added(product: Tensor, update: Tensor) -> Tensor:
    total = product.to(_wide(product, update)) + update
    if product.dtype in contract.HALVES:
        total = _cut(total.float(), product.dtype)
    return torch.where(update == 0, product, total.to(product.dtype))


def _wide(product: Tensor, update: Tensor) -> torch.dtype:
    """The dtype that a sum of these is formed in."""
    return torch.promote_types(product.dtype, torch.promote_types(update.dtype, torch.float32))


def _added_by_torch(product: Tensor, update: Tensor) -> Tensor:
    """`added_to_rounded` as compilers can trace and functorch can transform it."""
    total = product.to(_wide(product, update)) + update
    fixed = total.detach()
    kept = fixed.to(product.dtype)
    if product.dtype in contract.HALVES:
        kept = _cut(fixed.float().clone(), product.dtype)
    kept = torch.where(update.detach() == 0, product.detach(), kept)
    # Zero, with the derivative of the sum; subtracted, because -0.0 + 0.0 would be 0.0.
    exact = torch.where(fixed.isfinite(), fixed - total, 0.0)
    return kept - exact.to(product.dtype)


def dithered_by_torch(update: Tensor, bias: Tensor) -> Tensor:
    """What `Dithered` computes, as functorch and forward mode can transform it."""
    total = update.float() + bias
    fixed = total.detach()
    rounded = _cut(fixed.clone(), update.dtype)
    # Zero, with the derivative of the sum; what overflows stays as it is.
    exact = torch.where(fixed.isfinite(), total - fixed, 0.0)
    return rounded + exact.to(update.dtype)


def _dithered(update: Tensor, bias: Tensor) -> Tensor:
    # In place: each step is a launch, none need be more.
    return _cut(update.float().add_(bias), update.dtype)


def _cut(total: Tensor, dtype: torch.dtype) -> Tensor:
    """``total``, fp32, rounded by noise below the last bit of ``dtype``; overwrites it."""
    dropped = 16 if dtype == torch.bfloat16 else 13
    mask = (1 << dropped) - 1
    bits = total.view(torch.int32)
    noise = (bits * 0x2C1B3C6D).bitwise_right_shift_(32 - dropped).bitwise_and_(mask)
    bits.add_(noise).bitwise_and_(~mask)
    return total.to(dtype)
