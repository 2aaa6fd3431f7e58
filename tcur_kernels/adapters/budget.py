"""`Budget`: ranks for a given number of trained numbers, by the gradient that each rank catches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import NamedTuple

import torch
from torch import Tensor

from ..decompose import Selection, Slices
from ..decompose.caught import caught_energy
from ..decompose.tensor import select_slices
from .build import errors_named
from .gradients import gradient_of
from .plan import Plan, StackPlan, check_setting, setting

#: The rows and columns of a stack that its horizontal and lateral slices are.
Indices = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Budget:
    """How many numbers the cores may have together; as ``rank`` of `adapt`, it gives the ranks.

    A stack of n3 slices has a core of n3 r² numbers. Each stack first gets rank 1. Then ranks are
    raised, always where a further number catches most of the gradient, as long as the budget lasts.
    What a rank catches is the energy ‖Qᵀ * G * Q'ᵀ‖² of the gradient G within the span of the
    slices that the selection rule takes for that rank (`decompose.caught.caught_energy`).

    Args:
        parameters: the most trained numbers of all cores together. What ``train_also`` names is not
            counted.

    Raises:
        TypeError, ValueError: it is not a positive integer.
    """

    parameters: int

    def __post_init__(self) -> None:
        if isinstance(self.parameters, bool) or not isinstance(self.parameters, int):
            raise TypeError(f"parameters: expected an int, got {type(self.parameters).__name__}")
        if self.parameters < 1:
            raise ValueError(f"parameters: expected at least 1, got {self.parameters}")


def within_budget(
    plan: Plan,
    budget: Budget,
    gradients: Mapping[str, Tensor],
    slices_of: Callable[[StackPlan], Slices],
    selection: Selection | Mapping[str, Selection],
    generator: torch.Generator | None,
) -> tuple[Plan, dict[str, Indices]]:
    """The plan with ranks within the budget, and the slices that were tried with them.

    A rule that draws would draw others when asked again. So the stacks must be built of the slices
    that are returned: what the plan says is caught is caught by them.

    Args:
        plan: stacks of rank 1.
        budget: the numbers to share out.
        gradients: name of a layer -> gradient ``[out, in]``.
        slices_of: gives the weights of a stack.
        selection, generator: as in `adapt`. All ranks of a stack are drawn from the same state.

    Returns:
        The plan, and ``{stack name: (rows, columns)}``.

    Raises:
        TypeError, ValueError: the budget is smaller than rank 1 everywhere, or gradients do not fit
            the stacks.
    """
    smallest = sum(stack.n3 for stack in plan.stacks)
    if budget.parameters < smallest:
        raise ValueError(
            f"rank: expected a budget of at least {smallest:,} numbers, which rank 1 takes in "
            f"{len(plan.stacks)} stacks, got {budget.parameters:,}"
        )
    check_setting("selection", selection, plan.stacks)
    tried: dict[str, dict[int, _Tried]] = {}
    for stack in plan.stacks:
        most = budget.parameters - smallest + stack.n3
        rule: Selection = setting("selection", selection, stack.name)  # type: ignore[assignment]
        with errors_named(stack):
            source = slices_of(stack)
            gradient = gradient_of(stack, gradients, source.max_workspace, source.progress)
            state = None if generator is None else generator.get_state()
            curve = {}
            for rank in _candidates(stack, most):
                if generator is not None and state is not None:
                    generator.set_state(state)
                rows, columns = select_slices(source, rank, rule, generator)
                sides = source.columns(columns), source.rows(rows)
                curve[rank] = _Tried((rows, columns), *caught_energy(gradient, *sides))
        tried[stack.name] = curve
    ranks = _shared_out(
        {stack.name: stack.n3 for stack in plan.stacks},
        {name: {r: one.energy for r, one in curve.items()} for name, curve in tried.items()},
        budget.parameters,
    )
    taken = {name: curve[ranks[name]] for name, curve in tried.items()}
    stacks = tuple(
        replace(s, rank=ranks[s.name], caught=taken[s.name].energy / taken[s.name].total)
        for s in plan.stacks
    )
    return replace(plan, stacks=stacks), {name: one.indices for name, one in taken.items()}


class _Tried(NamedTuple):
    """Slices (rows, columns), what they catch of the gradient's energy, and all of that energy."""

    indices: Indices
    energy: float
    total: float


def _candidates(stack: StackPlan, most: int) -> Sequence[int]:
    """The ranks that are tried: 1 to 8, then eight to each octave, as far as the numbers go."""
    octaves = (2**octave * step for octave in count() for step in range(8, 16))
    ranks = []
    for rank in chain(range(1, 8), octaves):
        if rank > min(stack.n1, stack.n2) or stack.n3 * rank**2 > most:
            break
        ranks.append(rank)
    return ranks


def _shared_out(
    slices: Mapping[str, int], energies: Mapping[str, Mapping[int, float]], numbers: int
) -> dict[str, int]:
    """The ranks, raised one after the other where a number gains most energy."""
    ranks = dict.fromkeys(slices, 1)
    left = numbers - sum(slices.values())
    while True:
        best: tuple[float, str, int] | None = None
        for name, curve in energies.items():
            now = ranks[name]
            for rank, energy in curve.items():
                cost = slices[name] * (rank**2 - now**2)
                if rank > now and cost <= left:
                    gain = (energy - curve[now]) / cost
                    if best is None or gain > best[0]:
                        best = gain, name, rank
        if best is None:
            return ranks
        _, name, rank = best
        left -= slices[name] * (rank**2 - ranks[name] ** 2)
        ranks[name] = rank
