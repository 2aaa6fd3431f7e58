"""What instructions on integers do, for the warps of `machine`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import operands as of
from .operands import ALL, WORD, ZERO, Array, bits, flags, same, signed
from .roles import Maker, Roles, Step

if TYPE_CHECKING:
    from .listing import Instruction
    from .machine import Warp


def _words(count: int, function: Callable[..., Array]) -> Maker:
    """An operation on ``count`` words that gives one."""

    def make(instruction: Instruction, roles: Roles) -> Step:
        read = roles.numbers(count)

        def step(warp: Warp, mask: int) -> None:
            values, known = read(warp)
            warp.write(roles.target, function(*values) & WORD, known, mask)

        return step

    return make


def _special(instruction: Instruction, roles: Roles) -> Step:
    """S2R and CS2R: a special register, which CS2R takes to two."""
    source = roles.texts[0]
    is_wide = instruction.name == "CS2R" and "32" not in roles.modifiers

    def step(warp: Warp, mask: int) -> None:
        values, known = warp.special(source)
        warp.write(roles.target, values, known, mask)
        if is_wide:
            warp.write(of.next_register(roles.target), ZERO, known, mask)

    return step


def _load_constant(instruction: Instruction, roles: Roles) -> Step:
    """LDC: one number of a bank of constants, or several."""
    bank, index, offset = of.constant_place(roles.texts[0])
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    size = next((sizes[m] for m in roles.modifiers if m in sizes), 4)
    sign = 1 << (8 * size - 1) if {"S8", "S16"} & set(roles.modifiers) else 0

    def step(warp: Warp, mask: int) -> None:
        words = [
            of.in_bank(warp, bank, index, offset + at, min(size, 4)) for at in range(0, size, 4)
        ]
        for place, (values, known) in enumerate(words):
            target = of.next_register(roles.target, place)
            warp.write(target, ((values ^ sign) - sign) & WORD, known, mask)

    return step


def _add(instruction: Instruction, roles: Roles) -> Step:
    """IADD3: the sum of three words, with carries in and out. -x is ~x + 1, also for carries."""
    takes_carry = "X" in roles.modifiers
    negative = [text.startswith("-") for text in roles.texts]
    plain = [of.number(text.lstrip("-")) for text in roles.texts]

    def step(warp: Warp, mask: int) -> None:
        total, known = roles.carries(warp) if takes_carry else (ZERO, ALL)
        for source, minus in zip(plain, negative, strict=True):
            values, one = source(warp)
            total, known = total + ((values ^ WORD) + 1 if minus else values), known & one
        warp.write(roles.target, total & WORD, known, mask)
        for place, out in enumerate(roles.outs):
            warp.write_predicate(out, bits(total >> 32 > place), known, mask)

    return step


def _multiply(instruction: Instruction, roles: Roles) -> Step:
    """IMAD: a product and a sum of words, or of 64 bits, of which .HI keeps the high word."""
    modifiers = set(roles.modifiers)
    is_signed, is_high = "U32" not in modifiers, "HI" in modifiers
    takes_carry = "X" in modifiers
    read_factors = roles.numbers(2)
    if is_high or "WIDE" in modifiers:
        read_addend = of.pair(roles.texts[2])
    else:
        read_addend = of.number(roles.texts[2])

    def narrow(warp: Warp, mask: int) -> None:
        (a, b), known = read_factors(warp)
        c, one = read_addend(warp)
        carry, also = roles.carries(warp) if takes_carry else (ZERO, ALL)
        # A product of 64 bits may wrap around; its low word is right.
        warp.write(roles.target, (a * b + c + carry) & WORD, known & one & also, mask)

    def wide(warp: Warp, mask: int) -> None:
        (a, b), known = read_factors(warp)
        c, one = read_addend(warp)
        if is_signed:
            a, b = signed(a), signed(b)
        total, known = a * b + c, known & one
        low, high = total & WORD, total >> 32 & WORD
        warp.write(roles.target, high if is_high else low, known, mask)
        if not is_high:
            warp.write(of.next_register(roles.target), high, known, mask)
        carry = total.view(np.uint64) < c.view(np.uint64)
        for out in roles.outs:
            warp.write_predicate(out, bits(carry), known, mask)

    return wide if is_high or "WIDE" in modifiers else narrow


def _shifted_add(instruction: Instruction, roles: Roles) -> Step:
    """LEA: (a << n) + b, where .HI takes the high word of what is shifted: of {c, a}, or of a."""
    modifiers = set(roles.modifiers)
    is_high, takes_carry, extends = (m in modifiers for m in ("HI", "X", "SX32"))
    read = roles.numbers(len(roles.texts))

    def step(warp: Warp, mask: int) -> None:
        values, known = read(warp)
        a, b, count = values[0], values[1], values[-1] & 31
        if is_high:
            top = signed(a) >> 31 if extends else values[2]
            shifted = ((top << 32 | a) << count) >> 32 & WORD
        else:
            shifted = a << count & WORD
        carry, also = roles.carries(warp) if takes_carry else (ZERO, ALL)
        total, known = shifted + b + carry, known & also
        warp.write(roles.target, total & WORD, known, mask)
        for out in roles.outs:
            warp.write_predicate(out, bits(total >> 32 > 0), known, mask)

    return step


def _shift(instruction: Instruction, roles: Roles) -> Step:
    """SHF: a shift of the 64 bits {c, a}, of which one word is kept."""
    modifiers = set(roles.modifiers)
    is_left, is_high = "L" in modifiers, "HI" in modifiers
    is_arithmetic, is_double = bool({"S32", "S64"} & modifiers), bool({"U64", "S64"} & modifiers)
    wraps, most = "W" in modifiers, 63 if is_double else 32
    read = roles.numbers(3)

    def step(warp: Warp, mask: int) -> None:
        (a, count, c), known = read(warp)
        both = c << 32 | a
        by = count & 31 if wraps else np.minimum(count, most)
        if is_left:
            moved = both << by
        elif is_arithmetic:
            moved = both >> by
        else:
            moved = (both.view(np.uint64) >> by.view(np.uint64)).view(np.int64)
        kept = moved >> 32 if is_high else moved
        warp.write(roles.target, kept & WORD, known, mask)

    return step


def _logic(instruction: Instruction, roles: Roles) -> Step:
    """LOP3: any function of three bits, which a table of eight gives."""
    table, read = int(roles.texts[3], 0), roles.numbers(3)
    is_own = roles.target in roles.texts

    def step(warp: Warp, mask: int) -> None:
        if is_own and roles.target not in warp.registers:
            # Bits are set one by one in a register that nobody wrote. The others are never read.
            warp.registers[roles.target] = ZERO, ALL
        (a, b, c), known = read(warp)
        total = ZERO
        for place in range(8):
            if table >> place & 1:
                x = a if place & 4 else a ^ WORD
                y = b if place & 2 else b ^ WORD
                z = c if place & 1 else c ^ WORD
                total = total | (x & y & z)
        warp.write(roles.target, total, known, mask)
        for out in roles.outs:
            warp.write_predicate(out, bits(total != 0), known, mask)

    return step


def _select(instruction: Instruction, roles: Roles) -> Step:
    """SEL: the first number where a predicate is true, else the second."""
    first, second = (of.number(text) for text in roles.texts)

    def step(warp: Warp, mask: int) -> None:
        (a, one), (b, two) = first(warp), second(warp)
        value, sure = roles.flags[0](warp)
        known = sure & ((one & value) | (two & ~value))
        warp.write(roles.target, np.where(flags(value), a, b), known, mask)

    return step


def _extreme(instruction: Instruction, roles: Roles) -> Step:
    """VIMNMX: the smaller number where the predicate is true, else the greater one.

    VIADDMNMX takes the sum of the first two for the first.
    """
    is_signed, adds = "U32" not in roles.modifiers, "ADD" in instruction.name
    read = roles.numbers(len(roles.texts))

    def step(warp: Warp, mask: int) -> None:
        values, known = read(warp)
        a, b = ((values[0] + values[1]) & WORD, values[2]) if adds else values
        if is_signed:
            a, b = signed(a), signed(b)
        value, sure = roles.flags[-1](warp)
        kept = np.where(flags(value), np.minimum(a, b), np.maximum(a, b))
        warp.write(roles.target, kept & WORD, known & sure, mask)

    return step


def _permute(a: Array, selector: Array, c: Array) -> Array:
    """PRMT: four bytes of {c, a}, each named by four bits; the top one spreads a byte's sign."""
    total = ZERO
    for place in range(4):
        which = selector >> 4 * place & 0xF
        byte = np.where(which & 4, c, a) >> 8 * (which & 3) & 0xFF
        byte = np.where(which & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        total = total | byte << 8 * place
    return total


def _extend(instruction: Instruction, roles: Roles) -> Step:
    """SGXT: the lowest bits, extended by their sign, or by zeros (.U32)."""
    is_signed = "U32" not in roles.modifiers
    return _words(2, lambda a, count: _lowest(a, count, is_signed))(instruction, roles)


def _lowest(a: Array, count: Array, is_signed: bool) -> Array:
    low = a & (1 << count) - 1
    half = 1 << count >> 1
    return (low ^ half) - half if is_signed else low


def _to_uniform(instruction: Instruction, roles: Roles) -> Step:
    """R2UR: what the first lane has that is at work."""
    read = roles.numbers(1)

    def step(warp: Warp, mask: int) -> None:
        (values,), known = read(warp)
        lane = next(iter(of.lanes(mask)), 0)
        warp.write(roles.target, same(int(values[lane])), known >> lane & 1 and ALL, mask)

    return step


MAKERS: dict[str, Maker] = {
    "MOV": _words(1, lambda a: a),
    "CS2R": _special,
    "S2R": _special,
    "S2UR": _special,
    "LDC": _load_constant,
    "LDCU": _load_constant,
    "IADD3": _add,
    "VIADD": _words(2, lambda a, b: a + b),
    "IABS": _words(1, lambda a: np.abs(signed(a))),
    "IMAD": _multiply,
    "LEA": _shifted_add,
    "SHF": _shift,
    "LOP3": _logic,
    "SEL": _select,
    "VIMNMX": _extreme,
    "VIADDMNMX": _extreme,
    "PRMT": _words(3, _permute),
    "SGXT": _extend,
    "R2UR": _to_uniform,
}
