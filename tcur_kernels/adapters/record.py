"""The record of a stack, which adapter files and the configs of peft adapters both store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..files.parsing import Fields, check_name
from ..layers.stack import TProductStack
from .fingerprint import Fingerprint
from .holding import is_reserved
from .plan import Member, StackPlan

#: The largest size of a matrix, and the most slices, that a record may name.
_LARGEST = 2**40

#: The dtypes of bases, as torch prints them.
_DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16", "torch.float64")


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
    def of_json(cls, fields: Fields, rank: int) -> StackRecord:
        """Reads a record back from JSON; the rank is among the settings, which are stored apart.

        Raises:
            ValueError: the entry does not have the form that `as_json` gives.
        """
        name = fields.text("name")
        if "." in name or is_reserved(name):
            raise fields.error("name", "one that a stack can have", repr(name))
        n1, n2 = (fields.whole(side, 1, _LARGEST) for side in ("n1", "n2"))
        if not 1 <= rank <= min(n1, n2):
            raise fields.error("rank", f"1 to {min(n1, n2)}, for slices of {n1} x {n2}", rank)
        members = []
        for module, slices in fields.list("members", (str, int)):
            check_name(module, fields.source, "that of a layer")
            members.append(Member(module, fields.is_whole("members", slices, 1, _LARGEST)))
        if not members or len({member.module for member in members}) != len(members):
            raise fields.error("members", "layers, each once", f"{len(members)} entries")
        plan = StackPlan(name, n1, n2, tuple(members), rank)
        rows, columns = fields.indices("rows", rank, n1), fields.indices("columns", rank, n2)
        base = Fingerprint(fields.one_of("dtype", _DTYPES), fields.sha256("sha256"))
        return cls(plan, rows, columns, base)
