"""What an instruction does to registers and predicates, whatever it is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from . import floats, integers, predicates
from . import operands as of
from .operands import ALL, ZERO
from .roles import Roles, Step

if TYPE_CHECKING:
    from .listing import Instruction
    from .machine import Warp

MAKERS = {**integers.MAKERS, **predicates.MAKERS, **floats.MAKERS}
_REGISTER = re.compile(r"^U?R\d+$")


def step_of(instruction: Instruction) -> Step:
    """How to execute it. What is not understood leaves results that are not known."""
    roles = Roles(instruction)
    make = MAKERS.get(instruction.name.removeprefix("U"))
    step = make(instruction, roles) if make else None
    return step or _forget(instruction, roles)


def _forget(instruction: Instruction, roles: Roles) -> Step:
    opcode = instruction.opcode
    is_wide = "64" in opcode or "WIDE" in opcode or opcode.startswith("D")
    count = 4 if instruction.kind == "tensor" else 2 if is_wide else 1
    has_target = _REGISTER.match(roles.target) is not None
    targets = [of.next_register(roles.target, i) for i in range(count)] if has_target else []
    # A loop that waits ends at once: what it waits for has arrived.
    arrived = ALL if opcode.startswith("SYNCS.PHASECHK") else 0

    def step(warp: Warp, mask: int) -> None:
        for target in targets:
            warp.write(target, ZERO, 0, mask)
        for out in roles.outs:
            warp.write_predicate(out, arrived, arrived, mask)

    return step
