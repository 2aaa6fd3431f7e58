"""What a stack keeps from one call to the next, and what tells whether it still holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef


class Layer(Protocol):
    """What a stack asks of its layers: a weight [out_features, in_features], and which slices."""

    @property
    def weight(self) -> Tensor:
        """``[out_features, in_features]``, a view where it is stored otherwise."""

    @property
    def bias(self) -> Tensor | None:
        """``[out_features]`` or None."""

    slice_index: int
    slices: int
    in_features: int
    out_features: int


class Stack(Protocol):
    """What a layer asks of its stack."""

    n1: int
    n3: int
    rank: int

    def forward_slices(self, x: Tensor, layer: Layer) -> Tensor:
        """``x`` through the slices of one layer."""


class Effective:
    """W_eff of one core version, and what tells whether it is still that of the present core."""

    def __init__(self, buffer: Tensor, core: Tensor, layers: Sequence[Layer]) -> None:
        self.buffer = buffer
        self._views: dict[int, Tensor] = {}
        self._core = core.detach().clone()
        self._core_version = version_of(core)
        self._weight_versions = {layer.slice_index: version_of(layer.weight) for layer in layers}

    def is_current(self, dtype: torch.dtype, core: Tensor, layers: Sequence[Layer]) -> bool:
        """Whether this is W_eff of ``core`` in ``dtype``, as far as ``layers`` are concerned."""
        if dtype != self.buffer.dtype:
            return False
        for layer in layers:
            if version_of(layer.weight) != self._weight_versions[layer.slice_index]:
                return False
        if core.device.type == "cpu":
            # Writes through core.data leave the version as it was. The core is small, and on the
            # CPU nothing has to wait for a comparison: never train on a stale W_eff.
            return torch.equal(core, self._core)
        return version_of(core) == self._core_version

    def view_of(self, layer: Layer) -> Tensor:
        """The slices of one layer, ``[out_features, in_features]``."""
        view = self._views.get(layer.slice_index)
        if view is None:
            with torch.inference_mode(False):
                view = slices_of(self.buffer, layer)
            self._views[layer.slice_index] = view
        return view

    def reclaim(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The buffer, if it fits and nobody else (a pending backward) holds a view of it."""
        lent = [TensorWeakRef(view) for view in self._views.values()]
        self._views.clear()
        in_use = any(ref() is not None for ref in lent)
        fits = self.buffer.dtype == dtype and self.buffer.device == device
        return self.buffer if fits and not in_use else None


class Projected:
    """z of the latest input, for the next layer that has the same one. Keeps neither alive."""

    __slots__ = ("_grad", "_horizontal_hat", "_version", "_x", "_z", "held")

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """As if nothing had been projected yet."""
        self._x: TensorWeakRef | None = None
        self._z: TensorWeakRef | None = None
        self._horizontal_hat: Tensor | None = None
        self._version = (0, 0)
        self._grad = False
        #: z itself, where no graph keeps it.
        self.held: Tensor | None = None

    def put(self, x: Tensor, z: Tensor, horizontal_hat: Tensor, hold: bool) -> None:
        """z of ``x`` by these packed factors; ``hold``: kept alive until the next one."""
        self._x, self._version = TensorWeakRef(x), version_of(x)
        self._z, self._horizontal_hat = TensorWeakRef(z), horizontal_hat
        self._grad = z.requires_grad
        self.held = z if hold else None

    def z_of(self, x: Tensor, horizontal_hat: Tensor) -> Tensor | None:
        """z, if ``x`` is that very tensor, unchanged, and z is still around."""
        if self._x is None or self._z is None or horizontal_hat is not self._horizontal_hat:
            return None
        if x.is_inference():  # counts no versions: written to in place, it would look the same
            return None
        if self._x() is not x or version_of(x) != self._version or self._grad != x.requires_grad:
            return None
        z: Tensor | None = self._z()
        return z


def slices_of(w_eff: Tensor, layer: Layer) -> Tensor:
    """The part of W_eff that belongs to a layer, as its weight ``[out_features, in_features]``."""
    block = w_eff[layer.slice_index : layer.slice_index + layer.slices]
    return block.view(layer.out_features, layer.in_features)


def version_of(tensor: Tensor) -> tuple[int, int]:
    """Changes when the tensor is written to in place or given other memory.

    Inference tensors count no versions; of those only other memory is seen.
    """
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
