"""The operands of an instruction by what they are for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import operands as of
from .operands import ALL, ZERO, Array, flags

if TYPE_CHECKING:
    from .listing import Instruction
    from .machine import Warp

#: Executes an instruction for the lanes of a mask.
Step = Callable[["Warp", int], None]
#: Makes that of an instruction; None if it does not understand its modifiers.
Maker = Callable[["Instruction", "Roles"], "Step | None"]

#: Instructions that write predicates and no register.
ONLY_PREDICATES = ("ISETP", "FSETP", "DSETP", "PLOP3")


class Roles:
    """The operands of an instruction by what they are for.

    Attributes:
        outs: predicates that are written.
        target: the register that is written; "RZ" if none is.
        texts: what is read, as it is printed, without predicates.
        flags: predicates that are read.
        modifiers: of the opcode.
    """

    def __init__(self, instruction: Instruction) -> None:
        rest = list(instruction.operands)
        self.outs: list[str] = []
        self.target = "RZ"
        has_target = instruction.name.removeprefix("U") not in ONLY_PREDICATES
        # Up to two predicates are written, which stand before the register or behind it.
        while rest and (has_target or (self._is_written(rest) and len(self.outs) < 2)):
            if self._is_written(rest):
                self.outs.append(rest.pop(0))
            else:
                self.target, has_target = rest.pop(0), False
        self.flags = [of.predicate(text) for text in rest if of.PREDICATE.match(text)]
        self.texts = [text for text in rest if not of.PREDICATE.match(text)]
        self.modifiers = instruction.opcode.split(".")[1:]

    @staticmethod
    def _is_written(rest: list[str]) -> bool:
        """Whether a predicate comes first, and not as the last operand: that is read."""
        return len(rest) > 1 and of.PREDICATE.match(rest[0]) is not None

    def numbers(self, count: int) -> Callable[[Warp], tuple[list[Array], int]]:
        """Reads the first ``count`` numbers, and the lanes for which all of them are known."""
        sources = [of.number(text) for text in self.texts[:count]]

        def read(warp: Warp) -> tuple[list[Array], int]:
            found = [source(warp) for source in sources]
            known = ALL
            for _, one in found:
                known &= one
            return [values for values, _ in found], known

        return read

    def carries(self, warp: Warp) -> tuple[Array, int]:
        """How many of the predicates that are read are true: carries of the word below."""
        total, known = ZERO, ALL
        for flag in self.flags:
            value, one = flag(warp)
            total, known = total + flags(value), known & one
        return total, known
