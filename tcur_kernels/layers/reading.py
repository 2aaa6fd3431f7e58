"""Reading the weight of an adapted layer gives W_eff, which is computed only when it is used.

Some models never call a layer but multiply by its weight themselves. They must get W_eff. Many
others only ask a weight for its dtype or device, in every forward; that must cost next to nothing.
A read therefore returns a tensor that knows its dtype, device and shape, and computes its numbers
when an operator needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..checkpoints import refuse_lost_gradients
from ..operators.contract import CoreGradTokens
from ..operators.eager import is_traced
from ..operators.functional import prepare
from ..operators.gradient_sum import Pending
from ..processes import is_sharded
from .rows import rows_of
from .weights import Place


def read_weight(
    stored: Tensor, places: Sequence[Place], kind: type[EffectiveWeight] | None = None
) -> Tensor:
    """W_eff: the parameter ``stored`` of an adapted layer plus the updates of its places.

    It has the layout and dtype of the parameter and is differentiable with respect to the cores. A
    write in place changes the parameter. If the adapter is merged or disabled, the result is the
    parameter itself. If a weight has places in several stacks, their updates add up. ``kind`` is
    the class of the tensor that is computed late.
    """
    kind = EffectiveWeight if kind is None else kind
    for place in places:
        place.stack.let_changes_end()
        if place.backup is not None and place.stack.enabled:
            place.stack.refuse_rows_of_merged()
    active = [place for place in places if place.stack.enabled and place.backup is None]
    if not active or is_sharded(stored):  # FSDP2 looks at its shards between passes
        return stored
    if any(rows_of(place.stack) is not None for place in active):
        return kind.unreadable().of(stored)
    if kind.is_watched(stored):
        return whole_weight(stored, active, effective_weight)
    read: EffectiveWeight
    cores = [place.stack.core for place in active]
    is_trained = any(core.requires_grad for core in cores)
    if is_trained:
        refuse_lost_gradients()
    if is_trained and torch.is_grad_enabled():
        pending = [place.stack.reading() for place in active]
        read = _Read.apply(stored, active, pending, kind, *cores)
    else:
        read = kind.of(stored, active)
        Tensor.requires_grad_(read, any(place.was_trained for place in active))
    read._is_param = read._is_read = True
    return read


class EffectiveWeight(torch.Tensor):
    """W_eff of one parameter, computed when an operator first needs it.

    A write in place goes to the base weight, also if it is made through ``.data`` or
    ``.detach()``. Setting ``requires_grad`` sets it for the base weight, too.
    """

    tcur_stored: Tensor
    #: torch recognises parameters by this attribute.
    _is_param: bool
    #: Whether a read returned this very tensor. False if it was derived from one, for example by
    #: ``detach()`` or by making a parameter of it.
    _is_read: bool
    _source: EffectiveWeight | None
    _places: Sequence[Place]
    _value: Tensor | None
    _writes: int

    # torch's functions treat it as an ordinary tensor. For example, torch's transformer layers
    # still take their fused paths.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, stored: Tensor, places: Sequence[Place]) -> EffectiveWeight:
        """The tensor that a read of ``stored`` returns, without a graph."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            stored.shape,
            strides=stored.stride(),
            dtype=stored.dtype,
            device=stored.device,
        )
        made.tcur_stored, made._places = stored, places
        made._is_param = made._is_read = False
        made._source = made._value = None
        made._writes = 0
        # This tensor has no memory. C++ code that asks for it gets an error instead of a crash.
        torch._C._set_throw_on_mutable_data_ptr(made)
        return made

    @classmethod
    def unreadable(cls) -> type[UnreadableWeight]:
        """What stands for such a weight where each row of a batch has its own."""
        return UnreadableWeight

    @classmethod
    def is_watched(cls, stored: Tensor) -> bool:
        """Whether code that records operators needs a plain tensor, not one computed late."""
        return is_plain_wanted(stored) or torch._C._len_torch_dispatch_stack() > 0

    def is_of(self, stored: Tensor | None) -> bool:
        """Whether this tensor comes from a read of that parameter."""
        return self.tcur_stored is stored

    def _moved(self, stored: Tensor) -> EffectiveWeight:
        """The same W_eff with ``stored`` in place: on another device, or without a graph."""
        made = type(self).of(stored, self._places)
        made._source = self if stored.device != self.device else self._source
        return made

    @property
    def numbers(self) -> Tensor:
        """W_eff as a plain tensor."""
        if self._value is None and self._source is not None:
            self._value = self._source.numbers.to(self.device)
        if self._value is None:
            with torch.no_grad():
                self._value = whole_weight(
                    self.tcur_stored, self._places, lambda place: place.stack.effective_value(place)
                )
        return self._value

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operator on the numbers, or on the base weight where the operator writes."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return args[0]._moved(args[0].tcur_stored)
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
            # Code that moves a model between devices stores the moved tensor as the parameter.
            return args[0]._moved(func(args[0].tcur_stored.detach(), **kwargs))
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        written += [
            kwargs[argument.name]
            for argument in func._schema.arguments
            if argument.name in kwargs
            and argument.alias_info is not None
            and argument.alias_info.is_write
        ]
        targets = [each for each in written if isinstance(each, cls)]

        def plain(each: Any) -> Any:
            if not isinstance(each, cls):
                return each
            return each.tcur_stored if any(each is target for target in targets) else each.numbers

        out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        for target in targets:
            target._value = None
            target._writes += 1
            for place in target._places:  # below autograd no version counter changes
                place.stack.base.suspect(place)
            if out is target.tcur_stored:
                out = target
        return out

    def __del__(self) -> None:
        # A view shares the version counter of this tensor and keeps it alive. At this point the
        # counter therefore includes all writes through views, which `_writes` does not.
        if not self.is_inference() and self._version != self._writes:
            for place in self._places:
                place.stack.was_misused(place)

    @property
    def data(self) -> Tensor:
        """The same tensor without a graph; setting it sets the data of the base weight."""
        return self._moved(self.tcur_stored)

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, EffectiveWeight) and value.is_of(self.tcur_stored):
            return  # weight.data = weight.data
        self.tcur_stored.data = value.numbers if isinstance(value, EffectiveWeight) else value
        self._value = None
        for place in self._places:
            place.stack.base.suspect(place)

    def requires_grad_(self, requires_grad: bool = True) -> EffectiveWeight:
        """Sets it for the base weight; an adapted layer refuses to have its base trained."""
        tensor = self.tcur_stored if self._is_read else self
        Tensor.requires_grad_(tensor, requires_grad)
        return self

    @property
    def requires_grad(self) -> bool:
        """As for any tensor; setting it sets it for the base weight."""
        return super().requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """As for any tensor, but never None for a tensor that a read returned.

        torch then refuses to make it a parameter of another module. There it would no longer follow
        the core, and its gradient would reach no core.
        """
        return super().grad_fn or (_Read if self._is_read else None)

    def numpy(self, *, force: bool = False) -> Any:
        """As for any tensor."""
        return self.numbers.numpy(force=True) if force else self._alone().numpy()

    def tolist(self) -> Any:
        """As for any tensor."""
        return self.numbers.tolist()

    def data_ptr(self) -> int:
        """The address of the numbers, which have their own memory."""
        return self.untyped_storage().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The storage of the numbers, which they do not share: callers tell weights apart by it."""
        if self.numbers.untyped_storage().nbytes() > self.numbers.nbytes:
            self._value = self.numbers.clone()
        return self.numbers.untyped_storage()

    def __dlpack__(self, **kwargs: Any) -> Any:
        """As for any tensor."""
        return self._alone().__dlpack__(**kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._alone().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._alone().clone().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.numbers)

    def _alone(self) -> Tensor:
        if self.requires_grad:
            raise RuntimeError(
                "weight: expected a tensor without a graph, got the effective weight of an adapted "
                "layer, which depends on its core; use weight.detach()"
            )
        return self.numbers


class _Read(torch.autograd.Function):
    """Connects W_eff to the cores in the graph; its numbers are computed when they are needed."""

    @staticmethod
    def forward(
        ctx: Any,
        stored: Tensor,
        places: Sequence[Place],
        pending: Sequence[Pending],
        kind: type[EffectiveWeight],
        *cores: Tensor,
    ) -> Tensor:
        ctx.places, ctx.pending = places, pending
        ctx.needs = [core.requires_grad for core in cores]
        return kind.of(stored, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grads = [
            _core_grad(place.part_of(grad), place) if needed else None
            for place, needed in zip(ctx.places, ctx.needs, strict=True)
        ]
        for each in ctx.pending:
            each.is_done = True
        return None, None, None, None, *grads


class UnreadableWeight(torch.Tensor):
    """Stands for the weight of a layer in a batch of many adapters, where each row has its own.

    It knows its dtype, device and shape. torch's transformer layers see that it is not an ordinary
    tensor. They therefore do not take their fused path, which would bypass the layer's forward.
    """

    #: What the error says.
    _refusal = (
        "weight: expected a layer that is called, got one whose weight is read while the rows of "
        "the batch go by adapters of their own, each with another weight; run such a model with "
        "one adapter at a time"
    )

    @classmethod
    def of(cls, stored: Tensor) -> UnreadableWeight:
        """The stand-in for ``stored``."""
        return stored.detach().as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answers questions about dtype, device and shape, and refuses to compute."""
        if is_question(func):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise RuntimeError(cls._refusal)


_METADATA = frozenset(
    {
        "size",
        "dim",
        "numel",
        "stride",
        "is_floating_point",
        "element_size",
        "is_contiguous",
        "is_inference",
    }
)
_GETTERS = frozenset(
    getattr(Tensor, name).__get__
    for name in (
        [
            "shape",
            "dtype",
            "device",
            "layout",
            "requires_grad",
            "is_leaf",
            "ndim",
            "is_meta",
            "is_cuda",
            "is_cpu",
            "is_nested",
            "is_sparse",
            "is_quantized",
            "grad_fn",
            "_version",
        ]
    )
)


def is_question(func: Any) -> bool:
    """Whether a function only asks for dtype, device, shape and the like."""
    return getattr(func, "__name__", "") in _METADATA or func in _GETTERS


def whole_weight(
    stored: Tensor, places: Sequence[Place], weight_of: Callable[[Place], Tensor]
) -> Tensor:
    """W_eff in the layout of the parameter, assembled from W_eff ``[out, in]`` of its places."""
    sharing: dict[int, list[Place]] = {}
    for place in sorted(places, key=lambda each: each.first_row):
        place.ran = True
        sharing.setdefault(place.first_row, []).append(place)
    # The parameter consists of blocks of rows; some may have no place and stay as stored.
    blocks, row = [], 0
    for first, each in sharing.items():
        part = weight_of(each[0]) if len(each) == 1 else effective_weight(*each)
        if part.numel() == stored.numel():
            return each[0].in_layout(part)
        blocks += [stored[row:first], part]
        row = first + each[0].out_features
    return torch.cat([*blocks, stored[row:]])


def effective_weight(*places: Place) -> Tensor:
    """W_eff ``[out, in]`` of one weight, with the updates of all stacks in which it has a place.

    The sum is rounded once, to the dtype of the weight. It is differentiable with respect to the
    cores.
    """
    weight = places[0].weight
    updates = [place.stack.update(place) for place in places]
    total: Tensor = sum(updates[1:], weight.to(updates[0].dtype) + updates[0])
    return total.to(weight.dtype)


def _core_grad(grad: Tensor, place: Place) -> Tensor:
    """Gradient of the core, given that of one place's W_eff, ``[out, in]``; differentiable."""
    stack = place.stack
    stack.gradient_came()
    call = prepare(place.weight, None, stack.factors, place.slice_index, "ieee")
    parts = [
        call.core_grad_tokens(
            *CoreGradTokens(
                x=each,
                grad_y=None,
                lateral_hat=call.lateral_hat,
                horizontal_hat=call.horizontal_hat,
                n3=stack.n3,
                slice_index=place.slice_index + s,
                slices=1,
            )
        )
        for s, each in enumerate(grad.unflatten(0, (place.slices, stack.n1)))
    ]
    return (stack.scale * sum(parts[1:], parts[0])).to(stack.core.dtype)


def is_plain_wanted(stored: Tensor) -> bool:
    """Whether a compiler or the like runs, or the stored weight is no ordinary tensor."""
    return is_traced() or type(stored) not in _COMMON


#: The types of a stored weight in the ordinary case.
_COMMON = (Tensor, torch.nn.Parameter)
