"""Quantised weights as slices of a stack: they are dequantised when their numbers are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import without_autocast
from ..decompose.made import MadeSlices
from ..decompose.slices import Slices
from ..decompose.tensor import as_slices
from ..matrices import Layout
from .quantisers import Quantiser, quantiser_of
from .weights import Place, Version, held, version_of


class QuantisedPlace(Place):
    """The weight of a quantised layer, which forms one or more consecutive slices of a stack.

    ``weight`` dequantises it, anew at each use: no copy stays in memory. ``base`` and ``stored``
    are the packed tensor, which nothing here writes to.

    Args:
        module: the layer, adapted or not.
        slice_index, slices: the first slice, and how many there are.
        projection, layout, own: as for `Place`; there is only one weight, so they say nothing.
        quantiser: how the layer keeps its weight; by default as its type says.
    """

    quantiser: Quantiser

    def __init__(
        self,
        module: nn.Module,
        slice_index: int = 0,
        slices: int = 1,
        projection: str | None = None,
        layout: Layout | None = None,
        own: str = "",
        quantiser: Quantiser | None = None,
    ) -> None:
        found = quantiser_of(module) if quantiser is None else quantiser
        assert found is not None
        self.quantiser = found
        super().__init__(module, slice_index, slices, own=found.parameter)

    def at(self, slice_index: int, slices: int, name: str) -> Place:
        """A new place for the same weight, with other slices and a name; in no stack yet."""
        place = QuantisedPlace(self.module, slice_index, slices, quantiser=self.quantiser)
        place.name = name
        return place

    @property
    def kind(self) -> str:
        """The library and its format."""
        return self.quantiser.kind(self.module)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight, ``[out_features, in_features]``."""
        return self.quantiser.shape(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dequantised numbers."""
        return self.quantiser.dtype(self.module)

    @property
    def weight(self) -> Tensor:
        """The dequantised weight ``[out_features, in_features]``, a new tensor."""
        with torch.no_grad(), without_autocast():
            return self.quantiser.dequantised(self.module)

    @property
    def base(self) -> Tensor:
        """A plain tensor of the packed weight, on its device."""
        return self.quantiser.parts(self.module)[0]

    @property
    def version(self) -> Version:
        """A value that changes when some part of the packed weight may have changed."""
        outer: Tensor = held(self.module, self.own)
        # Writes below autograd, to the parts of a tensor of another class, count on the outer one.
        counted = -1 if outer.is_inference() else outer._version
        return counted, *(version_of(part) for part in self.quantiser.parts(self.module))

    @property
    def key(self) -> str | None:
        """None: the layer has just one weight."""
        return None

    def keep(self) -> None:
        """Refuses to keep a copy, because W_eff cannot be written to a packed weight.

        Raises:
            ValueError: always.
        """
        raise ValueError(REFUSED)


#: What in-place merging says.
REFUSED = (
    "merge: expected weights that W_eff can be written to, got quantised ones, which would round "
    "the update away; merge(inplace=False) gives a copy with plain layers in their place"
)


class Form:
    """What a plan needs to know of a weight, where its numbers would take time and memory.

    Args:
        place: the weight.

    Attributes:
        shape, dtype, device: of the weight ``[out, in]``.
        kind: how it is quantised.
        is_meta: whether it is not loaded.
    """

    def __init__(self, place: QuantisedPlace) -> None:
        self.shape, self.dtype, self.kind = place.shape, place.dtype, place.kind
        self.device, self.is_meta = place.base.device, place.base.is_meta


def form_of(place: Place) -> Any:
    """The weight itself, or the `Form` of a quantised one."""
    return Form(place) if isinstance(place, QuantisedPlace) else place.weight


class Numbers(Mapping[str, Tensor]):
    """The weights of places, by name; each is dequantised when it is asked for, and not kept."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def kinds_of(places: Sequence[Place]) -> tuple[str, ...]:
    """How the weights of these places are quantised, each kind once; empty if none is."""
    kinds = [place.kind for place in places if isinstance(place, QuantisedPlace)]
    return tuple(dict.fromkeys(kinds))


def slices_of_places(
    name: str, places: Sequence[Place], max_workspace: int, progress: bool, n1: int
) -> Slices:
    """The weights of these places as a stack to be read; quantised ones one layer at a time."""
    if not kinds_of(places):
        weights = [place.weight.detach() for place in places]
        return as_slices(name, weights, max_workspace, progress, n1)

    def maker(place: Place) -> Callable[[], Tensor]:
        return lambda: place.weight

    first = places[0]
    return MadeSlices(
        name,
        [maker(place) for place in places],
        [place.out_features // n1 for place in places],
        n1,
        first.in_features,
        first.dtype,
        first.base.device,
        max_workspace,
        progress,
    )
