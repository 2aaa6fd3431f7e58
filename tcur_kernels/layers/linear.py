"""The linear layers of a stack: modules that were adapted in place, by changing their class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..processes import is_sharded
from .reading import EffectiveWeight, read_weight
from .w_eff import is_within_backward
from .weights import Place, held, is_conv1d


def effective(name: str, read_as: Callable[..., Tensor] = read_weight) -> Any:
    """A property that shadows the parameter ``name`` of an adapted layer; reading it gives W_eff.

    The base weight stays where torch keeps parameters, under the same name. ``state_dict``, moves,
    loading and sharding therefore see the base weight. ``read_as`` makes W_eff of the parameter and
    its places.
    """

    def read(self: Adapted) -> Tensor | None:
        stored = held(self, name)
        if stored is None:
            if name in self._parameters:
                return None
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if self.tcur_is_flattened and _is_between_passes(self, name, stored):
            return stored
        places = self.tcur_places_of(name)
        return read_as(stored, places) if places else stored

    def write(self: Adapted, value: Any) -> None:
        self.__dict__[name] = value  # FSDP1 sets a plain tensor in place of the parameter

    def delete(self: Adapted) -> None:
        del self.__dict__[name]

    return property(read, write, delete, f"W_eff; the base weight is ``base_{name}``.")


def _is_between_passes(module: nn.Module, name: str, stored: Tensor) -> bool:
    """Whether FSDP1 may be asking if the parameter is still the one that it flattened.

    If it found another tensor, it would take that for a new value of the parameter. In a forward
    FSDP1 sets a plain tensor twice. In a backward it sets one once, which may still be there when
    the next forward begins.
    """
    if hasattr(stored, _FLATTENED):
        return True
    return name not in module._parameters and not is_within_backward()


#: The attribute with which FSDP1 marks parameters under ``use_orig_params=True``.
_FLATTENED = "_fsdp_flattened"


def base(name: str) -> Any:
    """A property for the base weight as it is stored; while merged, the copy kept of it."""

    def read(self: Adapted) -> Tensor | None:
        return self.tcur_base(name)

    return property(read, doc=f"The base weight behind ``{name}``, as it is stored.")


class Adapted(nn.Module):
    """What all adapted layers have in common; also derived from the module's own class.

    `adapt_in_place` changes the class of a module to one of these. The object stays the same.
    """

    #: Maps the key of a weight (see `Place.key`) to its place in a stack.
    tcur_places: dict[str | None, Place]
    #: Whether FSDP1 has flattened the parameters and holds them now.
    tcur_is_flattened = False

    def tcur_places_of(self, parameter: str) -> list[Place]:
        """The places whose weights are stored in that parameter."""
        places = self.__dict__.get("tcur_places", {})
        return [place for place in places.values() if place.parameter == parameter]

    def tcur_base(self, name: str) -> Tensor | None:
        """The base weight of that parameter, as it is stored."""
        stored: Tensor | None = held(self, name)
        copies = [p for p in self.tcur_places_of(name) if p.backup is not None]
        if stored is None or not copies:
            return stored
        if copies[0].backup is not None and copies[0].backup.shape == stored.shape:
            return copies[0].backup
        whole = stored.detach().clone()
        for place in copies:
            assert place.backup is not None
            whole[place.first_row : place.first_row + place.out_features] = place.backup
        return whole

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, EffectiveWeight) and name in self._parameters:
            if value.is_of(self._parameters[name]):
                return  # layer.weight = layer.weight
            raise TypeError(
                f"{name}: expected a parameter, got the effective weight of an adapted layer; use "
                f"base_{name}, or a copy: nn.Parameter(weight.detach().clone())"
            )
        if hasattr(value, _FLATTENED):
            self.__dict__["tcur_is_flattened"] = True
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Any:
        """Like ``nn.Module.train``.

        Averages of weights are often swapped in and out together with the mode. So nothing that is
        known of core and weights is trusted afterwards.
        """
        for place in self.tcur_places.values():
            place.stack.doubt()
            if mode != self.training:
                place.stack.base.suspect(place)
        return super().train(mode)

    def __prepare_scriptable__(self) -> NoReturn:
        """Called first when ``torch.jit.script`` compiles a module.

        Raises:
            RuntimeError: always; torch.jit.script cannot compile an adapted layer.
        """
        raise RuntimeError(
            f"torch.jit.script: expected plain layers, got a {type(self).__name__}; script the "
            "copy that adapter.merge(inplace=False) makes"
        )

    def _take_back(self) -> None:
        """Restores a parameter if W_eff, as read from it, was put in its place; see `held`."""
        for place in self.tcur_places.values():
            held(self, place.parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Like ``nn.Module._apply``; copies of base weights that `merge` keeps move too."""
        self._take_back()
        super()._apply(fn, recurse)
        for place in self.tcur_places.values():
            if place.backup is not None:
                place.backup = fn(place.backup)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._take_back()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for place in self.tcur_places.values():
            if place.backup is not None:  # even if merged, a checkpoint holds base and core
                kept = self.tcur_base(place.parameter)
                assert kept is not None
                destination[prefix + place.parameter] = kept if keep_vars else kept.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        merged = [place for place in self.tcur_places.values() if place.backup is not None]
        for place in merged:  # the checkpoint brings the base weight
            place.restore()
        super()._load_from_state_dict(state_dict, prefix, *args)
        for place in merged:
            place.keep()
        for place in self.tcur_places.values():
            place.stack.loaded(place)


class _AdaptedLinear(Adapted):
    """An adapted layer with a single weight."""

    weight = effective("weight")
    base_weight = base("weight")

    @property
    def tcur_place(self) -> Place:
        """The place of the layer's weight."""
        return self.tcur_places[None]

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``input`` [..., in_features] to [..., out_features], with the stack's update."""
        place = self.tcur_places[None]
        output: Tensor = place.stack.forward_slices(input, place)
        return output

    def extra_repr(self) -> str:
        """Sizes, slices and rank, for ``print(model)``."""
        place = self.tcur_place
        sizes = super().extra_repr() or f"nf={place.out_features}, nx={place.in_features}"
        return f"{sizes}, {placed(place)}"


def placed(place: Place) -> str:
    """Slices and rank of a place, for ``print(model)``."""
    last, stack = place.slice_index + place.slices - 1, place.stack
    where = f"{place.slice_index}" if place.slices == 1 else f"{place.slice_index}-{last}"
    return f"slice={where} of {stack.n3}, rank={stack.rank}"


class TProductLinear(_AdaptedLinear, nn.Linear):
    """``nn.Linear`` whose weight is adapted as one or more consecutive slices of a stack.

    This is the same module object as before it was adapted, with its hooks, attributes and
    ``state_dict``; only its class has changed. ``weight`` gives W_eff, differentiable with respect
    to the core. ``base_weight`` is the base weight.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> TProductLinear:
        """A new layer that shares the parameters of ``linear``; the caller must set its place."""
        layer = nn.Linear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device="meta",
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        layer.__class__ = cls
        assert isinstance(layer, cls)
        return layer


class TProductOutProjection(_AdaptedLinear, NonDynamicallyQuantizableLinear):
    """The output projection of an ``nn.MultiheadAttention``; the attention reads its weight."""


@cache
def _adapted_conv1d(kind: Any) -> type[Adapted]:
    made = type(
        "TProductConv1D",
        (_AdaptedLinear, kind),
        {
            "__doc__": "GPT-2's ``Conv1D``, stored (in, out), with its weight in a stack.",
            "__repr__": nn.Module.__repr__,
        },
    )
    made.__module__ = __name__
    return made


def __getattr__(name: str) -> Any:
    """Provides ``TProductConv1D``, derived from transformers' ``Conv1D``, for pickled models."""
    if name == "TProductConv1D":
        from transformers.pytorch_utils import Conv1D

        return _adapted_conv1d(Conv1D)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def adapted_class(module: nn.Module) -> type[Adapted]:
    """The class that a linear layer gets when it is adapted."""
    if is_conv1d(module):
        return _adapted_conv1d(type(module))  # type: ignore[arg-type]
    return TProductLinear if type(module) is nn.Linear else TProductOutProjection


def check_weights(places: Sequence[Place]) -> None:
    """Refuses weights that cannot share a stack; the error says what was expected."""
    first = places[0]
    like = (first.dtype, first.base.device)
    for place in places:
        own = (place.dtype, place.base.device)
        if is_sharded(place.base):
            raise ValueError(
                "linears: expected whole weights, got sharded ones; adapt first, then fully_shard"
            )
        if not place.dtype.is_floating_point:
            raise TypeError(f"linears: expected a floating dtype, got {place.dtype}")
        if place.in_features != first.in_features:
            raise ValueError(
                f"linears: expected {first.in_features} in_features as in the first layer, "
                f"got {place.in_features}"
            )
        if own != like:
            raise ValueError(
                f"linears: expected {like[0]} on {like[1]} as in the first layer, got {own[0]} on "
                f"{own[1]}"
            )


def as_places(weights: Sequence[nn.Linear] | Sequence[Place], n1: int | None) -> list[Place]:
    """Places of weights: as they are given, or those of layers; see `twins_of`."""
    if not isinstance(weights, Sequence):
        raise TypeError(f"linears: expected a list of nn.Linear, got {type(weights).__name__}")
    places = [each for each in weights if isinstance(each, Place)]
    if len(places) < len(weights):
        places = twins_of(weights, n1)  # type: ignore[arg-type]
    if not places:
        raise ValueError("linears: expected at least one nn.Linear, got none")
    return places


def twins_of(linears: Sequence[nn.Linear], n1: int | None) -> list[Place]:
    """Makes adapted layers that share the parameters of these, and returns their places in turn."""
    for linear in linears:
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linears: expected nn.Linear, got {type(linear).__name__}")
        kind = type(linear.weight)
        if kind not in (nn.Parameter, Tensor) and not is_sharded(linear.weight):
            raise TypeError(
                f"linears: expected plain weights, got a {kind.__name__}; adapt takes quantised "
                "layers"
            )
        if linear.weight.requires_grad:
            raise ValueError("linears: expected frozen weights, got one with requires_grad=True")
    n1 = min(linear.out_features for linear in linears) if n1 is None else n1
    places, start = [], 0
    for linear in linears:
        if linear.out_features % n1:
            raise ValueError(
                f"linears: expected out_features to be a multiple of {n1}, got "
                f"{linear.out_features}"
            )
        layer = TProductLinear.from_linear(linear)
        place = Place(layer, start, linear.out_features // n1)
        layer.tcur_places = {None: place}
        places.append(place)
        start += place.slices
    return places
