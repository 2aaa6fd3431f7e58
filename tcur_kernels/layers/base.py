"""The base weights of a stack, and its C and R, which must stay slices of these weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..matrices import shape_of
from ..operators.basis import Basis
from ..operators.factors import CURFactors
from ..processes import is_sharded, whole
from .weights import Place, Version

#: How many numbers of each weight are checked in turn, and how far apart their rows lie.
_SAMPLES, _STRIDE = 4, 7919


def is_here(place: Place) -> bool:
    """Whether the whole weight is in memory: not sharded, freed, or on the meta device."""
    base = place.base
    if base.is_meta or is_sharded(base):
        return False
    if place.quantiser is not None:
        return True
    # FSDP1 flattens shards, which then hold no matrix.
    if shape_of(base.shape, place.layout) != (place.out_features, place.in_features):
        return False
    return base.untyped_storage().nbytes() > 0  # FSDP1 also frees what it does not need


def check_one_base(weight: Tensor) -> None:
    """Refuses a batch of base weights, such as `vmap` over stacked models creates.

    Raises:
        ValueError: the weight is a batch, while C and R belong to a single base.
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
    """C and R of a stack; notices when they are no longer slices of the base weights.

    After a weight is written to, moved or loaded, its values are compared with its own slices of C
    and R. If they differ, C and R are taken again from the present weights.

    Args:
        name: of the stack, for messages.
        places: the weights, in the order of their slices.
        indices: I and J: the rows that R takes and the columns that C takes.
        factors: C and R.
        is_own: whether C and R are slices of these weights. If not, they never change with the
            weights.

    Attributes:
        rows, columns: I and J.
        generation: a counter that grows whenever C, R or the weights may have changed.
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
        self._given = factors.slices[0].dtype
        self.generation = 0
        self._turn = 0
        self._samples: list[tuple[Place, int, int, float]] = []
        #: Message about a forbidden write to W_eff; the next `look` raises it.
        self.misuse: str | None = None
        self._versions: dict[int, Version] = {}
        self._unsure: set[int] = set()
        for place in places:
            if is_here(place):
                self._versions[place.slice_index] = place.version
        self._sample()

    def knows(self, place: Place) -> bool:
        """Whether the weight of a layer is unchanged since the last look.

        C and R come from the weights of all layers. The first layer therefore checks all of them,
        before a pass through the model uses C and R. The other layers check only their own weight.
        """
        first = place.slice_index
        if self._unsure or place.version != self._versions.get(first):
            return False
        return first > 0 or (self._knows_all() and self._looks_the_same())

    @property
    def is_unsure(self) -> bool:
        """Whether some weight must be compared before C and R are used."""
        return bool(self._unsure)

    def suspect(self, place: Place | None = None) -> None:
        """Requests that one weight, or all, be compared by value before C and R are used again."""
        root = None if place is None else place.root
        self._unsure.update(p.slice_index for p in self.places if root is None or p is root)

    def choose(self, rows: Sequence[int], columns: Sequence[int]) -> None:
        """Changes to other indices I and J, for example those of a loaded checkpoint."""
        if self.is_own and (tuple(rows), tuple(columns)) != (self.rows, self.columns):
            self.rows, self.columns = tuple(rows), tuple(columns)
            self.suspect()

    def change_basis(self, basis: Basis) -> None:
        """Makes C and R anew of the same slices, in another basis."""
        self.factors = CURFactors(*self.factors.slices, basis)
        self._sample()
        self.generation += 1

    def look(self) -> None:
        """Compares the weights that may have changed; if they did, takes C and R again.

        What `knows` goes by is written at the end, because other threads ask it meanwhile.

        Raises:
            RuntimeError: the weights changed, but not all of them are in memory; or W_eff was
                written to.
            ValueError: some weights are not finite.
        """
        if self.misuse is not None:
            message, self.misuse = self.misuse, None
            raise RuntimeError(message)
        here = [place for place in self.places if is_here(place)]
        # If some weights are missing, FSDP gathers them again for every layer. On an accelerator
        # each comparison would then wait for the device.
        gathered = len(here) < len(self.places)
        doubtful, versions = [], {}
        for place in here:
            first, version = place.slice_index, place.version
            is_new = version != self._versions.get(first)
            if is_new:
                place.freeze()
            if first in self._unsure or (
                is_new and not (gathered and place.base.device.type != "cpu")
            ):
                doubtful.append(place)
            versions[first] = version
        if doubtful:
            self.generation += 1
            try:
                if not self.is_own:
                    self._follow(doubtful[0])
                elif not self._are_of(doubtful):
                    self._take()
            except BaseException:  # refused weights must be refused again at the next look
                self.suspect()
                raise
        self._versions.update(versions)
        self._unsure.difference_update(versions)

    def certify(self) -> None:
        """Checks that C and R are slices of the weights, for code that relies on this.

        Raises:
            ValueError: they are not, because weights were written past torch's version counters.
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
        """Whether all weights are unchanged since the last look."""
        return not self._unsure and self._knows_all()

    def _knows_all(self) -> bool:
        versions = self._versions
        for place in self.places:
            if place.version != versions.get(place.slice_index) and is_here(place):
                return False
        return True

    def _looks_the_same(self) -> bool:
        """Whether one number of one weight still equals its copy in C; another one in every pass.

        A write through ``.data`` leaves the version counter alone. If code redraws whole weights
        that way, any single number reveals it. Only on the CPU, where no device has to be waited
        for.
        """
        samples = self._samples  # another thread may replace them
        if not samples:
            return True
        self._turn += 1
        place, row, column, value = samples[self._turn % len(samples)]
        if place.version != self._versions.get(place.slice_index):  # not in memory
            return True
        if place.weight[row, column].item() == value:
            return True
        self.suspect()
        return False

    def _sample(self) -> None:
        """Records some numbers of every weight that are also in C."""
        factors = self.factors
        samples: list[tuple[Place, int, int, float]] = []
        if not self.is_own or factors.device.type != "cpu":
            self._samples = samples
            return
        columns = factors.slices[0]
        for turn in range(_SAMPLES):
            for index, place in enumerate(self.places):
                if place.quantiser is not None:  # a number would cost the whole weight
                    continue
                row = (turn * _STRIDE + index) % place.out_features
                j = (turn + index) % factors.rank
                own = columns[place.slice_index + row // factors.n1, row % factors.n1, j]
                samples.append((place, row, self.columns[j], own.item()))
        self._samples = samples

    def _are_of(self, places: Sequence[Place]) -> bool:
        """Whether the slices of C and R that belong to these places agree with their weights."""
        (lateral, horizontal), same = self.factors.slices, []
        if self._dtype() != lateral.dtype:
            return False
        for place in places:
            weight = place.weight
            if weight.device != lateral.device:
                return False
            own = slice(place.slice_index, place.slice_index + place.slices)
            slices = weight.detach().unflatten(0, (place.slices, -1))
            same += [
                (slices[:, :, list(self.columns)] == lateral[own]).all(),
                (slices[:, list(self.rows)] == horizontal[own]).all(),
            ]
            del weight, slices  # a quantised weight exists one at a time
        return bool(torch.stack(same).all())  # waits for an accelerator only once

    def _dtype(self) -> torch.dtype:
        """The dtype of the weights; if some layers were cast, the widest one."""
        return functools.reduce(torch.promote_types, (p.dtype for p in self.places))

    def _follow(self, place: Place) -> None:
        """Moves C and R that are not slices of these weights to their device and precision."""
        wide, device = torch.promote_types(place.dtype, torch.float32), place.base.device
        if (self.factors.device, self.factors.dtype) != (device, wide):
            # C and R keep the dtype of the base that they were taken from; files record it.
            dtype = wide if wide == torch.float64 else self._given
            sides = [side.to(device, dtype) for side in self.factors.slices]
            self.factors = CURFactors(sides[0], sides[1], self.factors.basis)

    @torch.inference_mode(False)  # a later training step uses the result too
    @torch.no_grad()
    def _take(self) -> None:
        lateral, horizontal, dtype = [], [], self._dtype()
        for place in self.places:
            if not is_here(place) and not is_sharded(place.base):
                raise RuntimeError(
                    f"base: expected all weights of stack {self.name} in memory, since C and R "
                    f"have to be taken anew from weights that changed, got one that is not "
                    f"(slice {place.slice_index}, on {place.base.device}); load weights before "
                    "they are sharded or offloaded"
                )
            slices = whole(place.weight.detach()).unflatten(0, (place.slices, -1))
            lateral.append(slices[:, :, list(self.columns)].to(dtype))
            horizontal.append(slices[:, list(self.rows)].to(dtype))
            del slices
        self.factors = CURFactors(torch.cat(lateral), torch.cat(horizontal), self.factors.basis)
        self._sample()
