"""Records that hold tensors: how they are printed, and when two of them are equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor


class HoldsTensors:
    """For dataclasses whose fields are tensors, made with ``eq=False, repr=False``.

    They print dtypes and shapes rather than numbers. Two are equal if all their tensors hold the
    same numbers in the same dtype, on the same device.
    """

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def __repr__(self) -> str:
        parts = [f"{name}={_described(value)}" for name, value in self._fields().items()]
        return f"{type(self).__name__}({', '.join(parts)})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return _equal(self._fields(), other._fields())

    def __hash__(self) -> int:
        return hash(repr(self))  # of dtypes and shapes: what is equal has the same


def _described(value: Any) -> str:
    """A value in short: of a tensor its dtype and shape."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_described, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_described(own)}' for key, own in value.items())}}}"
    return repr(value)


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are equal, tensors by their numbers."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            return False
        same_kind = one.dtype == other.dtype and one.device == other.device
        return same_kind and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return type(other) is type(one) and len(other) == len(one) and all(map(_equal, one, other))
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping)
            and one.keys() == other.keys()
            and all(_equal(value, other[key]) for key, value in one.items())
        )
    return bool(one == other)
