"""Experts in peft: the parameters that a config targets, and the modules that hold them.

The module with the experts keeps its own forward. While it is wrapped, reading one of its
parameters gives the weight with the active adapters; its wrapper knows which these are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from ..adapters.linear_maps import place_of_experts
from ..layers.experts import class_of_experts, parameters_of_experts, remade
from ..layers.weights import Place


class TargetParameter:
    """A parameter ``[experts, n1, n2]`` that the config of an adapter targets.

    Args:
        module: what holds it.
        key: its name there.
    """

    def __init__(self, module: nn.Module, key: str) -> None:
        self.module, self.key = module, key

    @property
    def place(self) -> Place:
        """The place of its weight."""
        return place_of_experts(self.module, self.key)


class HostedExperts(nn.Module):
    """A module with experts that an adapted layer wraps, ``tcur_wrapper``."""

    tcur_is_flattened = False

    def tcur_places_of(self, parameter: str) -> list[Place]:
        """The places of the parameter in the stacks of the active adapters."""
        wrapper = self.__dict__.get("tcur_wrapper")
        places: list[Place] = [] if wrapper is None else wrapper.active_places(parameter)
        return places

    def tcur_base(self, name: str) -> Any:
        """The base weight of that parameter, as it is stored."""
        return self.__dict__["tcur_wrapper"].tcur_bases[name].base

    def __reduce_ex__(self, protocol: Any) -> Any:
        return remade(self, protocol, _blank)


@cache
def _hosted(plain: Any, names: tuple[str, ...]) -> Any:
    return class_of_experts(HostedExperts, plain, names)


def _blank(plain: Any, names: tuple[str, ...]) -> Any:
    kind = _hosted(plain, names)
    return kind.__new__(kind)


def host_experts(module: nn.Module, wrapper: nn.Module) -> None:
    """Has the reads of the parameters of a module ask its wrapper; it stays the same object."""
    module.__dict__["tcur_wrapper"] = wrapper  # no submodule: the module is one of the wrapper
    kind: Any = type(module)
    module.__class__ = _hosted(kind, tuple(parameters_of_experts(module)))


def unhost_experts(module: HostedExperts) -> None:
    """Undoes `host_experts`."""
    del module.__dict__["tcur_wrapper"]
    module.__class__ = type(module).__bases__[-1]
