"""The base layer of an adapted one: it is called as ever, and has its wrapper compute the result.

peft's layers call their base layer, so that hooks on it run and may bring its weight in. Here the
product and the update are one computation, rounded once, which therefore has to take place within
that call.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..eager import HALVES
from ..functional import slice_update
from ..kept import Layer
from ..nn import TProductStack
from ..places import Place, is_conv1d, is_plain_linear

if TYPE_CHECKING:
    from .layer import TCURLinear

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


class BasePlace(Place):
    """The base weight of a layer, merged or not, as slices of a stack.

    By attribute: under FSDP a plain tensor takes the place of the parameter, a part of one that is
    trained, so that it seems to be trained too.
    """

    layer: TCURLinear | None = None  # the wrapper, once there is one

    def __init__(self, module: nn.Module, slice_index: int = 0, slices: int = 1) -> None:
        super().__init__(
            module, slice_index, slices, transposed=isinstance(module, Conv1D) or is_conv1d(module)
        )

    @property
    def weight(self) -> Tensor:
        """``[out_features, in_features]``, no copy."""
        kept = None if self.layer is None else self.layer.tcur_backup
        weight = _frozen_part(self.module.weight if kept is None else kept)
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """``[out_features]`` or None."""
        return None if self.module.bias is None else _frozen_part(self.module.bias)


def _frozen_part(tensor: Any) -> Tensor:
    assert isinstance(tensor, Tensor)
    if tensor.requires_grad and not isinstance(tensor, nn.Parameter):
        return tensor.detach()
    return tensor


def _is_elsewhere(layer: Layer) -> bool:
    """Whether hooks have put a layer's weight away until the layer is called."""
    weight = layer.weight
    return (
        weight.is_meta
        or weight.shape != (layer.out_features, layer.in_features)
        or not weight.untyped_storage().size()
    )


class AdapterStack(TProductStack):
    """A stack that is called as a module, so that hooks which bring in its core run."""

    def forward(self, place: Place, x: Tensor | None = None) -> Tensor:
        """``x`` through the layer at ``place``; without ``x`` that layer's update, fp32."""
        if x is not None:
            return self.forward_slices(x, place)
        factors = self.factors
        core = self.core.to(factors.dtype)
        return slice_update(factors, core, place.slice_index, place.slices, self.alpha)

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

    def _mode_if_sharded(self) -> str:
        # Offloaded layers, and those of FSDP1, have their weights one at a time.
        if self.mode == "auto" and any(map(_is_elsewhere, self.layers)):
            return "factored"
        return super()._mode_if_sharded()
