"""Modules with experts: parameters ``[experts, n1, n2]`` that hold a matrix for each expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .expert_weights import read_experts
from .linear import Adapted, base, effective


def parameters_of_experts(module: nn.Module) -> list[str]:
    """Names of the parameters of a module that may hold a matrix for each expert."""
    return [name for name, held in module._parameters.items() if is_of_experts(held)]


def is_of_experts(parameter: Tensor | None) -> bool:
    """Whether a parameter has the form ``[experts, n1, n2]``."""
    if parameter is None or isinstance(parameter, UninitializedParameter):
        return False
    return parameter.ndim == 3 and parameter.is_floating_point()


class AdaptedExperts(Adapted):
    """A module with experts whose parameters are slices of stacks; its forward is its own.

    This is the same module object as before it was adapted, with its hooks, attributes and
    ``state_dict``; only its class has changed. Reading a parameter gives W_eff, differentiable
    with respect to the core. ``base_<name>`` is the base weight.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        return remade(self, protocol, _blank)


def remade(module: nn.Module, protocol: Any, make: Callable[..., Any]) -> Any:
    """How to pickle or copy a module whose class was made from its former class and some names."""
    found: Any = object.__reduce_ex__(module, max(2, protocol))
    kind: Any = type(module)
    return (make, (kind.__bases__[-1], kind.tcur_names), *found[2:])


def class_of_experts(over: type[nn.Module], plain: type[nn.Module], names: tuple[str, ...]) -> Any:
    """A class derived from both, in which reading one of these parameters gives W_eff."""
    members: dict[str, Any] = {"__doc__": over.__doc__, "tcur_names": names}
    for name in names:
        members[name], members[f"base_{name}"] = effective(name, read_experts), base(name)
    made = type(f"TProduct{plain.__name__}", (over, plain), members)
    made.__module__ = __name__
    return made


@cache
def _adapted_experts(plain: Any, names: tuple[str, ...]) -> Any:
    return class_of_experts(AdaptedExperts, plain, names)


def adapted_experts(plain: type[nn.Module], names: Sequence[str]) -> type[Adapted]:
    """The class that a module with experts gets when one of these parameters is adapted."""
    kind: Any = plain
    made: type[Adapted] = _adapted_experts(kind, tuple(names))
    return made


def _blank(plain: Any, names: tuple[str, ...]) -> Any:
    kind = _adapted_experts(plain, names)
    return kind.__new__(kind)
