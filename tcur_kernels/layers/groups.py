"""Rows of one batch by adapters with other C and R: every group of rows by factors of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators.factors import CURFactors
from .base import Base
from .rows import Rows


class Side:
    """What the adapters of a group share in one stack: C and R, true to the base, and a scale.

    Args:
        base: C and R, and the check that they agree with the present weights.
        scale: what C * U * R is multiplied by.
        generation: of the base of the stack, when C and R were taken.
    """

    def __init__(self, base: Base, scale: float, generation: int) -> None:
        self.base, self.scale, self._generation = base, scale, generation

    def follow(self, own: Base) -> None:
        """Takes C and R again if the weights changed, of which the stack's ``own`` base may know.

        Raises:
            RuntimeError, ValueError: as for `Base.look`.
        """
        if self._generation != own.generation:
            self.base.suspect()
            self._generation = own.generation
        if not self.base.is_known:
            self.base.look()


@dataclass(frozen=True)
class Group:
    """Rows, or tokens, of a batch whose adapters share C and R.

    Attributes:
        side: C and R.
        scale: what C * U * R is multiplied by.
        cores: ``[A, n3, r, r]``, of the adapters of this group.
        ids: int64 ``[rows of the group]``: the index of the core of each.
        index: int64, the numbers of these rows in the batch.
    """

    side: Side
    scale: float
    cores: Tensor
    ids: Tensor
    index: Tensor

    @property
    def factors(self) -> CURFactors:
        """C and R of the present base."""
        return self.side.base.factors


@dataclass(frozen=True)
class GroupedRows:
    """The groups of a batch.

    Attributes:
        groups: those that have rows.
        back: int64, where in the groups, one after another, the rows of the batch are found.
        rows: the ids of all rows as `Rows`, which knows how they lie in an input.
    """

    groups: tuple[Group, ...]
    back: Tensor
    rows: Rows

    @property
    def requires_grad(self) -> bool:
        """Whether some cores are trained."""
        return any(group.cores.requires_grad for group in self.groups)

    def follow(self, own: Base) -> None:
        """Has all groups follow the weights; see `Side.follow`."""
        for group in self.groups:
            group.side.follow(own)

    def forward(self, x: Tensor, call: Callable[[Tensor, Tensor, Group], Tensor]) -> Tensor:
        """Computes each group of rows by ``call(rows, ids, group)``, and puts them together."""
        units = max(1, self.rows.adapter_ids.numel())
        times = len(self.rows.ids_for(x)) // units  # the whole batch may come several times
        if len(self.groups) == 1:
            (group,) = self.groups
            return call(x, group.ids.repeat(times), group)
        tokens = x.reshape(times, units, -1, x.shape[-1])
        parts = [
            call(tokens.index_select(1, group.index), group.ids.repeat(times), group)
            for group in self.groups
        ]
        together = torch.cat(parts, 1).index_select(1, self.back)
        return together.reshape(*x.shape[:-1], together.shape[-1])
