"""Operands of instructions: how they are printed, and what they are for the 32 lanes of a warp.

A number of a warp is an array of 32 integers from 0 to 2^32 - 1, and a mask of the lanes for which
it is known. What was loaded from memory is not known. A predicate is two masks: of the lanes where
it is true, and of those where it is known.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .machine import Warp

Array = NDArray[np.int64]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Number = tuple[Array, int]
Predicate = tuple[int, int]

LANES = 32
ALL = 2**LANES - 1
WORD = 0xFFFFFFFF
ZERO = np.zeros(LANES, np.int64)

PREDICATE = re.compile(r"^!?U?P(\d|T)$")
_REGISTER = re.compile(r"^(?P<sign>[-~]?)(?P<name>U?R(?:\d+|Z))(?:\.H(?P<half>[01]))?$")
_CONSTANT = re.compile(
    r"^(?P<sign>[-~]?)c\[(?P<bank>0x[0-9a-f]+)\]"
    r"\[(?:(?P<index>U?R\w+)\+?)?(?P<offset>-?0x[0-9a-f]+)?\]$"
)
_INTEGER = re.compile(r"^-?0x[0-9a-f]+$|^-?\d+$")
_ADDRESS = re.compile(r"^(?:g?desc\[(?:UR\w+|c\[.*?\]\[.*?\])\])?\[(?P<inside>[^\]]*)\]$")


def bits(flags: NDArray[np.bool_]) -> int:
    """The mask of an array of 32 flags."""
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def flags(mask: int) -> NDArray[np.bool_]:
    """The flags of a mask."""
    words = np.frombuffer(mask.to_bytes(4, "little"), np.uint8)
    return np.unpackbits(words, bitorder="little").astype(bool)


def lanes(mask: int) -> list[int]:
    """The lanes of a mask, in order."""
    return [lane for lane in range(LANES) if mask >> lane & 1]


def same(value: int) -> Array:
    """The same integer for every lane."""
    return np.full(LANES, value & WORD, np.int64)


def signed(values: Array) -> Array:
    """Words as signed integers."""
    return (values ^ 0x80000000) - 0x80000000


def as_float(values: Array) -> Floats:
    """Words as the fp32 numbers that they are the bits of."""
    return values.astype(np.uint32).view(np.float32)


def as_word(values: Floats) -> Array:
    """The bits of fp32 numbers."""
    return values.view(np.uint32).astype(np.int64)


def next_register(name: str, count: int = 1) -> str:
    """The register ``count`` behind one."""
    if name.endswith("Z"):
        return name
    head = name.rstrip("0123456789")
    return f"{head}{int(name[len(head) :]) + count}"


def predicate(text: str) -> Callable[[Warp], Predicate]:
    """Reads a predicate."""
    inverted, name = text.startswith("!"), text.lstrip("!")
    if name in ("PT", "UPT"):
        constant = (0 if inverted else ALL, ALL)
        return lambda warp: constant

    def read(warp: Warp) -> Predicate:
        value, known = warp.predicates.get(name, (0, 0))
        return (value ^ ALL if inverted else value), known

    return read


def number(text: str) -> Callable[[Warp], Number]:
    """Reads 32 bits. What is neither a register nor a constant nor an integer is not known."""
    if match := _REGISTER.match(text):
        return _register(match["name"], match["sign"], match["half"])
    if match := _CONSTANT.match(text):
        return _constant(match)
    constant = (same(int(text, 0)), ALL) if _INTEGER.match(text) else (ZERO, 0)
    return lambda warp: constant


def _register(name: str, sign: str, half: str | None) -> Callable[[Warp], Number]:
    def read(warp: Warp) -> Number:
        values, known = warp.read(name)
        if half:
            values = values >> 16 if half == "1" else values & 0xFFFF
        return _with_sign(values, sign), known

    return read


def _with_sign(values: Array, sign: str) -> Array:
    """Words after a minus or a tilde."""
    return values ^ WORD if sign == "~" else -values & WORD if sign == "-" else values


def _constant(match: re.Match[str]) -> Callable[[Warp], Number]:
    bank, offset = int(match["bank"], 0), int(match["offset"] or "0", 0)
    index, sign = match["index"], match["sign"]

    def read(warp: Warp) -> Number:
        values, known = in_bank(warp, bank, index, offset, 4)
        return _with_sign(values, sign), known

    return read


def in_bank(warp: Warp, bank: int, index: str | None, offset: int, width: int) -> Number:
    """Up to four bytes of a bank of constants, for every lane those at its own index."""
    data = warp.constants.get(bank)
    if data is None:
        return ZERO, 0
    if index is None:
        return same(int.from_bytes(data[offset : offset + width], "little")), ALL
    at, known = warp.read(index)
    places = (at + offset) & WORD
    words = {place: int.from_bytes(data[place : place + width], "little") for place in set(places)}
    return np.array([words[place] for place in places], np.int64), known


def constant_place(text: str) -> tuple[int, str | None, int]:
    """Bank, index register and offset of an operand in constant memory.

    Raises:
        ValueError: it is something else.
    """
    match = _CONSTANT.match(text)
    if match is None:
        raise ValueError(f"expected a constant, got {text}")
    return int(match["bank"], 0), match["index"], int(match["offset"] or "0", 0)


def pair(text: str) -> Callable[[Warp], tuple[Array, int]]:
    """Reads 64 bits, as integers that may be negative."""
    if _INTEGER.match(text):
        value = (np.full(LANES, int(text, 0), np.int64), ALL)
        return lambda warp: value
    if match := _CONSTANT.match(text):
        behind = hex(int(match["offset"] or "0", 0) + 4)
        head = text[: match.start("offset")] if match["offset"] else text[:-1] + "+"
        low, high = number(text), number(f"{head}{behind}]")
    else:
        if text.startswith("-"):
            raise ValueError(f"expected 64 bits without a sign, got {text}")
        low, high = number(text), number(next_register(text))

    def read(warp: Warp) -> tuple[Array, int]:
        (a, known), (b, also) = low(warp), high(warp)
        return signed(b) << 32 | a, known & also

    return read


def real(text: str) -> Callable[[Warp], tuple[Floats, int]]:
    """Reads an fp32 number."""
    return _float(text, number, as_float, np.float32)


def double(text: str) -> Callable[[Warp], tuple[Doubles, int]]:
    """Reads an fp64 number, of two registers."""
    return _float(text, pair, lambda values: values.view(np.float64), np.float64)


def _float(
    text: str,
    integers: Callable[[str], Callable[[Warp], Number]],
    convert: Callable[[Array], np.ndarray],
    dtype: type,
) -> Callable[[Warp], tuple[np.ndarray, int]]:
    """A number of a register or one that is printed, with its sign and its bars."""
    minus, plain = text.startswith("-"), text.lstrip("-+")
    try:
        value = float(plain.replace("QNAN", "NAN"))
    except ValueError:
        source, nothing = integers(plain.strip("|")), np.zeros(LANES, dtype)
    else:
        constant = np.full(LANES, -value if minus else value, dtype), ALL
        return lambda warp: constant

    def read(warp: Warp) -> tuple[np.ndarray, int]:
        words, known = source(warp)
        if not known:  # as nearly always
            return nothing, 0
        values = np.abs(convert(words)) if plain.startswith("|") else convert(words)
        return (-values if minus else values), known

    return read


def address(text: str) -> Callable[[Warp], Number]:
    """Reads an address in memory, of 64 bits where the operand says so."""
    match = _ADDRESS.match(text)
    if match is None:
        raise ValueError(f"expected an address, got {text}")
    inside = match["inside"]
    terms = re.findall(r"([-+]?)(U?R(?:\d+|Z)|-?0x[0-9a-f]+)((?:\.\w+)*)", inside)
    has_wide = ".64" in inside

    def read(warp: Warp) -> Number:
        total, all_known = ZERO, ALL
        for sign, term, suffix in terms:
            if "R" not in term:
                total = total + (-int(term, 0) if sign == "-" else int(term, 0))
                continue
            values, known = warp.read(term)
            if ".64" in suffix or (has_wide and term.startswith("UR")):
                high, also = warp.read(next_register(term))
                values, known = values + (signed(high) << 32), known & also
            scale = re.search(r"\.X(\d+)", suffix)
            total = total + values * (int(scale.group(1)) if scale else 1)
            all_known &= known
        return total, all_known

    return read
