"""What reading a parameter ``[experts, n1, n2]`` of an adapted module gives, and its products.

The forward of such a module reads its parameter and multiplies by it: by one expert at a time, by
all of them for tokens sorted by expert, or by a copy of one for each token. A read gives W_eff,
which is not computed. What is picked from it, or transposed, is not computed either. A product of
tokens with it goes through the stack, for the experts that have tokens. Any other function gets the
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..operators import streams
from ..operators.eager import added_to_rounded
from ..operators.factors import check_frozen
from .expert_place import ExpertPlace
from .reading import (
    EffectiveWeight,
    UnreadableWeight,
    effective_weight,
    is_plain_wanted,
    is_question,
    read_weight,
    whole_weight,
)
from .weights import Place


def read_experts(stored: Tensor, places: Sequence[Place]) -> Tensor:
    """W_eff ``[experts, n1, n2]`` of a parameter; see `reading.read_weight`."""
    return read_weight(stored, places, ExpertsWeight)


class ExpertsWeight(EffectiveWeight):
    """W_eff of all experts of a parameter. Parts and products of it do not compute all of it."""

    @classmethod
    def unreadable(cls) -> type[UnreadableWeight]:
        """The stand-in whose error names experts."""
        return UnreadableExperts

    @classmethod
    def is_watched(cls, stored: Tensor) -> bool:
        """Modes that see operators see those of the experts that have tokens."""
        return is_plain_wanted(stored)

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _called(func, types, args, kwargs or {})

    def plain(self) -> Tensor:
        """What a function gets that is no product."""
        if torch._C._len_torch_dispatch_stack() == 0:
            return self
        # A mode that records operators needs a plain tensor.
        return whole_weight(self.tcur_stored, self._places, effective_weight)


class ExpertWeight(EffectiveWeight):
    """W_eff of one expert ``[n1, n2]``, where something other than a product uses it."""


class UnreadableExperts(UnreadableWeight):
    """Stands for the weight of experts in a batch of many adapters."""

    _refusal = (
        "weight: expected one adapter for all rows where a model has adapted experts, got a batch "
        "whose rows go by adapters of their own: tokens of many rows come to an expert together, "
        "and which row each is from is not known there; run such a model with one adapter at a time"
    )


class Part(torch.Tensor):
    """A part of the weight of experts, or its transpose. It is computed if no product takes it.

    It is what a product needs to know: which weight, which experts of it (None: all, an index, or
    an index for each token), and whether they are transposed.
    """

    tcur_weight: ExpertsWeight
    tcur_experts: int | Tensor | None
    tcur_transposed: bool
    _made: Tensor | None

    @classmethod
    def of(cls, weight: ExpertsWeight, experts: int | Tensor | None, transposed: bool) -> Tensor:
        """The part; connected to the graph of ``weight``, if it has one."""
        if experts is None and not transposed:
            return weight
        with torch._C.DisableTorchFunctionSubclass():
            if torch.is_grad_enabled() and weight.requires_grad:
                part: Tensor = _Taken.apply(weight, experts, transposed)
                return part
            return cls._new(weight, experts, transposed)

    @classmethod
    def _new(cls, weight: ExpertsWeight, experts: int | Tensor | None, transposed: bool) -> Part:
        like = _part_of(weight.tcur_stored, experts, transposed, is_meta=True)
        made = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=weight.dtype, device=weight.device
        )
        made.tcur_weight, made.tcur_experts = weight, experts
        made.tcur_transposed, made._made = transposed, None
        torch._C._set_throw_on_mutable_data_ptr(made)
        return made

    def plain(self) -> Tensor:
        """The part itself, as what it would be without this class; differentiable."""
        if self._made is None:
            weight, experts = self.tcur_weight, self.tcur_experts
            if isinstance(experts, int):
                places = [ExpertPlace(place, experts) for place in weight._places]
                found = read_weight(weight.tcur_stored[experts], places, ExpertWeight)
            else:
                found = weight.plain()
                with torch._C.DisableTorchFunctionSubclass():
                    found = found if experts is None else found[experts]
            with torch._C.DisableTorchFunctionSubclass():
                self._made = found.mT if self.tcur_transposed else found
        return self._made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _called(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Where torch functions are not asked, as in the backward of a function of autograd."""

        def plain(each: Any) -> Any:
            return each.plain().detach() if isinstance(each, cls) else each

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.plain().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().clone().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.plain())


class _Taken(torch.autograd.Function):
    """Connects a part to the weight that it is of. Products do not use this connection.

    It is for code that hands a part to an autograd function of its own.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: ExpertsWeight, experts: int | Tensor | None, transposed: bool
    ) -> Tensor:
        ctx.how = (weight.shape, experts, transposed)
        return Part._new(weight, experts, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        shape, experts, transposed = ctx.how
        grad = grad.mT if transposed else grad
        if experts is None:
            return grad, None, None
        whole = grad.new_zeros(shape)
        if isinstance(experts, int):
            whole[experts] = grad
        else:
            whole = whole.index_add(0, experts, grad)
        return whole, None, None


def _part_of(
    stored: Tensor, experts: int | Tensor | None, transposed: bool, is_meta: bool = False
) -> Tensor:
    """The same part of the stored weight; on the meta device only its shape and strides."""
    if is_meta and isinstance(experts, Tensor):
        picked = stored.new_empty((len(experts), *stored.shape[1:]), device="meta")
    else:
        picked = stored if experts is None else stored[experts]
    return picked.mT if transposed else picked


# -- functions of torch that take such a weight


def _called(func: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A function of torch: a part, a product, or any other, which gets the numbers."""
    if not is_question(func):
        name = getattr(func, "__name__", "")
        handle = _HANDLED.get(name) or (_transposed if func in _TRANSPOSES else None)
        if handle is not None:
            found = handle(func, args, kwargs)
            if found is not NotImplemented:
                return found
        args, kwargs = tree_map(_plain, tuple(args)), tree_map(_plain, kwargs)
    return torch._C._disabled_torch_function_impl(func, types, tuple(args), kwargs)


def _plain(value: Any) -> Any:
    return value.plain() if isinstance(value, ExpertsWeight | Part) else value


def _is_lazy(value: Any) -> bool:
    """Whether it is a weight of experts, or a part, that was not computed yet."""
    return isinstance(value, ExpertsWeight) or (isinstance(value, Part) and value._made is None)


def _known(value: Any) -> tuple[ExpertsWeight, int | Tensor | None, bool]:
    """Which weight it is, which experts of it, and whether they are transposed."""
    if isinstance(value, ExpertsWeight):
        return value, None, False
    return value.tcur_weight, value.tcur_experts, value.tcur_transposed


def _picked(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``weight[index]`` of one expert, or of one for each token."""
    weight, index = args
    if not isinstance(weight, ExpertsWeight):
        return NotImplemented
    if isinstance(index, tuple) and index and _is_index(index[0]):
        return weight[index[0]][index[1:]]
    if isinstance(index, Tensor) and index.ndim == 1 and _is_of_integers(index):
        return Part.of(weight, index, False)
    if not _is_index(index):
        return NotImplemented
    expert, experts = int(index), weight.shape[0]
    if not -experts <= expert < experts:
        raise IndexError(f"index {expert} is out of bounds for dimension 0 with size {experts}")
    return Part.of(weight, expert % experts, False)


def _is_of_integers(index: Tensor) -> bool:
    return index.dtype in (torch.int64, torch.int32)


def _is_index(index: Any) -> bool:
    if isinstance(index, Tensor):
        return index.ndim == 0 and _is_of_integers(index)
    return isinstance(index, int) and not isinstance(index, bool)


def _unbound(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """All experts, one by one; iterating asks for them like this."""
    weight = args[0]
    axes = [*args[1:], *kwargs.values()]
    if axes not in ([], [0]) or not isinstance(weight, ExpertsWeight):
        return NotImplemented
    return tuple(Part.of(weight, expert, False) for expert in range(weight.shape[0]))


def _transposed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The last two axes exchanged, whichever function does it."""
    value, axes = args[0], [*args[1:], *kwargs.values()]
    if not _is_lazy(value) or not all(isinstance(axis, int) for axis in axes):
        return NotImplemented
    ndim = value.ndim
    if axes and {axis % ndim for axis in axes} != {ndim - 2, ndim - 1}:
        return NotImplemented
    if ndim == 3 and not axes and func != _M_TRANSPOSE:  # .T reverses all axes
        return NotImplemented
    weight, experts, transposed = _known(value)
    return Part.of(weight, experts, not transposed)


def _permuted(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``permute`` where it exchanges the last two axes."""
    axes = args[1] if len(args) == 2 else args[1:]
    if kwargs or list(axes) not in ([1, 0], [0, 2, 1]):
        return NotImplemented
    return _transposed(func, [args[0], -1, -2], {})


_M_TRANSPOSE = Tensor.mT.__get__  # type: ignore[attr-defined]
#: Properties that transpose a matrix.
_TRANSPOSES = frozenset([_M_TRANSPOSE, Tensor.T.__get__])  # type: ignore[attr-defined]


def _linear(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], is_transposed: bool = False
) -> Any:
    """``F.linear(x, part)``; or, if transposed, ``x @ part``: tokens with one expert."""
    given = [*args, *kwargs.values()]
    x, part = given[0], given[1] if len(given) > 1 else None
    has_more = any(each is not None for each in given[2:])  # a bias, or a tensor to write to
    if is_transposed and has_more:
        return NotImplemented
    if isinstance(x, ExpertsWeight | Part) or not isinstance(part, Part) or not _is_lazy(part):
        return _batches(func, args, kwargs) if is_transposed else NotImplemented
    weight, expert, transposed = _known(part)
    if not isinstance(expert, int):
        return _batches(func, args, kwargs) if is_transposed else NotImplemented
    by_rows = transposed == is_transposed  # x Wᵀ, not x W
    places = [ExpertPlace(place, expert) for place in weight._places]
    width = places[0].in_features if by_rows else places[0].out_features
    if x.ndim == 0 or x.shape[-1] != width or x.is_nested:
        return NotImplemented
    if by_rows and not has_more and len(places) == 1:
        return places[0].stack.forward_slices(x, places[0])
    tokens = x.numel() // max(1, width)
    if _should_be_whole(places, tokens):
        return NotImplemented
    counts = [(expert, tokens)]
    return _sum_of(func, args, kwargs, part, x.reshape(tokens, width), counts, by_rows)


def _multiplied(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return _linear(func, args, kwargs, is_transposed=True)


def _grouped(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``grouped_mm(x, weight, offs)``: tokens that are sorted by expert."""
    given = [*args, kwargs.get("offs")]
    if len(given) < 3 or not _is_lazy(given[1]) or not isinstance(given[2], Tensor):
        return NotImplemented
    x, part, offs = given[:3]
    weight, experts, transposed = _known(part)
    if experts is not None or isinstance(x, ExpertsWeight | Part) or x.ndim != 2:
        return NotImplemented
    if _should_be_whole(weight._places, len(x) // weight.shape[0]):
        return NotImplemented
    ends = offs.tolist()
    counts = [
        (expert, end - start)
        for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    ]
    return _sum_of(func, args, kwargs, part, x[: ends[-1]], counts, transposed)


def _batches(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``bmm`` of tokens and weights, in either order: a matrix of tokens for each weight."""
    given = [*args, *kwargs.values()]
    if len(given) != 2:
        return NotImplemented
    is_first = _is_lazy(given[0])
    part, x = given if is_first else (given[1], given[0])
    if not _is_lazy(part) or isinstance(x, ExpertsWeight | Part):
        return NotImplemented
    weight, experts, transposed = _known(part)
    if isinstance(experts, int) or x.ndim != 3 or len(x) != part.shape[0]:
        return NotImplemented
    x = x.mT if is_first else x
    by_rows = transposed != is_first
    n1, n2 = weight.shape[1:]
    if x.shape[2] != (n2 if by_rows else n1):
        return NotImplemented
    each = x.shape[1]
    if _should_be_whole(weight._places, len(x) * each // weight.shape[0]):
        return NotImplemented
    order = None
    if experts is None:
        counts = [(expert, each) for expert in range(weight.shape[0])]
    else:
        experts = experts % weight.shape[0]
        order = experts.argsort(stable=True)
        found = experts.bincount(minlength=weight.shape[0]).tolist()
        counts = [(expert, each * count) for expert, count in enumerate(found)]
    tokens = (x if order is None else x[order]).reshape(len(x) * each, x.shape[2])

    def arrange(update: Tensor) -> Tensor:
        update = update.reshape(len(x), each, -1)
        update = update if order is None else update[order.argsort()]
        return update.mT if is_first else update

    return _sum_of(func, args, kwargs, part, tokens, counts, by_rows, arrange)


def _should_be_whole(places: Sequence[Place], tokens: int) -> bool:
    """Whether W_eff of all slices should be used, with so many tokens for each expert.

    In a capture the numbers of tokens are not known.
    """
    if streams.capture_of(places[0].stored.device):
        return True
    if len(places) > 1:
        return False
    return places[0].stack.kept_value(places[0], tokens) is not None


def _sum_of(
    func: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    part: Any,
    tokens: Tensor,
    counts: Sequence[tuple[int, int]],
    by_rows: bool,
    arrange: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """A product with the base, and the update of each expert for its tokens.

    Args:
        func, args, kwargs: the product, in which the base takes the place of ``part``.
        tokens: ``[tokens, n2]``, or ``[tokens, n1]``, sorted by expert.
        counts: expert, and the number of its tokens.
        by_rows: whether it is x Wᵀ, not x W.
        arrange: brings the update into the shape of the product.
    """
    weight, experts, transposed = _known(part)
    stored = _part_of(_frozen_base(weight._places[0]), experts, transposed)

    def with_base(value: Any) -> Any:
        return stored if value is part else value

    y: Tensor = func(*tree_map(with_base, tuple(args)), **tree_map(with_base, kwargs))
    tokens, updates, start = tokens.to(y.dtype), [], 0
    stacks = [place.stack for place in weight._places]
    is_trained = torch.is_grad_enabled() and any(stack.core.requires_grad for stack in stacks)
    pending = [stack.reading() for stack in stacks] if is_trained else []
    for expert, count in counts:
        if count:
            own, start = tokens[start : start + count], start + count
            places = [ExpertPlace(place, expert) for place in weight._places]
            each = [p.stack.update_of_tokens(own, p, not by_rows) for p in places]
            updates.append(sum(each[1:], each[0]))
    if not updates:
        return y
    update = torch.cat(updates)
    if update.requires_grad and is_trained:

        def came(_: Tensor) -> None:
            for stack, each in zip(stacks, pending, strict=True):
                stack.gradient_came()
                each.is_done = True

        update.register_hook(came)
    if arrange is not None:
        update = arrange(update)
    elif y.ndim == 2 and len(update) < len(y):  # tokens of no expert come last
        update = nn.functional.pad(update, (0, 0, 0, len(y) - len(update)))
    update = update.reshape(y.shape)
    return added_to_rounded(y, update)


def _frozen_base(place: Place) -> Tensor:
    """The base weight of all experts, to which no gradient goes."""
    if place.base.requires_grad:
        place.freeze()
    check_frozen(place.name, place.base)
    return place.base


#: Names of functions of torch, methods and operators -> what is done in their place.
_HANDLED: dict[str, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    "__getitem__": _picked,
    "unbind": _unbound,
    "transpose": _transposed,
    "swapaxes": _transposed,
    "t": _transposed,
    "permute": _permuted,
    "linear": _linear,
    "matmul": _multiplied,
    "mm": _multiplied,
    "bmm": _batches,
    "_grouped_mm": _grouped,
    "grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
}
