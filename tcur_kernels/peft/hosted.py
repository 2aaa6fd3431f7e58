"""The base layer of an adapted one: it is called as ever, and has its wrapper compute the result.

peft's layers call their base layer, so that hooks on it run and may bring its weight in. Here the
product and the update are one computation, rounded once, which therefore has to take place within
that call.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..layers.stack import TProductStack
from ..layers.weights import Place, is_conv1d, is_plain_linear
from ..operators.contract import HALVES

#: From the input that reaches the base layer to its adapted output.
Compute = Callable[[Tensor], Tensor]


class HostedLinear(nn.Linear):
    """``nn.Linear`` that an adapted layer wraps. Without ``tcur`` it is no other."""

    def forward(self, input: Tensor, tcur: Compute | None = None) -> Tensor:
        """``input`` [..., in_features] -> [..., out_features]; by ``tcur`` if it is given."""
        return super().forward(input) if tcur is None else tcur(input)


class HostedConv1D(Conv1D):  # type: ignore[misc]
    """``Conv1D`` of transformers that an adapted layer wraps. Without ``tcur`` it is no other."""

    def forward(self, x: Tensor, tcur: Compute | None = None) -> Tensor:
        """``x`` [..., in] -> [..., out]; by ``tcur`` if it is given."""
        y: Tensor = super().forward(x) if tcur is None else tcur(x)
        return y


#: What a base layer becomes while it is wrapped, by what it is.
_HOSTED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: HostedLinear, Conv1D: HostedConv1D}

#: Where accelerate keeps the forward that its hooks end in, and where it puts it back.
_BOUND = ("_old_forward", "forward")


def is_supported(layer: nn.Module) -> bool:
    """Whether a layer of this type can be adapted, or is already."""
    return is_plain_linear(layer) or is_conv1d(layer) or type(layer) in _HOSTED.values()


def has_other_forward(layer: nn.Module) -> bool:
    """Whether calling the layer ends in another forward than that of its type."""
    bound = vars(layer).get("_old_forward", vars(layer).get("forward"))
    return bound is not None and getattr(bound, "__func__", None) is not type(layer).forward


def host(layer: nn.Module) -> None:
    """Makes a base layer take ``tcur``; it stays the same object with the same parameters."""
    _become(layer, _HOSTED[type(layer)])


def unhost(layer: nn.Module) -> None:
    """Makes it what it was before."""
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


def place_of(layer: nn.Module, slice_index: int = 0, slices: int = 1) -> Place:
    """Where the weight of a layer is, wrapped or not."""
    return Place(layer, slice_index, slices, transposed=isinstance(layer, Conv1D))


class AdapterStack(TProductStack):
    """A stack that is called as a module where it needs its core, so that hooks bring it in."""

    def forward(self, compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """What a method of `TProductStack` computes."""
        return compute(self, *arguments)

    def forward_slices(self, x: Tensor, place: Place) -> Tensor:
        """``x`` through the layer of one place."""
        y: Tensor = self(TProductStack.forward_slices, x, place)
        return y

    def update(self, place: Place) -> Tensor:
        """What the core adds to one place."""
        added: Tensor = self(TProductStack.update, place)
        return added

    def effective_value(self, place: Place) -> Tensor:
        """The numbers of the weight with this update alone."""
        value: Tensor = self(TProductStack.effective_value, place)
        return value

    def look(self) -> None:
        """Takes C and R anew if the base weights changed."""
        self._look()

    @property
    def is_pending(self) -> bool:
        """Whether a graph of this core waits for its backward."""
        return self._gradient_sum.is_pending()

    def narrow(self, dtype: torch.dtype) -> None:
        """Has the parameter of the core in a 16-bit dtype; what is computed of it stays fp32."""
        self.core.data = self.core.data.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterStack:
        """Moves with the model; a core that was narrowed is what the model is cast to."""
        is_narrow = self.core.dtype in HALVES
        dtype = fn(self.core.detach()).dtype if is_narrow else None
        super()._apply(fn, recurse)
        if dtype is not None:
            self.narrow(dtype)
        return self
