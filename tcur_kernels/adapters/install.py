"""Puts the layers of stacks into a model, and takes them out of a merged copy."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..layers import TProductConv1D, TProductMultiheadAttention, plain
from ..linear import TProductLinear
from ..nn import TProductStack
from ..places import Place
from .plan import Plan
from .weights import Weight, aliases, find_weights

#: torch's own transformer modules read the weights of their layers past their forward when nobody
#: asks for gradients; these attributes keep them from it. (type, attribute, value)
_SHORTCUTS = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_BEFORE = "_tcur_shortcut_before"

#: What takes the place of layers.
ADAPTED = (TProductConv1D, TProductMultiheadAttention, TProductLinear)


def put_in_place(model: nn.Module, plan: Plan, stacks: Mapping[str, TProductStack]) -> None:
    """Replaces the plan's layers in the model, by each of the names that they go by.

    Stacks are built on frozen stand-ins; their layers take the model's own parameters here.
    """
    weights = find_weights(model)
    attentions: dict[str, dict[str, tuple[TProductStack, int]]] = {}
    for stack_plan in plan.stacks:
        stack = stacks[stack_plan.name]
        for index, member in enumerate(stack_plan.members):
            weight = weights[member.module]
            if weight.owner != weight.name:
                part = weight.name.rpartition(".")[2]
                attentions.setdefault(weight.owner, {})[part] = (stack, index)
            else:
                _replace(model, weight.module, _layer(stack, index, weight))
    for owner, parts in attentions.items():
        module = model.get_submodule(owner)
        assert isinstance(module, nn.MultiheadAttention)
        _replace(model, module, _attention(module, parts))
    for module in model.modules():
        for kind, attribute, off in _SHORTCUTS:
            if isinstance(module, kind) and _holds_adapted(module):
                setattr(module, _BEFORE, getattr(module, attribute))
                setattr(module, attribute, off)


def take_out(model: nn.Module) -> None:
    """Puts plain layers, with the weights they have now, in the place of all adapted ones."""
    adapted = (TProductConv1D, TProductMultiheadAttention, TProductLinear)
    outermost = [m for m in model.modules() if isinstance(m, adapted)]
    inside = {id(m.out_proj) for m in outermost if isinstance(m, TProductMultiheadAttention)}
    for module in outermost:
        if id(module) not in inside:
            _replace(model, module, plain(module))
    for holder in model.modules():
        for kind, attribute, _ in _SHORTCUTS:
            if isinstance(holder, kind) and hasattr(holder, _BEFORE):
                setattr(holder, attribute, getattr(holder, _BEFORE))
                delattr(holder, _BEFORE)


def _layer(stack: TProductStack, index: int, weight: Weight) -> nn.Module:
    """The layer that takes the place of ``nn.Linear`` or ``Conv1D``."""
    layer = stack.layers[index]
    if isinstance(weight.module, nn.Linear):
        assert isinstance(layer, TProductLinear)
        layer.weight, layer.bias = weight.module.weight, weight.module.bias
        return layer
    place = Place(weight.module, layer.slice_index, layer.slices)
    conv1d = TProductConv1D.from_conv1d(weight.module, stack, place)
    stack.layers[index] = conv1d.place
    return conv1d


def _attention(
    module: nn.MultiheadAttention, parts: Mapping[str, tuple[TProductStack, int]]
) -> TProductMultiheadAttention:
    out_proj, projections = None, {}
    for name, (stack, index) in parts.items():
        layer = stack.layers[index]
        if name == "out_proj":
            assert isinstance(layer, TProductLinear)
            layer.weight, layer.bias = module.out_proj.weight, module.out_proj.bias
            out_proj = layer
        else:
            place = Place(module, layer.slice_index, layer.slices, name)
            projections[name] = (stack, place)
    attention = TProductMultiheadAttention.from_attention(module, projections, out_proj)
    for name, (stack, index) in parts.items():
        if name in attention.places:
            stack.layers[index] = attention.places[name][1]
    return attention


def _holds_adapted(module: nn.Module) -> bool:
    return any(isinstance(part, ADAPTED) for part in module.modules())


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for name in aliases(model, old):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
