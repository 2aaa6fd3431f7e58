"""What instructions on floating-point numbers do, as far as branches depend on them.

Divisions of integers go through fp32, and a division in fp64 chooses its way by exponents. So sums
and products are followed where their operands are known. Roundings are those of the machine but for
a product with a sum in fp64, which is rounded twice: nothing here depends on its last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import operands as of
from .operands import ALL, WORD, ZERO, Array, Floats, as_word, bits, flags, same, signed
from .predicates import COMPARISONS, write_comparison
from .roles import Maker, Roles, Step

if TYPE_CHECKING:
    from .listing import Instruction
    from .machine import Warp


def _write_pair(warp: Warp, target: str, values: Array, known: int, mask: int) -> None:
    """Writes 64 bits to two registers."""
    warp.write(target, values & WORD, known, mask)
    warp.write(of.next_register(target), values >> 32 & WORD, known, mask)


def _from_integer(instruction: Instruction, roles: Roles) -> Step:
    """I2F: an integer as fp32, rounded up where .RP says so, or as fp64."""
    modifiers, text = set(roles.modifiers), roles.texts[0]
    is_unsigned = bool({"U16", "U32", "U64"} & modifiers)
    read = of.pair(text) if {"U64", "S64"} & modifiers else of.number(text)

    def step(warp: Warp, mask: int) -> None:
        values, known = read(warp)
        if "U64" in modifiers:
            values = values.view(np.uint64)
        elif "U16" in modifiers:
            values = values & 0xFFFF
        elif not is_unsigned and "S64" not in modifiers:
            values = signed(values)
        exact = values.astype(np.longdouble)
        if "F64" in modifiers:
            _write_pair(warp, roles.target, exact.astype(np.float64).view(np.int64), known, mask)
            return
        rounded = exact.astype(np.float32)
        if "RP" in modifiers:
            is_below = rounded.astype(np.longdouble) < exact
            rounded = np.where(is_below, np.nextafter(rounded, np.float32(np.inf)), rounded)
        warp.write(roles.target, as_word(rounded), known, mask)

    return step


def _to_integer(instruction: Instruction, roles: Roles) -> Step | None:
    """F2I: fp32 as an unsigned integer, cut off; what does not fit is the nearest that does."""
    if not {"U32", "U64"} & set(roles.modifiers) or "TRUNC" not in roles.modifiers:
        return None
    is_wide = "U64" in roles.modifiers
    read, most = of.real(roles.texts[0]), 2**64 - 1 if is_wide else WORD

    def step(warp: Warp, mask: int) -> None:
        values, known = read(warp)
        whole = [min(max(int(x), 0), most) if np.isfinite(x) else 0 for x in values]
        both = np.array(whole, np.uint64).view(np.int64)
        if is_wide:
            _write_pair(warp, roles.target, both, known, mask)
        else:
            warp.write(roles.target, both, known, mask)

    return step


def _reciprocal(instruction: Instruction, roles: Roles) -> Step | None:
    """MUFU.RCP of fp32; .RCP64H gives the high word of 1/x for the high word of an fp64 number."""
    if "RCP64H" in roles.modifiers:
        read_word = of.number(roles.texts[0])

        def high_word(warp: Warp, mask: int) -> None:
            values, known = read_word(warp)
            with np.errstate(divide="ignore"):
                inverse = 1 / (values << 32).view(np.float64)
            warp.write(roles.target, inverse.view(np.int64) >> 32 & WORD, known, mask)

        return high_word
    if "RCP" not in roles.modifiers:
        return None
    read = of.real(roles.texts[0])

    def step(warp: Warp, mask: int) -> None:
        values, known = read(warp)
        with np.errstate(divide="ignore", over="ignore"):
            warp.write(roles.target, as_word(np.float32(1) / values), known, mask)

    return step


def _known(
    warp: Warp, sources: Sequence[Callable[[Warp], tuple[np.ndarray, int]]]
) -> tuple[list[np.ndarray], int]:
    """All numbers, and the lanes for which all are known; no numbers if there are none."""
    numbers, known = [], ALL
    for source in sources:
        values, one = source(warp)
        known &= one
        if not known:
            return [], 0
        numbers.append(values)
    return numbers, known


def _arithmetic(function: Callable[..., np.ndarray], count: int) -> Maker:
    """Sums and products of fp32 numbers."""

    def make(instruction: Instruction, roles: Roles) -> Step:
        sources = [of.real(text) for text in roles.texts[:count]]
        truncates = "RZ" in roles.modifiers

        def step(warp: Warp, mask: int) -> None:
            numbers, known = _known(warp, sources)
            if not known:
                warp.write(roles.target, ZERO, 0, mask)
                return
            with np.errstate(all="ignore"):
                exact = function(*(values.astype(np.float64) for values in numbers))
                rounded = exact.astype(np.float32)
            if truncates:
                too_far = np.abs(rounded.astype(np.float64)) > np.abs(exact)
                rounded = np.where(too_far, np.nextafter(rounded, np.float32(0)), rounded)
            warp.write(roles.target, as_word(rounded), known, mask)

        return step

    return make


def _double_arithmetic(function: Callable[..., np.ndarray], count: int) -> Maker:
    """Sums and products of fp64 numbers."""

    def make(instruction: Instruction, roles: Roles) -> Step:
        sources = [of.double(text) for text in roles.texts[:count]]

        def step(warp: Warp, mask: int) -> None:
            numbers, known = _known(warp, sources)
            result = ZERO
            if known:
                with np.errstate(all="ignore"):
                    result = function(*numbers).view(np.int64)
            _write_pair(warp, roles.target, result, known, mask)

        return step

    return make


def _load_halves(instruction: Instruction, roles: Roles) -> Step | None:
    """HFMA2 of zeros and two fp16 constants, by which the compiler loads a word."""
    if roles.texts[:2] != ["-RZ", "RZ"] or len(roles.texts) != 4:
        return None
    high, low = np.array([float(text) for text in roles.texts[2:]], np.float16).view(np.uint16)
    word = same(int(high) << 16 | int(low))

    def step(warp: Warp, mask: int) -> None:
        warp.write(roles.target, word, ALL, mask)

    return step


def _compare(instruction: Instruction, roles: Roles) -> Step | None:
    """FSETP: a comparison of fp32 numbers, combined with a predicate."""
    if roles.modifiers[0] not in COMPARISONS:
        return None
    first, second = (of.real(text) for text in roles.texts)
    compare = COMPARISONS[roles.modifiers[0]]

    def step(warp: Warp, mask: int) -> None:
        (a, one), (b, two) = first(warp), second(warp)
        write_comparison(warp, roles, bits(compare(a, b)), one & two, mask)

    return step


def _select(instruction: Instruction, roles: Roles) -> Step:
    """FSEL: the first number where a predicate is true, else the second."""
    first, second = (of.real(text) for text in roles.texts)

    def step(warp: Warp, mask: int) -> None:
        (a, one), (b, two) = first(warp), second(warp)
        value, sure = roles.flags[0](warp)
        known = sure & ((one & value) | (two & ~value))
        chosen: Floats = np.where(flags(value), a, b)
        warp.write(roles.target, as_word(chosen), known, mask)

    return step


MAKERS: dict[str, Maker] = {
    "I2F": _from_integer,
    "I2FP": _from_integer,
    "F2I": _to_integer,
    "MUFU": _reciprocal,
    "FADD": _arithmetic(lambda a, b: a + b, 2),
    "FMUL": _arithmetic(lambda a, b: a * b, 2),
    "FFMA": _arithmetic(lambda a, b, c: a * b + c, 3),
    "DMUL": _double_arithmetic(lambda a, b: a * b, 2),
    "DFMA": _double_arithmetic(lambda a, b, c: a * b + c, 3),
    "HFMA2": _load_halves,
    "FSETP": _compare,
    "FSEL": _select,
}
