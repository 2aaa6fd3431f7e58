"""Branches: which lanes go on where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import operands as of
from .operands import lanes

if TYPE_CHECKING:
    from .listing import Instruction
    from .machine import Warp
    from .roles import Step


class NotKnown(Exception):
    """A branch depends on what is not known."""


def _taken(instruction: Instruction, warp: Warp) -> int:
    """The lanes for which the guard and all predicates among the operands are true."""
    conditions = [text for text in instruction.operands if of.PREDICATE.match(text)]
    taken = warp.mask
    for text in [instruction.guard, *conditions] if instruction.guard else conditions:
        value, known = of.predicate(text)(warp)
        if taken & ~known:
            raise NotKnown(f"{instruction.address:#x}: {instruction.opcode} depends on {text}")
        taken &= value
    return taken


def _branch(instruction: Instruction) -> Step:
    address = int(instruction.operands[-1].strip("`()"), 0)

    def step(warp: Warp, mask: int) -> None:
        taken = _taken(instruction, warp)
        warp.jumps = [(taken, address)] if taken else []

    def never(warp: Warp, mask: int) -> None:
        """BRA.DIV is for lanes that have parted where the warp should be whole."""

    return never if ".DIV" in instruction.opcode else step


def _indirect(instruction: Instruction) -> Step:
    """RET and BRX: a register says where to, and what is printed behind it is added."""
    register, _, offset = instruction.operands[0].partition(" ")
    source = of.number(register)
    start = int(offset, 0) + (instruction.address + 16 if instruction.name == "BRX" else 0)

    def step(warp: Warp, mask: int) -> None:
        values, known = source(warp)
        if mask & ~known:
            raise NotKnown(f"{instruction.address:#x}: {instruction.opcode} depends on {register}")
        warp.jumps = [(1 << lane, int(values[lane]) + start & of.WORD) for lane in lanes(mask)]

    return step


def _exit(instruction: Instruction) -> Step:
    def step(warp: Warp, mask: int) -> None:
        warp.mask &= ~_taken(instruction, warp)

    return step


MAKERS = {
    "BRA": _branch,
    "CALL": _branch,
    "RET": _indirect,
    "BRX": _indirect,
    "EXIT": _exit,
}
