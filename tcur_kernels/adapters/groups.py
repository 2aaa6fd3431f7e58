"""Adapters of one base whose C and R are other slices, together in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..decompose.slices import MAX_WORKSPACE
from ..decompose.tensor import as_slices
from ..layers.base import Base
from ..layers.groups import Group, GroupedRows, Side
from ..layers.rows import Per, Repeat, Rows, check_repeat
from ..layers.stack import TProductStack
from ..operators.checks import check_adapter_ids
from ..operators.factors import CURFactors
from .batch import StackedCores, check_finite
from .file import Contents, StoredStack
from .fingerprint import Fingerprint
from .ids import NO_ADAPTER, check_ids
from .plan import Plan
from .within import check_base, has_slices_of, read_cores_alone

_HOST = torch.device("cpu")

Entry = str | Path | Mapping[str, Tensor]


class GroupedCores:
    """Cores of adapters with various slices, in groups; see `Adapter.stack_groups`.

    Attributes:
        groups: for each group, the cores of its adapters. Of the first group they belong to the
            model's own C and R.
        places: for each adapter, the group that it is in, and its number there.
    """

    def __init__(
        self,
        groups: Sequence[StackedCores],
        places: Sequence[tuple[int, int]],
        sides: Sequence[Mapping[str, Side]],
    ) -> None:
        self.groups, self.places = tuple(groups), tuple(places)
        self._sides = tuple(sides)

    @classmethod
    def of(
        cls,
        stacks: Mapping[str, TProductStack],
        plan: Plan,
        adapters: Sequence[Entry],
        cores_of: Callable[[Entry], Mapping[str, Tensor]],
    ) -> GroupedCores:
        """Puts adapters into groups; see `Adapter.stack_groups`.

        Args:
            stacks: of the model.
            plan: of the model.
            adapters: names, files or cores.
            cores_of: what reads an entry whose cores belong to the stacks.

        Raises:
            FileNotFoundError, TypeError, ValueError: an entry is wrong, or there is none.
        """
        if not adapters:
            raise ValueError("adapters: expected at least one, got none")
        members: dict[Any, list[Mapping[str, Tensor]]] = {None: []}
        own = {name: Side(s.base, s.scale, s.base.generation) for name, s in stacks.items()}
        sides: dict[Any, Mapping[str, Side]] = {None: own}
        places = []
        for index, entry in enumerate(adapters):
            contents = read_cores_alone(entry, plan) if isinstance(entry, Path) else None
            key = None if contents is None else _key_of(contents, stacks)
            if key is None:
                if isinstance(entry, Mapping):
                    check_finite(f"adapters[{index}]", entry)
                cores = cores_of(entry)
            else:
                assert contents is not None
                assert isinstance(entry, Path)
                if key not in sides:
                    sides[key] = _taken(contents, stacks)
                for stored in contents.stacks:
                    base = sides[key][stored.plan.name].base
                    check_base(Fingerprint.of(base.factors), stored, entry)
                cores = {stored.plan.name: stored.core for stored in contents.stacks}
            places.append((list(sides).index(key), len(members.setdefault(key, []))))
            members[key].append(cores)
        groups = []
        for key, of_group in members.items():
            if key is None:
                own_cores = StackedCores.zeros(stacks, 0)
                groups.append(StackedCores.of(stacks, of_group) if of_group else own_cores)
            else:
                groups.append(_stacked(of_group, sides[key]))
        return cls(groups, places, list(sides.values()))

    @property
    def adapters(self) -> int:
        """The number of adapters."""
        return len(self.places)

    @property
    def nbytes(self) -> int:
        """Bytes of all cores."""
        return sum(group.nbytes for group in self.groups)

    def check(
        self,
        stacks: Mapping[str, TProductStack],
        adapter_ids: Tensor,
        per: Per = "row",
        cu_seqlens: Tensor | None = None,
        repeat: Any = None,
    ) -> tuple[Tensor, Per]:
        """As for `StackedCores`; also has C and R of all groups follow the present base."""
        for name, stack in stacks.items():
            device = stack.factors.device  # the stack looks at its base first
            side = self._sides[0].get(name)
            if side is None or side.base is not stack.base:
                raise ValueError("cores: expected groups that this model made, got another model's")
        self.groups[0].check_stacks(stacks)
        for sides in self._sides:
            for name, side in sides.items():
                side.follow(stacks[name].base)
        return check_ids(adapter_ids, self.adapters, device, per, cu_seqlens, repeat)

    @contextmanager
    def rows(
        self,
        stacks: Mapping[str, TProductStack],
        adapter_ids: Tensor,
        repeat: Repeat | None = None,
        per: Per = "row",
    ) -> Iterator[None]:
        """Context in which each row uses the C, R and core of its adapter; see `StackedCores`.

        The rows of each group are found on the host. If ids are on an accelerator, this waits for
        it once in a batch.
        """
        check_repeat(repeat)
        check_adapter_ids(adapter_ids.flatten().cpu(), self.adapters, _HOST, least=NO_ADAPTER)
        chosen, back = self._chosen(adapter_ids.flatten())
        with ExitStack() as batches:
            for name, stack in stacks.items():
                groups = []
                for number, ids, index in chosen:
                    own = self.groups[number]
                    cores = own[name] if number else own.with_zeros(name)
                    side = self._sides[number][name]
                    scale = side.scale if number else stack.scale  # which follows a changed alpha
                    groups.append(Group(side, scale, cores, ids, index))
                rows = Rows(groups[0].cores, adapter_ids, repeat, per)
                batches.enter_context(stack.grouped(GroupedRows(tuple(groups), back, rows)))
            yield

    def _chosen(self, adapter_ids: Tensor) -> tuple[list[tuple[int, Tensor, Tensor]], Tensor]:
        """For groups that have rows: number, ids within the group, which rows; and the way back.

        Rows without an adapter belong to the first group, and to the zeros behind its cores.
        """
        nothing = (0, self.groups[0].adapters)
        found: dict[int, tuple[list[int], list[int]]] = {}
        for row, adapter in enumerate(adapter_ids.tolist()):
            group, core = nothing if adapter == NO_ADAPTER else self.places[adapter]
            ids, index = found.setdefault(group, ([], []))
            ids.append(core)
            index.append(row)
        if not found:
            found[0] = ([], [])
        device = adapter_ids.device
        chosen = [
            (group, *(torch.tensor(each, dtype=torch.int64, device=device) for each in both))
            for group, both in sorted(found.items())
        ]
        order = torch.cat([index for _, _, index in chosen])  # type: ignore[misc]
        return chosen, order.argsort()  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"GroupedCores({self.adapters} adapters in {len(self.groups)} groups)"


def _key_of(contents: Contents, stacks: Mapping[str, TProductStack]) -> Any:
    """What the adapters of a group have in common; None: they fit the model's own C and R."""
    if all(has_slices_of(stacks[stored.plan.name], stored) for stored in contents.stacks):
        return None
    ordered = sorted(contents.stacks, key=lambda stored: stored.plan.name)
    return tuple((s.plan.name, s.alpha, s.basis, s.record.rows, s.record.columns) for s in ordered)


def _taken(contents: Contents, stacks: Mapping[str, TProductStack]) -> dict[str, Side]:
    """C and R of a group, taken from the base of the model.

    Raises:
        ValueError: the model is merged, so that its weights are not those of the base.
    """
    return {stored.plan.name: _side(stored, stacks[stored.plan.name]) for stored in contents.stacks}


def _side(stored: StoredStack, stack: TProductStack) -> Side:
    if stack.is_merged:
        raise ValueError("stack_groups: expected an unmerged adapter, got one that is merged")
    weights = [place.weight.detach() for place in stack.places]
    source = as_slices("weights", weights, MAX_WORKSPACE, False, stack.n1)
    indices = stored.record.rows, stored.record.columns
    rows, columns = map(torch.tensor, indices)
    factors = CURFactors(source.columns(columns), source.rows(rows), stored.basis)
    base = Base(stack.name, stack.places, indices, factors.to(stack.core.device), is_own=True)
    return Side(base, stored.scale, stack.base.generation)


@torch.inference_mode(False)  # a later training step may use the cores, too
@torch.no_grad()
def _stacked(adapters: Sequence[Mapping[str, Tensor]], sides: Mapping[str, Side]) -> StackedCores:
    """The cores of a group side by side, and one of zeros behind them."""
    stacked = {}
    for name, side in sides.items():
        like = side.base.factors.lateral_hat
        stacked[name] = torch.stack([own[name].to(like) for own in adapters])
    return StackedCores(stacked)
