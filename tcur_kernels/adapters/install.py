"""Puts stacks into a model, and takes them out of a merged copy."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..layers.attention import adapt_in_place, put_back
from ..layers.linear import Adapted
from ..layers.stack import TProductStack
from .holding import Caretaker


def is_adapted(model: nn.Module) -> bool:
    """Whether a model, or a part of it, is adapted."""
    return any(isinstance(module, Adapted) for module in model.modules())


def put_in_place(model: nn.Module, stacks: Mapping[str, TProductStack]) -> None:
    """Adapts the layers of stacks in place, and makes the cores parameters of the model.

    Raises:
        ValueError: attributes of the model clash with names of cores. The model is then unchanged.
    """
    caretaker = Caretaker(model, stacks)
    caretaker.check_free()
    for stack in stacks.values():
        adapt_in_place(stack.places)
    caretaker.move_in()


def stacks_of(model: nn.Module) -> dict[str, TProductStack]:
    """The stacks of an adapted model, by name."""
    layers = [module for module in model.modules() if isinstance(module, Adapted)]
    stacks = [place.stack for layer in layers for place in layer.tcur_places.values()]
    return {stack.name: stack for stack in stacks}


def take_out(model: nn.Module, stacks: Mapping[str, TProductStack]) -> None:
    """Makes a model plain again; its layers keep the weights that they hold now.

    Args:
        model: an adapted model.
        stacks: its stacks, by name, as `stacks_of` finds them in a model whose layers are all
            there.
    """
    Caretaker(model, stacks).move_out()
    for module in model.modules():
        if isinstance(module, Adapted):
            put_back(module)
