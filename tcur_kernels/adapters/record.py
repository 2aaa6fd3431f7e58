"""The record of a stack, which adapter files and the configs of peft adapters both store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..layers.stack import TProductStack
from .fingerprint import Fingerprint
from .plan import Member, StackPlan


@dataclass(frozen=True)
class StackRecord:
    """A stack without its core: enough to rebuild the stack from the same base weights.

    Attributes:
        plan: its layers, in the order of their slices.
        rows, columns: the indices I and J of the rows in R and of the columns in C.
        base: identifies the base that R and C were taken from.
    """

    plan: StackPlan
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    base: Fingerprint

    @classmethod
    def of(cls, plan: StackPlan, stack: TProductStack) -> StackRecord:
        """The record of a stack as it is now."""
        return cls(plan, stack.rows, stack.columns, Fingerprint.of(stack.factors))

    @property
    def selection(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The indices as the ``selection`` argument of `tensor_cur`."""
        return self.rows, self.columns

    def as_json(self) -> dict[str, Any]:
        """The record as values that JSON can hold."""
        return {
            "name": self.plan.name,
            "n1": self.plan.n1,
            "n2": self.plan.n2,
            "members": [[member.module, member.slices] for member in self.plan.members],
            "rows": list(self.rows),
            "columns": list(self.columns),
            "dtype": self.base.dtype,
            "sha256": self.base.sha256,
        }

    @classmethod
    def of_json(cls, entry: Mapping[str, Any], rank: int) -> StackRecord:
        """Reads a record back from JSON; the rank is among the settings, which are stored apart.

        Raises:
            KeyError, TypeError, ValueError: the entry does not have the form that `as_json` gives.
        """
        members = tuple(Member(str(module), int(slices)) for module, slices in entry["members"])
        plan = StackPlan(str(entry["name"]), int(entry["n1"]), int(entry["n2"]), members, rank)
        rows, columns = (tuple(map(int, entry[side])) for side in ("rows", "columns"))
        return cls(plan, rows, columns, Fingerprint(entry["dtype"], entry["sha256"]))
