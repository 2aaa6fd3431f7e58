"""What an adapter file says, as objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layers.stack import TProductStack
from ..operators.factors import CURFactors
from .container import read_adapter_file
from .plan import Member, Plan, StackPlan


@dataclass(frozen=True)
class StoredStack:
    """One stack of a file: its plan, settings, indices and core, and C and R if the file has them.

    ``base_sha256`` is the fingerprint of the base slices; ``stored`` says of each member in which
    parameter its weight is, whether transposed, and from which row on.
    """

    plan: StackPlan
    stored: tuple[tuple[str, bool, int], ...]
    rank: int
    alpha: float
    mode: str
    precision: str
    base_sha256: str
    rows: Tensor
    columns: Tensor
    core: Tensor
    factors: CURFactors | None

    @property
    def indices(self) -> tuple[Tensor, Tensor]:
        """The chosen rows and columns, as a selection."""
        return self.rows, self.columns


@dataclass(frozen=True)
class Contents:
    """All of a file. ``learned`` maps ("trained" or "buffer", name in the model) to values."""

    stacks: tuple[StoredStack, ...]
    train_also: tuple[str, ...]
    frozen_sha256: str
    learned: Mapping[tuple[str, str], Tensor]

    @property
    def plan(self) -> Plan:
        """The ordered stacks."""
        return Plan(tuple(stored.plan for stored in self.stacks))

    def check_fits(self, stacks: Mapping[str, TProductStack], plan: Plan, path: Path) -> None:
        """Refuses stacks of other layers, sizes, scale, or slices C and R.

        Raises:
            ValueError: naming what differs.
        """
        for stored in self.stacks:
            name = stored.plan.name
            own = {entry.name: entry for entry in plan.stacks}.get(name)
            if own is None or own.members != stored.plan.members:
                raise ValueError(
                    f"path: expected an adapter with the stacks of this model, got other layers in "
                    f"stack {name} at {path}"
                )
            stack = stacks[name]
            for what, wanted, came in (
                ("rank", stack.rank, stored.rank),
                ("alpha", stack.alpha, stored.alpha),
                ("rows", list(stack.rows), stored.rows.tolist()),
                ("columns", list(stack.columns), stored.columns.tolist()),
            ):
                if wanted != came:
                    raise ValueError(
                        f"path: expected {what} {wanted} in stack {name}, which adapters of one "
                        f"model share, got {came} at {path}"
                    )
        missing = {entry.name for entry in plan.stacks} - {s.plan.name for s in self.stacks}
        if missing:
            raise ValueError(
                f"path: expected an adapter with the stacks of this model, got one without "
                f"{', '.join(sorted(missing))} at {path}"
            )


def read_contents(path: Path) -> Contents:
    """Reads and checks a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a torn or foreign file, another format version, or parts that do not fit.
    """
    header, tensors = read_adapter_file(path)
    try:
        stacks = tuple(_stored(entry, tensors) for entry in header["stacks"])
        learned = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind in ("trained", "buffer"):
                learned[(kind, name)] = tensor
        return Contents(stacks, tuple(header["train_also"]), header["frozen_sha256"], learned)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"path: expected a whole adapter file, got one with parts missing at {path} ({error!r})"
        ) from error


def _stored(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StoredStack:
    name, n1, n2 = entry["name"], entry["n1"], entry["n2"]
    plan = StackPlan(name, n1, n2, tuple(Member(m, k) for m, k in entry["members"]))
    core, rank = tensors[f"core.{name}"], entry["rank"]
    if core.shape != (plan.n3, rank, rank):
        raise ValueError(
            f"path: expected core.{name} of shape {[plan.n3, rank, rank]}, got {list(core.shape)}"
        )
    if not torch.isfinite(core).all():
        raise ValueError(f"path: expected finite numbers in core.{name}, got NaN or Inf")
    factors = None
    if f"lateral.{name}" in tensors:
        factors = CURFactors(tensors[f"lateral.{name}"], tensors[f"horizontal.{name}"])
    stored = tuple((parameter, bool(t), int(row)) for parameter, t, row in entry["stored"])
    return StoredStack(
        plan,
        stored,
        rank,
        entry["alpha"],
        entry["mode"],
        entry["precision"],
        entry["base_sha256"],
        tensors[f"rows.{name}"],
        tensors[f"columns.{name}"],
        core,
        factors,
    )
