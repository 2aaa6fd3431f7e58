"""What one gets by reading the weight of an adapted layer: W_eff, computed when it is used.

Many models never call a layer, and multiply by its weight themselves. What they read must be the
weight that counts. Many others ask a weight for its dtype or device alone, in every forward; that
must cost next to nothing. So a read gives a tensor that knows its dtype, device and shape, and
computes its numbers when an operator asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..operators.contract import CoreGradTokens
from ..operators.eager import Pending, is_traced
from ..operators.functional import prepare
from ..processes import is_sharded
from .rows import rows_of
from .weights import Place


def read_weight(stored: Tensor, places: Sequence[Place]) -> Tensor:
    """The parameter ``stored`` of an adapted layer with the updates of its places: W_eff.

    Differentiable to the cores. As the parameter is stored, and of its dtype. Written to in place,
    it is the parameter that is written. The parameter itself where no update applies: merged, or
    disabled. Places of one weight in several stacks add up.
    """
    active = [place for place in places if place.stack.enabled and place.backup is None]
    if not active or is_sharded(stored):  # FSDP2 looks at its shards between passes
        return stored
    if any(rows_of(place.stack) is not None for place in active):
        return UnreadableWeight.of(stored)
    if _is_watched(stored):
        return _whole(stored, active, effective_weight)
    read: EffectiveWeight
    cores = [place.stack.core for place in active]
    if torch.is_grad_enabled() and any(core.requires_grad for core in cores):
        pending = [place.stack.reading() for place in active]
        read = _Read.apply(stored, active, pending, *cores)
    else:
        read = EffectiveWeight.of(stored, active)
        Tensor.requires_grad_(read, any(place.was_trained for place in active))
    read._is_param = read._is_read = True
    return read


class EffectiveWeight(torch.Tensor):
    """W_eff of one parameter, computed when an operator first asks for it.

    A write in place goes to the base weight. So does one through ``.data`` or ``.detach()``, and
    whether it is to be trained.
    """

    tcur_stored: Tensor
    #: By this torch knows a parameter.
    _is_param: bool
    #: Whether it was read, not made of what was: by ``detach()``, or into a parameter of its own.
    _is_read: bool
    _source: EffectiveWeight | None
    _places: Sequence[Place]
    _value: Tensor | None
    _writes: int

    # Functions of torch treat it as any tensor: the fused paths of torch's transformer layers, for
    # one, stay as they are.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, stored: Tensor, places: Sequence[Place]) -> EffectiveWeight:
        """What a read of ``stored`` gives, without a graph."""
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
        # There is no memory here: who wants it past Python is told so, and does not crash.
        torch._C._set_throw_on_mutable_data_ptr(made)
        return made

    def is_of(self, stored: Tensor | None) -> bool:
        """Whether this is what a read of that parameter gives."""
        return self.tcur_stored is stored

    def _moved(self, stored: Tensor) -> EffectiveWeight:
        """The same on another device, or without a graph."""
        made = EffectiveWeight.of(stored, self._places)
        made._source = self if stored.device != self.device else self._source
        return made

    @property
    def numbers(self) -> Tensor:
        """The plain tensor."""
        if self._value is None and self._source is not None:
            self._value = self._source.numbers.to(self.device)
        if self._value is None:
            with torch.no_grad():
                self._value = _whole(
                    self.tcur_stored, self._places, lambda place: place.stack.effective_value(place)
                )
        return self._value

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operator on the numbers, or on the base weight if it writes to it."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return args[0]._moved(args[0].tcur_stored)
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
            # Whoever moves weights from device to device puts back what was moved.
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
            for place in target._places:  # below autograd, where nobody counts versions
                place.stack.base.suspect(place)
            if out is target.tcur_stored:
                out = target
        return out

    def __del__(self) -> None:
        # Views count their writes together with the tensor that they are of, and keep it alive.
        if not self.is_inference() and self._version != self._writes:
            for place in self._places:
                place.stack.was_misused(place)

    @property
    def data(self) -> Tensor:
        """The same without a graph; what is set is set in the base weight."""
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
        """As of a parameter: of the base weight, which a layer refuses to have trained."""
        tensor = self.tcur_stored if self._is_read else self
        Tensor.requires_grad_(tensor, requires_grad)
        return self

    @property
    def requires_grad(self) -> bool:
        """As of any tensor; what is set is set in the base weight."""
        return super().requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """As of any tensor; of what was read never None.

        By this torch refuses to make it the parameter of another module, where it would stay what
        it was when it was read, and its gradient would reach no core.
        """
        return super().grad_fn or (_Read if self._is_read else None)

    def numpy(self, *, force: bool = False) -> Any:
        """As of any tensor."""
        return self.numbers.numpy(force=True) if force else self._alone().numpy()

    def tolist(self) -> Any:
        """As of any tensor."""
        return self.numbers.tolist()

    def data_ptr(self) -> int:
        """That of the numbers, in memory of their own."""
        return self.untyped_storage().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of the numbers, in memory of their own: by it two weights are told apart."""
        if self.numbers.untyped_storage().nbytes() > self.numbers.nbytes:
            self._value = self.numbers.clone()
        return self.numbers.untyped_storage()

    def __dlpack__(self, **kwargs: Any) -> Any:
        """As of any tensor."""
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
    """Connects W_eff to the cores; its numbers are computed when they are asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        stored: Tensor,
        places: Sequence[Place],
        pending: Sequence[Pending],
        *cores: Tensor,
    ) -> Tensor:
        ctx.places, ctx.pending = places, pending
        ctx.needs = [core.requires_grad for core in cores]
        return EffectiveWeight.of(stored, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grads = [
            _core_grad(_part(grad, place), place) if needed else None
            for place, needed in zip(ctx.places, ctx.needs, strict=True)
        ]
        for each in ctx.pending:
            each.is_done = True
        return None, None, None, *grads


class UnreadableWeight(torch.Tensor):
    """The weight of a layer in a batch of many adapters, where each row has a weight of its own.

    It knows its dtype, device and shape. Functions of torch see that it is no common tensor, so
    that torch's transformer layers do not take their fused path past the forward of the layer.
    """

    @classmethod
    def of(cls, stored: Tensor) -> UnreadableWeight:
        """In the place of ``stored``."""
        return stored.detach().as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answers what is asked of the tensor as such, and refuses to compute with it."""
        if getattr(func, "__name__", "") in _METADATA or func in _GETTERS:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise RuntimeError(
            "weight: expected a layer that is called, got one whose weight is read while the rows "
            "of the batch go by adapters of their own, each with another weight; run such a model "
            "with one adapter at a time"
        )


_METADATA = frozenset(
    {"size", "dim", "numel", "stride", "is_floating_point", "element_size", "is_contiguous"}
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
        ]
    )
)


def _whole(stored: Tensor, places: Sequence[Place], weight_of: Callable[[Place], Tensor]) -> Tensor:
    """W_eff as the parameter is stored, from W_eff ``[out, in]`` of its places."""
    sharing: dict[int, list[Place]] = {}
    for place in sorted(places, key=lambda each: each.first_row):
        place.ran = True
        sharing.setdefault(place.first_row, []).append(place)
    # Blocks of rows of one parameter, of which some may have no place.
    blocks, row = [], 0
    for first, each in sharing.items():
        part = weight_of(each[0]) if len(each) == 1 else effective_weight(*each)
        if part.numel() == stored.numel():
            return part.T if each[0].transposed else part
        blocks += [stored[row:first], part]
        row = first + each[0].out_features
    return torch.cat([*blocks, stored[row:]])


def effective_weight(*places: Place) -> Tensor:
    """W_eff ``[out, in]`` of a weight by the stacks that it has places in, rounded once.

    In the dtype of the weight; differentiable to the cores.
    """
    weight = places[0].weight
    updates = [place.stack.update(place) for place in places]
    total: Tensor = sum(updates[1:], weight.to(updates[0].dtype) + updates[0])
    return total.to(weight.dtype)


def _core_grad(grad: Tensor, place: Place) -> Tensor:
    """Gradient of the core from that of one place's W_eff, ``[out, in]``; differentiable."""
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
    return (stack.alpha * torch.stack(parts).sum(0)).to(stack.core.dtype)


def _part(grad: Tensor, place: Place) -> Tensor:
    """What of a parameter's gradient belongs to a place, ``[out, in]``."""
    if place.transposed:
        return grad.T
    return grad[place.first_row : place.first_row + place.out_features]


def _is_watched(stored: Tensor) -> bool:
    """Whether whoever looks at operators would not see through a tensor that is computed late."""
    return is_traced() or type(stored) not in _COMMON or torch._C._len_torch_dispatch_stack() > 0


#: What is stored in a layer where nothing special is going on.
_COMMON = (Tensor, torch.nn.Parameter)
