"""What instructions on predicates do, for the warps of `machine`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import operands as of
from .operands import ALL, bits, flags, same, signed
from .roles import Maker, Roles, Step

if TYPE_CHECKING:
    from .listing import Instruction
    from .machine import Warp

COMPARISONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge,
    "EQ": operator.eq, "NE": operator.ne,
    # Of floats: true also if one of them is not a number.
    "GTU": lambda a, b: ~(a <= b), "GEU": lambda a, b: ~(a < b),
    "LTU": lambda a, b: ~(a >= b), "LEU": lambda a, b: ~(a > b),
    "NEU": operator.ne,
}  # fmt: skip


def _compare(instruction: Instruction, roles: Roles) -> Step:
    """ISETP: a comparison, combined with a predicate; .EX goes on from that of the low words."""
    name, is_extended = roles.modifiers[0], "EX" in roles.modifiers
    is_signed = "U32" not in roles.modifiers
    read, compare = roles.numbers(2), COMPARISONS[name]
    # If the high words are equal, the low ones decide.
    strict = COMPARISONS[name.replace("E", "T") if name in ("LE", "GE") else name]

    def step(warp: Warp, mask: int) -> None:
        (a, b), known = read(warp)
        if is_signed:
            a, b = signed(a), signed(b)
        result = compare(a, b)
        if is_extended:
            below, also = roles.flags[1](warp)
            result, known = np.where(a == b, flags(below), strict(a, b)), known & also
        write_comparison(warp, roles, bits(result), known, mask)

    return step


def write_comparison(warp: Warp, roles: Roles, result: int, known: int, mask: int) -> None:
    """Writes a comparison, combined with the first predicate that is read, and its opposite.

    A lane is known if what is not known of it does not matter.
    """
    other, also = roles.flags[0](warp)
    for out, value in zip(roles.outs, (result, result ^ ALL), strict=True):
        if "AND" in roles.modifiers:
            total, decided = value & other, (known & ~value) | (also & ~other)
        elif "OR" in roles.modifiers:
            total, decided = value | other, (known & value) | (also & other)
        else:
            total, decided = value ^ other, 0
        warp.write_predicate(out, total, (known & also) | decided & ALL, mask)


def _predicate_logic(instruction: Instruction, roles: Roles) -> Step:
    """PLOP3: functions of three predicates; the second table is that of the second result."""
    tables = [int(text, 0) for text in roles.texts]

    def step(warp: Warp, mask: int) -> None:
        found = [flag(warp) for flag in roles.flags]
        all_known = found[0][1] & found[1][1] & found[2][1]
        for out, table in zip(roles.outs, tables, strict=True):
            total = 0
            for place in range(8):
                if table >> place & 1:
                    agree = ALL
                    for (value, _), bit in zip(found, (4, 2, 1), strict=True):
                        agree &= value if place & bit else value ^ ALL
                    total |= agree
            warp.write_predicate(out, total, all_known, mask)

    return step


def _pack_predicates(instruction: Instruction, roles: Roles) -> Step:
    """P2R: predicates as bits of a word, where a mask has ones; the other bits are kept."""
    _, old, which = roles.texts
    before, places = of.number(old), of.lanes(int(which, 0))

    def step(warp: Warp, mask: int) -> None:
        values, known = before(warp)
        for place in places:
            value, one = of.predicate(f"P{place}")(warp)
            values = values & ~(1 << place) | flags(value).astype(np.int64) << place
            known &= one
        warp.write(roles.target, values, known, mask)

    return step


def _vote(instruction: Instruction, roles: Roles) -> Step:
    """VOTE: whether a predicate is true in any lane that is at work or in all; or in which."""
    first, last = instruction.operands[0], instruction.operands[-1]
    flag, is_any = of.predicate(last), "ANY" in roles.modifiers

    def step(warp: Warp, mask: int) -> None:
        value, known = flag(warp)
        sure = 0 if mask & ~known else ALL
        if of.PREDICATE.match(first):
            is_true = bool(value & mask) if is_any else value & mask == mask
            warp.write_predicate(first, ALL if is_true else 0, sure, mask)
        else:
            warp.write(first, same(value & mask), sure, mask)

    return step


MAKERS: dict[str, Maker] = {
    "ISETP": _compare,
    "PLOP3": _predicate_logic,
    "P2R": _pack_predicates,
    "VOTE": _vote,
    "VOTEU": _vote,
}
