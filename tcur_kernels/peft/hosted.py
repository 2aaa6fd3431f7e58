"""The base layer inside an adapted layer; when called, it lets its wrapper compute the result.

peft's layers call their base layer, so that hooks on it run and may load its weight. Here the
product and the update are one computation with one rounding. It must therefore take place within
that call.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..layers.quantised import QuantisedPlace
from ..layers.quantisers import quantiser_of
from ..layers.stack import TProductStack
from ..layers.weights import Place, is_conv1d
from ..matrices import Layout
from ..operators.contract import HALVES
from .experts import HostedExperts, TargetParameter, unhost_experts

#: Computes the adapted output from the input of the base layer.
Compute = Callable[[Tensor], Tensor]


class HostedLinear(nn.Linear):
    """An ``nn.Linear`` that an adapted layer wraps; without ``tcur`` it computes as usual."""

    def forward(self, input: Tensor, tcur: Compute | None = None) -> Tensor:
        """Maps ``input`` [..., in_features] to [..., out_features], with ``tcur`` if given."""
        return super().forward(input) if tcur is None else tcur(input)


class HostedConv1D(Conv1D):  # type: ignore[misc]
    """A transformers ``Conv1D`` that an adapted layer wraps; without ``tcur`` as usual."""

    def forward(self, x: Tensor, tcur: Compute | None = None) -> Tensor:
        """Maps ``x`` [..., in] to [..., out], with ``tcur`` if given."""
        y: Tensor = super().forward(x) if tcur is None else tcur(x)
        return y


#: The class of a base layer -> its class while it is wrapped.
_HOSTED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: HostedLinear, Conv1D: HostedConv1D}

#: The attributes where accelerate keeps the original forward, and where it restores it.
_BOUND = ("_old_forward", "forward")


def is_supported(layer: nn.Module | TargetParameter) -> bool:
    """Whether a layer of this type can be adapted or is adapted already."""
    if isinstance(layer, TargetParameter):
        return True
    is_quantised = quantiser_of(layer) is not None
    return is_quantised or is_conv1d(layer) or type(layer) in (nn.Linear, *_HOSTED.values())


def has_other_forward(layer: nn.Module) -> bool:
    """Whether the layer has another forward than that of its type."""
    bound = vars(layer).get("_old_forward", vars(layer).get("forward"))
    return bound is not None and getattr(bound, "__func__", None) is not type(layer).forward


def host(layer: nn.Module) -> None:
    """Makes a base layer accept ``tcur``; it stays the same object with the same parameters.

    A quantised layer stays as it is, because its product is the library's.
    """
    quantiser = quantiser_of(layer)
    if quantiser is not None:
        quantiser.prepare(layer)
    else:
        _become(layer, _HOSTED[type(layer)])


def unhost(layer: nn.Module) -> None:
    """Undoes `host`, or `experts.host_experts`."""
    if isinstance(layer, HostedExperts):
        unhost_experts(layer)
    for plain, hosted in _HOSTED.items():
        if type(layer) is hosted:
            _become(layer, plain)


def _become(layer: nn.Module, kind: type[nn.Module]) -> None:
    former = type(layer)
    layer.__class__ = kind
    for key in _BOUND:
        bound = vars(layer).get(key)
        if isinstance(bound, types.MethodType) and bound.__func__ is former.forward:
            setattr(layer, key, types.MethodType(kind.forward, layer))


def place_of(layer: nn.Module | TargetParameter, slice_index: int = 0, slices: int = 1) -> Place:
    """The place of a layer's weight, whether the layer is wrapped or not."""
    if isinstance(layer, TargetParameter):
        return layer.place
    if quantiser_of(layer) is not None:
        return QuantisedPlace(layer, slice_index, slices)
    layout: Layout = "transposed" if isinstance(layer, Conv1D) else "matrix"
    return Place(layer, slice_index, slices, layout=layout)


class AdapterStack(TProductStack):
    """A stack that calls itself as a module when it needs its core, so that hooks can load it."""

    def forward(self, compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Calls a method of `TProductStack`."""
        return compute(self, *arguments)

    def forward_slices(self, x: Tensor, place: Place) -> Tensor:
        """Applies the layer of one place to ``x``."""
        y: Tensor = self(TProductStack.forward_slices, x, place)
        return y

    def update_of_tokens(self, x: Tensor, place: Place, transposed: bool) -> Tensor:
        """What the update adds to a product of tokens."""
        y: Tensor = self(TProductStack.update_of_tokens, x, place, transposed)
        return y

    def add_update(self, product: Tensor, x: Tensor, place: Place) -> Tensor:
        """The product of a quantised layer with the update of one place added to it."""
        y: Tensor = self(TProductStack.add_update, product, x, place)
        return y

    def update(self, place: Place) -> Tensor:
        """The update of one place."""
        added: Tensor = self(TProductStack.update, place)
        return added

    def effective_value(self, place: Place) -> Tensor:
        """The numbers of the weight with only this update."""
        value: Tensor = self(TProductStack.effective_value, place)
        return value

    def kept_value(self, place: Place, tokens: int) -> Tensor | None:
        """The numbers of the weight, if so many tokens should use it."""
        value: Tensor | None = self(TProductStack.kept_value, place, tokens)
        return value

    def look(self) -> None:
        """Takes C and R again if the base weights changed."""
        self._look()

    @property
    def is_pending(self) -> bool:
        """Whether a graph of this core still awaits its backward."""
        return self._gradient_sum.is_pending()

    def narrow(self, dtype: torch.dtype) -> None:
        """Stores the core in a 16-bit dtype; computations with it stay in fp32."""
        self.core.data = self.core.data.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterStack:
        """Moves the core with the model; a narrowed core also follows the dtype of the model."""
        is_narrow = self.core.dtype in HALVES
        dtype = fn(self.core.detach()).dtype if is_narrow else None
        super()._apply(fn, recurse)
        if dtype is not None:
            self.narrow(dtype)
        return self
