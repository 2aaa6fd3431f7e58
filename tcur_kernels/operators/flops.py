"""How torch's ``FlopCounterMode`` comes to count what the operators multiply.

An operator is one call to the counter, which would take it for nothing; so each has a formula.
Counted are the products, as torch counts its own: a multiplication and an addition are two,
transforms of tubes are none. The arithmetic is real: a product of complex numbers is four
multiplications.

The module of the counter imports Triton, so this module does not import it. It registers the
formulas when the program imports the counter.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"


def per_bin(n3: int) -> int:
    """Multiplications and additions for one number of a product, summed over all bins."""
    pairs = (n3 - 1) // 2
    return 2 * (n3 - 2 * pairs) + 8 * pairs


#: What the counter is told when it is imported.
_waiting: list[tuple[torch._ops.OpOverloadPacket, Callable[..., int]]] = []


def count(packet: torch._ops.OpOverloadPacket, formula: Callable[..., int]) -> None:
    """Has the calls of an operator counted by a formula of its arguments, of tensors the shapes."""
    _waiting.append((packet, formula))
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(counter: ModuleType) -> None:
    while _waiting:
        packet, formula = _waiting.pop()
        counter.register_flop_formula(packet)(_of_shapes(formula))


def _of_shapes(formula: Callable[..., int]) -> Callable[..., int]:
    """The formula without the shapes of results, which the counter hands over too."""

    def counted(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    return counted


class _Finder(MetaPathFinder):
    """Finds the module of the counter as Python does, once, and tells it the formulas."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """That of the counter, loaded as usual and then told."""
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
