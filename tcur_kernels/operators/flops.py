"""Formulas by which torch's ``FlopCounterMode`` counts what the operators multiply.

An operator is one call to the counter, which would take it for nothing. Counted are the products,
as torch counts its own: a multiplication and an addition are two, transforms of tubes are none. The
arithmetic is real: a product of complex numbers is four multiplications.

The module of the counter imports Triton. So nobody imports it here: the formulas are registered
when somebody else does.
"""

from __future__ import annotations

import importlib.machinery
import math
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


def _per_bin(n3: int) -> int:
    """Multiplications and additions for one number of a product, summed over all bins."""
    pairs = (n3 - 1) // 2
    return 2 * (n3 - 2 * pairs) + 8 * pairs


def _materialize(weights: Any, lateral: Shape, horizontal: Shape, core: Shape, *_: Any) -> int:
    n3, rank = core[:2]
    return _per_bin(n3) * lateral[0] * rank * (rank + horizontal[1])


def _core_grad_dense(grad: Shape, lateral: Shape, *_: Any) -> int:
    n3, n1, n2 = grad
    rank = lateral[1] // n3
    return _per_bin(n3) * rank * n2 * (n1 + rank)


def _core_grad_tokens(
    x: Shape,
    grad_y: Shape | None,
    lateral: Shape,
    horizontal: Shape | None,
    n3: int,
    slice_index: int,
    slices: int,
    *_: Any,
) -> int:
    tokens = math.prod(x[:-1])
    n1, q = lateral
    per_token = slices * _per_bin(n3) * (q // n3) ** 2
    if horizontal is not None:
        per_token += 2 * q * horizontal[1]
    if grad_y is not None:
        per_token += 2 * slices * n1 * q
    return tokens * per_token


def _core_of_packed(*_: Any) -> int:
    return 0


def _cur_linear(
    x: Shape,
    weight: Shape | None,
    bias: Shape | None,
    lateral: Shape,
    horizontal: Shape,
    core: Shape,
    slice_index: int,
    slices: int,
    scale: float,
    materialized: bool,
    transposed: bool,
    z: Shape | None = None,
    *_: Any,
) -> int:
    n2, tokens = horizontal[1], math.prod(x[:-1])
    n1, q = lateral
    per_token = 0 if weight is None else 2 * slices * n1 * n2
    if not materialized:
        n3, rank = core[-3:-1]
        first, last = 2 * q * n2, 2 * slices * n1 * q
        if transposed:
            first, last = last, first
        per_token += (first if z is None else 0) + slices * _per_bin(n3) * rank**2 + last
    return tokens * per_token


_FORMULAS: dict[str, Callable[..., int]] = {
    "materialize": _materialize,
    "materialize_out": _materialize,
    "core_grad_dense": _core_grad_dense,
    "core_grad_tokens": _core_grad_tokens,
    "core_of_packed": _core_of_packed,
    "cur_linear": _cur_linear,
}

#: What the counter is told when it is imported.
_waiting: list[tuple[torch._ops.OpOverloadPacket, Callable[..., int]]] = []


def count(name: str, packet: torch._ops.OpOverloadPacket) -> None:
    """Has the calls of an operator counted, ``name`` in whatever language."""
    _waiting.append((packet, _FORMULAS[name]))
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

    def counted(*args: Any, out_shape: Any = None, out: Any = None) -> int:
        return formula(*args)

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
