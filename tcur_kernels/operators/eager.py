"""A layer of a stack in eager mode: one node of autograd, without checks.

The values and derivatives are those of the operators. The node saves time on the host, because the
autograd of `torch.library` takes as long as the rest of a layer. `functional.prepare` checks once
what is the same in every call of a layer. The stack checks what changes from call to call. Traced
graphs go through the operators instead. What functorch or forward mode transforms goes through
plain torch.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from ..autocast import AUTOCAST, keys
from ..autocast import without_autocast as without_autocast
from . import contract, streams
from .contract import CoreOfPacked, CurLinear, WEffLinear
from .core_gradient import core_gradient

_AUTOGRAD = keys("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")
_ABOVE_KERNELS = AUTOCAST | _AUTOGRAD | contract.VIEWS


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


def _kernels_alone() -> Any:
    """Context in which an operator is its kernel: no autograd, no autocast, no views."""
    return torch._C._ExcludeDispatchKeyGuard(_ABOVE_KERNELS)


def _without_views() -> Any:
    """Context in which torch's products return tensors that autograd does not take for views.

    If a node returned a view, autograd would not let anyone change it in place.
    """
    return torch._C._ExcludeDispatchKeyGuard(contract.VIEWS)


def _nothing() -> None:
    """The default of `Call.on_gradient`."""


class Call:
    """What all calls of one layer have in common: factors, slices, operators.

    Args:
        lateral_hat, horizontal_hat: packed factors in the precision of the products.
        slice_index, slices: of the layer.
        language: of the operators. If it has no kernel of an operator, the reference is taken.

    Attributes:
        on_gradient: called when a gradient of the core is formed.
    """

    __slots__ = (
        "core_grad_tokens",
        "core_of_packed",
        "cur_linear",
        "horizontal_hat",
        "lateral_hat",
        "on_gradient",
        "slice_index",
        "slices",
        "w_eff_linear",
    )

    def __init__(
        self,
        lateral_hat: Tensor,
        horizontal_hat: Tensor,
        slice_index: int,
        slices: int,
        language: str,
    ) -> None:
        self.lateral_hat, self.horizontal_hat = lateral_hat, horizontal_hat
        self.slice_index, self.slices = slice_index, slices
        self.on_gradient: Callable[[], None] = _nothing
        device = lateral_hat.device
        self.cur_linear = contract.nearest("cur_linear", language, device)
        self.w_eff_linear = contract.nearest("w_eff_linear", language, device)
        self.core_grad_tokens = contract.nearest("core_grad_tokens", language, device)
        self.core_of_packed = contract.nearest("core_of_packed", language, device)


class GradientSum:
    """One node that adds up the gradient of a core over all layers that share the core.

    Each layer passes on its packed ∂Û. The node adds them up, transforms the sum and scales it,
    once for all layers. It saves no tensors, so it serves any number of calls and backward passes.
    Every layer is connected to an output of its own. If a layer is called several times, autograd
    adds up the gradients that arrive at its output.

    Args:
        core: [n3, r, r], a leaf.
        scale: alpha.
        core_of_packed: the operator.
        where: the stream and the capture that it is made in. Autograd runs the node there.

    Attributes:
        addends: what `_Layer` takes for the core's gradient, by the first slice of a layer.
        is_done: whether a backward pass has run this node.
    """

    __slots__ = ("__weakref__", "addends", "core", "is_done", "scale", "where")

    def __init__(
        self,
        core: Tensor,
        scale: float,
        core_of_packed: torch._ops.OpOverload,
        where: tuple[int, int],
    ) -> None:
        self.core, self.scale, self.where = core, scale, where
        self.is_done = False
        self.addends: tuple[Tensor, ...] = _apply_gradient_sum(
            core, scale, core_of_packed, weakref.ref(self)
        )


class Pending:
    """For a graph that reads weights and has no `GradientSum`: whether its backward has run."""

    __slots__ = ("__weakref__", "is_done")

    def __init__(self) -> None:
        self.is_done = False


class LatestSum:
    """Finds the `GradientSum` of a stack's latest graph, for the next layer.

    It holds weak references, so only the graphs keep a sum alive. If it held the sum itself, the
    sum would outlive its graph. It would then keep a core that has been exchanged, and the node
    that accumulates that core's gradient. Autograd runs that node on the stream on which it was
    made, and a later capture uses another stream.
    """

    __slots__ = ("_former", "_latest", "_reading")

    def __init__(self) -> None:
        self._former: list[weakref.ref[Any]] = []
        self.forget()

    def forget(self) -> None:
        """Makes the next layer begin a new sum."""
        self._latest: weakref.ref[GradientSum] | None = None
        self._reading: weakref.ref[Pending] | None = None

    def reading(self) -> Pending:
        """What a graph that reads a weight keeps."""
        pending = None if self._reading is None else self._reading()
        if pending is None:
            pending = Pending()
            self._reading = weakref.ref(pending)
        pending.is_done = False
        return pending

    def retire(self) -> None:
        """Notes that another core replaces this one, whose graphs may still wait for a backward."""
        every = (*self._former, self._latest, self._reading)
        self._former = [each for each in every if each is not None and each() is not None]
        self.forget()

    def is_former_pending(self) -> bool:
        """Whether a graph of a retired core still waits for its backward."""
        return any(map(_is_pending, self._former))

    def is_pending(self) -> bool:
        """Whether any graph of this stack still waits for its backward."""
        return any(map(_is_pending, (*self._former, self._latest, self._reading)))

    def of(self, core: Tensor, scale: float, call: Call, capture: int) -> GradientSum:
        """The sum for ``core``, a leaf that requires grad, on the current stream."""
        gradient_sum = None if self._latest is None else self._latest()
        where = (streams.current(core.device), capture)
        if (
            gradient_sum is None
            or gradient_sum.core is not core
            or gradient_sum.scale != scale
            or gradient_sum.where != where
        ):
            gradient_sum = GradientSum(core, scale, call.core_of_packed, where)
            self._latest = weakref.ref(gradient_sum)
        gradient_sum.is_done = False
        return gradient_sum


def _is_pending(ref: weakref.ref[Any] | None) -> bool:
    gradient_sum = None if ref is None else ref()
    return gradient_sum is not None and not gradient_sum.is_done


class _GradientSum(torch.autograd.Function):
    """Returns one stand-in for the core per slice. Layers are connected to it but never read it."""

    @staticmethod
    def forward(
        ctx: Any,
        core: Tensor,
        scale: float,
        core_of_packed: torch._ops.OpOverload,
        whole: weakref.ref[GradientSum],
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.how = (core_of_packed, scale)
        ctx.whole = whole
        return core.new_empty(()).expand(core.shape[0], *core.shape).unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if (whole := ctx.whole()) is not None:
            whole.is_done = True
        packed = [grad for grad in grads if grad is not None]
        if not packed:  # all layers were differentiated by the operators
            return None, None, None, None
        core_of_packed, scale = ctx.how
        with _kernels_alone():
            grad_core = core_of_packed(*CoreOfPacked(torch.stack(packed), scale))
        return grad_core, None, None, None


_apply_gradient_sum = super(torch.autograd.Function, _GradientSum).apply


def project(x: Tensor, horizontal_hat: Tensor) -> Tensor:
    """z = x R̂ᵀ in the dtype of the factors."""
    return F.linear(x.to(horizontal_hat.dtype), horizontal_hat)


class Way(NamedTuple):
    """How a layer's product is formed; ``weight`` is what that way takes.

    Attributes:
        value: the result.
        grad_x: the gradient of the tokens.
        grad_x_again: the same, to be differentiated again.
    """

    value: Callable[[Call, Tensor, Tensor, Tensor | None, Tensor, float, Any, Any], Tensor]
    grad_x: Callable[[Call, Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
    grad_x_again: Callable[[Call, Tensor, Tensor, Tensor, float, Tensor | None], Tensor]


def run_layer(
    call: Call,
    way: Way,
    x: Tensor,
    weight: Tensor,
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
        way: `BY_FACTORS`, or `BY_W_EFF`: ``weight`` is then W_eff, not the base.
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
    arguments = CurLinear(
        x=x,
        weight=None if is_half else weight,
        bias=None if is_half else bias,
        lateral_hat=call.lateral_hat,
        horizontal_hat=call.horizontal_hat,
        core=core,
        slice_index=call.slice_index,
        slices=call.slices,
        scale=scale,
        transposed=False,
        z=z,
        adapter_ids=adapter_ids,
    )
    with _kernels_alone():
        y: Tensor = call.cur_linear(*arguments)
        if not is_half:
            return y
        return added_to_product(x, weight, y if bias is None else _dithered(y, bias))


def _grad_x_by_factors(
    call: Call,
    grad_y: Tensor,
    weight: Tensor,
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
    )
    grad_x: Tensor = call.cur_linear(*arguments)
    return grad_x


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
    with _without_views():
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
    )
    grad_x: Tensor = call.w_eff_linear(*arguments)
    return grad_x


BY_FACTORS = Way(_value_by_factors, _grad_x_by_factors, _grad_x_by_factors)
BY_W_EFF = Way(_value_by_w_eff, _grad_x_by_w_eff, _grad_x_again_by_w_eff)


class _Layer(torch.autograd.Function):
    """The node: the gradient reaches ``x`` and ``core``, or in place of that its ``addend``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        core: Tensor,
        held: tuple[Tensor | None],
        weight: Tensor,
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
            grad_x, grad_core = _gradients(*args, again=True, packed=False)
        else:
            is_summed = ctx.gradient_sum is not None
            with _kernels_alone():
                grad_x, grad = _gradients(*args, again=False, packed=is_summed)
            grad_core, grad_addend = (None, grad) if is_summed else (grad, None)
        return (grad_x, grad_core, *[None] * 4, grad_addend, *[None] * 5)


def _gradients(
    needs_x: bool,
    needs_core: bool,
    saved: tuple[Any, ...],
    how: tuple[Call, Way, float, bool],
    grad_y: Tensor,
    again: bool,
    packed: bool,
) -> tuple[Tensor | None, Tensor | None]:
    x, z, weight, core, adapter_ids = saved
    call, way, scale, dense_grad = how
    grad_x = grad_core = None
    if needs_x:
        form = way.grad_x_again if again else way.grad_x
        grad_x = form(call, grad_y, weight, core, scale, adapter_ids)
    if needs_core:
        call.on_gradient()
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
            packed=packed,
        )
        if scale != 1.0 and not packed:
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
