"""The base weights of a stack, and C and R, which are slices of the weights that are there now."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..operators.factors import CURFactors
from ..processes import is_sharded, whole
from .weights import Place

#: Of a tensor: its address, and how often it was written.
_Version = tuple[int, int]

#: Of every weight, so many numbers are looked at in turn, in rows that lie so far apart.
_SAMPLES, _STRIDE = 4, 7919


def version_of(tensor: Tensor) -> _Version:
    """Changes when the tensor is written to in place or given other memory.

    Inference tensors count no versions; of those only other memory is seen.
    """
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def is_here(place: Place) -> bool:
    """Whether the whole weight is in memory: not sharded, freed, or on the meta device."""
    weight = place.weight
    if weight.is_meta or is_sharded(weight):
        return False
    if weight.shape != (place.out_features, place.in_features):  # FSDP1 flattens shards
        return False
    return weight.untyped_storage().nbytes() > 0  # and frees what it does not need


def check_one_base(weight: Tensor) -> None:
    """Refuses a batch of base weights, as `vmap` over stacked models has.

    Raises:
        ValueError: C and R are of one base.
    """
    functorch = torch._C._functorch
    while not torch.compiler.is_compiling() and functorch.is_functorch_wrapped_tensor(weight):
        if functorch.is_batchedtensor(weight):
            raise ValueError(
                "weight: expected one base weight for all, got a batch of them; C and R are slices "
                "of one base: batch the cores and the inputs"
            )
        weight = functorch.get_unwrapped(weight)


class Base:
    """C and R of a stack, and what tells whether they are still slices of its base weights.

    A weight that was written to, moved or loaded is compared by value, with its own rows of C and R
    alone. Where it differs, C and R are taken anew from the weights that are there.

    Args:
        name: of the stack, for messages.
        places: the weights, in the order of their slices.
        indices: I and J, the rows of R and the columns of C.
        factors: C and R.
        is_own: whether C and R are slices of these weights. Others are kept whatever the weights.

    Attributes:
        rows, columns: I and J.
        generation: changes with C and R, and with the weights.
    """

    def __init__(
        self,
        name: str,
        places: Sequence[Place],
        indices: tuple[Sequence[int], Sequence[int]],
        factors: CURFactors,
        is_own: bool,
    ) -> None:
        self.name, self.places = name, places
        self.rows, self.columns = (tuple(each) for each in indices)
        self.factors, self.is_own = factors, is_own
        self._given = factors.lateral.dtype
        self.generation = 0
        self._turn = 0
        self._samples: list[tuple[Place, int, int, float]] = []
        #: What somebody did to W_eff, to be raised at the next look.
        self.misuse: str | None = None
        self._versions: dict[int, _Version] = {}
        self._unsure: set[int] = set()
        for place in places:
            if is_here(place):
                self._versions[place.slice_index] = version_of(place.weight)
        self._sample()

    def knows(self, place: Place, weight: Tensor) -> bool:
        """Whether the weight of a layer is the one that was looked at last.

        The first layer speaks for all of them: so a pass through the model looks at every weight
        before it uses C and R, which come from all of them.
        """
        first = place.slice_index
        if self._unsure or version_of(weight) != self._versions.get(first):
            return False
        return first > 0 or (self._knows_all() and self._looks_the_same())

    @property
    def is_unsure(self) -> bool:
        """Whether some weight has to be compared before C and R are used."""
        return bool(self._unsure)

    def suspect(self, place: Place | None = None) -> None:
        """Has a weight, or all of them, compared by value before C and R are used again."""
        self._unsure.update(p.slice_index for p in self.places if place is None or p is place)

    def choose(self, rows: Sequence[int], columns: Sequence[int]) -> None:
        """Takes C and R at other indices, which a checkpoint may bring."""
        if self.is_own and (tuple(rows), tuple(columns)) != (self.rows, self.columns):
            self.rows, self.columns = tuple(rows), tuple(columns)
            self.suspect()

    def look(self) -> None:
        """Compares what may have changed, and takes C and R anew where it did.

        Raises:
            RuntimeError: C and R are of other weights than these, and not all weights are here; or
                W_eff was written to.
            ValueError: weights that are not finite.
        """
        if self.misuse is not None:
            message, self.misuse = self.misuse, None
            raise RuntimeError(message)
        here = [place for place in self.places if is_here(place)]
        # Gathered for every layer by FSDP on an accelerator, where a comparison would wait for it.
        gathered = len(here) < len(self.places)
        doubtful = []
        for place in here:
            weight, first = place.weight, place.slice_index
            version = version_of(weight)
            is_new = version != self._versions.get(first)
            if is_new:
                place.freeze()
            if first in self._unsure or (is_new and not (gathered and weight.device.type != "cpu")):
                doubtful.append(place)
            self._versions[first] = version
            self._unsure.discard(first)
        if not doubtful:
            return
        self.generation += 1
        try:
            if not self.is_own:
                self._follow(doubtful[0].weight)
            elif not self._are_of(doubtful):
                self._take()
        except BaseException:  # what was refused once is not known: it is refused again
            self.suspect()
            raise

    def certify(self) -> None:
        """Refuses C and R that are not those of the weights, for code that vouches for them.

        Raises:
            ValueError: weights were written past torch's version counters.
        """
        here = [place for place in self.places if is_here(place)]
        if self.is_own and here and not self._are_of(here):
            raise ValueError(
                f"base: expected the weights that C and R of stack {self.name} were taken from, "
                "got others, written past torch's version counters (by .data, say); call "
                "adapter.invalidate() after such a write"
            )

    @property
    def is_known(self) -> bool:
        """Whether all weights are those that were looked at last."""
        return not self._unsure and self._knows_all()

    def _knows_all(self) -> bool:
        versions = self._versions
        for place in self.places:
            if version_of(place.weight) != versions.get(place.slice_index) and is_here(place):
                return False
        return True

    def _looks_the_same(self) -> bool:
        """Whether one number of one weight is still that in C; another one in every pass.

        A write through ``.data`` leaves no trace. Weights that are all drawn anew that way are
        found out by any number. On the CPU, where nothing has to be waited for.
        """
        if not self._samples:
            return True
        self._turn += 1
        place, row, column, value = self._samples[self._turn % len(self._samples)]
        weight = place.weight
        if version_of(weight) != self._versions.get(place.slice_index):  # it is not here
            return True
        if weight[row, column].item() == value:
            return True
        self.suspect()
        return False

    def _sample(self) -> None:
        """Notes for every weight some of its numbers that are in C."""
        factors, self._samples = self.factors, []
        if not self.is_own or factors.device.type != "cpu":
            return
        for turn in range(_SAMPLES):
            for index, place in enumerate(self.places):
                row = (turn * _STRIDE + index) % place.out_features
                j = (turn + index) % factors.rank
                own = factors.lateral[place.slice_index + row // factors.n1, row % factors.n1, j]
                self._samples.append((place, row, self.columns[j], own.item()))

    def _are_of(self, places: Sequence[Place]) -> bool:
        """Whether these layers' rows of C and R are slices of their weights."""
        factors, same = self.factors, []
        if self._dtype() != factors.lateral.dtype:
            return False
        for place in places:
            weight = place.weight
            if weight.device != factors.device:
                return False
            own = slice(place.slice_index, place.slice_index + place.slices)
            slices = weight.detach().unflatten(0, (place.slices, -1))
            same += [
                (slices[:, :, list(self.columns)] == factors.lateral[own]).all(),
                (slices[:, list(self.rows)] == factors.horizontal[own]).all(),
            ]
        return bool(torch.stack(same).all())  # an accelerator is waited for once

    def _dtype(self) -> torch.dtype:
        """The dtype that all weights have, or the widest where single layers were cast."""
        return functools.reduce(torch.promote_types, (p.weight.dtype for p in self.places))

    def _follow(self, weight: Tensor) -> None:
        """Takes C and R that are not of these weights along to their device and precision."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        if (self.factors.device, self.factors.dtype) != (weight.device, wide):
            # Their own dtype is that of the base that they were taken from, which files name.
            dtype = wide if wide == torch.float64 else self._given
            sides = (self.factors.lateral, self.factors.horizontal)
            self.factors = CURFactors(*(side.to(weight.device, dtype) for side in sides))

    @torch.inference_mode(False)  # what is kept must also serve a training step
    @torch.no_grad()
    def _take(self) -> None:
        lateral, horizontal, dtype = [], [], self._dtype()
        for place in self.places:
            if not is_here(place) and not is_sharded(place.weight):
                raise RuntimeError(
                    f"base: expected all weights of stack {self.name} in memory, since C and R "
                    f"have to be taken anew from weights that changed, got one that is not "
                    f"(slice {place.slice_index}, on {place.weight.device}); load weights before "
                    "they are sharded or offloaded"
                )
            slices = whole(place.weight.detach()).unflatten(0, (place.slices, -1))
            lateral.append(slices[:, :, list(self.columns)].to(dtype))
            horizontal.append(slices[:, list(self.rows)].to(dtype))
        self.factors = CURFactors(torch.cat(lateral), torch.cat(horizontal))
        self._sample()
