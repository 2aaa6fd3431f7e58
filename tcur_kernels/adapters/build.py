"""Builds the stack for an entry of a plan, without changing the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from ..layers.stack import TProductStack
from ..layers.weights import Place
from .plan import StackPlan

_Stack = TypeVar("_Stack", bound=TProductStack)


def places_of(plan: StackPlan, found: Mapping[str, Place]) -> list[Place]:
    """The weights of a stack, in the order of their slices.

    Args:
        plan: the stack.
        found: name of a layer -> the place of its weight; see `linear_maps.find_weights`.
    """
    places: list[Place] = []
    first = 0
    for member in plan.members:
        places.append(found[member.module].at(first, member.slices, member.module))
        first += member.slices
    return places


def build_stack(
    kind: type[_Stack], plan: StackPlan, found: Mapping[str, Place], **settings: Any
) -> _Stack:
    """The stack of an entry, of the class ``kind``; ``settings`` are those of `TProductStack`.

    Raises:
        ValueError: settings or weights do not fit; the message names the stack.
    """
    with errors_named(plan):
        return kind(places_of(plan, found), name=plan.name, **settings)


def check_layers(
    plan: StackPlan, found: Mapping[str, Place], kind_of: Callable[[str], str]
) -> None:
    """Refuses a model that lacks layers of a saved stack.

    Args:
        plan: the stack.
        found: name of a layer -> the place of its weight.
        kind_of: describes, for errors, a module that is not among these.

    Raises:
        ValueError: a layer is missing or has another shape; the message names it.
    """
    for member in plan.members:
        if member.module not in found:
            raise ValueError(
                f"model: expected a linear layer {member.module} as in the adapter, got "
                f"{kind_of(member.module)}"
            )
        shape = list(found[member.module].shape)
        expected = [member.slices * plan.n1, plan.n2]
        if shape != expected:
            raise ValueError(
                f"model: expected {member.module} of shape {expected} (out, in) as in the adapter, "
                f"got {shape}"
            )


@contextmanager
def errors_named(plan: StackPlan) -> Iterator[None]:
    """Context in which the message of a ``ValueError`` begins with the name of the stack."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"stack {plan.name}: {error}") from error
