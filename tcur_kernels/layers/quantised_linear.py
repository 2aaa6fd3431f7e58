"""The adapted classes of quantised layers: the library's product, and the update added to it."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .linear import Adapted, placed
from .weights import Place, held


class QuantisedLinear(Adapted):
    """What adapted quantised layers have in common; also derived from the layer's own class.

    ``weight`` stays the packed weight of the library, because the library's forward reads it.
    `effective_weight` gives W_eff.
    """

    @property
    def tcur_place(self) -> Place:
        """The place of the layer's weight."""
        return self.tcur_places[None]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Maps x [..., in_features] to [..., out_features], with the stack's update.

        Arguments are those of the layer's own class; x is the first one.
        """
        place = self.tcur_places[None]
        product = super().forward(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        y: Tensor = place.stack.add_update(product, x, place)
        return y

    def effective_weight(self) -> Tensor:
        """W_eff ``[out_features, in_features]``: the dequantised weight plus the update.

        It is a new tensor in at least fp32, differentiable with respect to the core. While the
        adapter is disabled, it is the dequantised weight.
        """
        place = self.tcur_places[None]
        place.ran = True
        return effective_numbers(place)

    def extra_repr(self) -> str:
        """Sizes, slices and rank, for ``print(model)``."""
        return f"{super().extra_repr()}, {placed(self.tcur_place)}"


def effective_numbers(place: Place) -> Tensor:
    """W_eff of one place, in at least fp32 and not rounded to the dtype of the weight."""
    weight, stack = place.weight, place.stack
    if not stack.enabled:
        return weight.to(torch.promote_types(weight.dtype, torch.float32))
    update: Tensor = stack.update(place)
    return weight.to(update.dtype) + update


class TProductTorchaoLinear(QuantisedLinear, nn.Linear):
    """An ``nn.Linear`` with a weight of torchao, which is adapted in a stack."""


#: Name of an adapted class -> where the class of the layer is.
_PLAIN = {
    "TProductLinear4bit": ("bitsandbytes.nn.modules", "Linear4bit"),
    "TProductLinearFP4": ("bitsandbytes.nn.modules", "LinearFP4"),
    "TProductLinearNF4": ("bitsandbytes.nn.modules", "LinearNF4"),
    "TProductLinear8bitLt": ("bitsandbytes.nn.modules", "Linear8bitLt"),
    "TProductHQQLinear": ("hqq.core.quantize", "HQQLinear"),
}


@cache
def _adapted(kind: Any) -> type[QuantisedLinear]:
    doc = f"``{kind.__name__}`` of {kind.__module__.partition('.')[0]}, adapted in a stack."
    made = type(f"TProduct{kind.__name__}", (QuantisedLinear, kind), {"__doc__": doc})
    made.__module__ = __name__
    return made


def __getattr__(name: str) -> Any:
    """Provides the adapted classes of bitsandbytes and HQQ, for pickled models."""
    if name in _PLAIN:
        where, kind = _PLAIN[name]
        return _adapted(getattr(importlib.import_module(where), kind))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def quantised_class(module: nn.Module) -> type[QuantisedLinear]:
    """The class that a quantised layer gets when it is adapted."""
    if type(module) is nn.Linear:
        return TProductTorchaoLinear
    return _adapted(type(module))  # type: ignore[arg-type]


@torch.no_grad()
def plain_linear(place: Place, w_eff: Tensor, dtype: torch.dtype) -> nn.Linear:
    """A new ``nn.Linear`` for a quantised layer: W_eff, rounded once to ``dtype``, and its bias."""
    module = place.module
    bias = held(module, "bias")
    layer = nn.Linear(place.in_features, place.out_features, bias is not None, device="meta")
    layer.weight = nn.Parameter(w_eff.to(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(dtype).clone(), requires_grad=False)
    layer.train(module.training)
    for name in _HOOKS:
        getattr(layer, name).update(getattr(module, name))
    return layer


#: Where an ``nn.Module`` keeps the hooks that users register.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
