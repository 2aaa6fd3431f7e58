"""Loads and stores: what they move, in how many pieces, and what is on its way."""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from . import operands as of
from .operands import LANES, ZERO, Number, lanes

if TYPE_CHECKING:
    from .listing import Instruction
    from .machine import Warp
    from .roles import Step

#: Bytes of one access by the modifiers of its opcode.
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
SECTOR, LINE, BANKS = 32, 128, 32
_REGISTER = re.compile(r"(?<![A-Z])R(\d+)")


def step_of(instruction: Instruction) -> Step | None:
    """How to execute what concerns memory; None for all else."""
    name = instruction.name
    if name == "DEPBAR":
        return lambda warp, mask: warp.wait_for_copies()
    if name == "SHFL":
        return _exchange(instruction)
    if name == "CCTL" and "PF2" in instruction.opcode:
        return _prefetch(instruction)
    if name in ("LDS", "STS", "LDSM", "STSM", "ATOMS"):
        return _in_shared(instruction)
    if name == "LDGSTS":
        return _copy(instruction)
    if instruction.kind == "global" and name != "CCTL":
        return _in_device(instruction)
    return None


def registers_of(instruction: Instruction) -> list[str]:
    """Registers that an instruction reads or writes."""
    opcode, operands = instruction.opcode, instruction.operands
    if "128" in opcode or instruction.kind == "tensor":
        count = 4
    elif "64" in opcode or instruction.kind == "fp64":
        count = 2
    else:
        count = 1
    found = []
    for place, text in enumerate(operands):
        is_wide = "WIDE" in opcode and place in (0, len(operands) - 1)
        size = count if "[" not in text else 1
        for first in _REGISTER.findall(text):
            found += [f"R{int(first) + i}" for i in range(2 if is_wide or ".64" in text else size)]
    return found


def width_of(instruction: Instruction) -> int:
    """Bytes of a lane."""
    last = instruction.opcode.rpartition(".")[2]
    if instruction.name in ("LDSM", "STSM"):
        return 4 * int(last) if last.isdigit() else 4
    return next((WIDTHS[m] for m in instruction.opcode.split(".") if m in WIDTHS), 4)


def _places(instruction: Instruction) -> list[str]:
    return [text for text in instruction.operands if "[" in text and not text.startswith("c[")]


def _targets(instruction: Instruction, width: int) -> list[str]:
    """Registers that a load writes."""
    if not instruction.name.startswith(("LD", "ATOM")):
        return []
    first = next(text for text in instruction.operands if not of.PREDICATE.match(text))
    return [of.next_register(first, i) for i in range(max(1, width // 4))]


def _exchange(instruction: Instruction) -> Step:
    """SHFL goes through shared memory's crossbar, in one pass."""
    target = instruction.operands[1]

    def step(warp: Warp, mask: int) -> None:
        warp.issued.shared_cycles += 1
        warp.write(target, ZERO, 0, mask)

    return step


def _prefetch(instruction: Instruction) -> Step:
    address = of.address(instruction.operands[0])

    def step(warp: Warp, mask: int) -> None:
        lines, unsure = pieces(address(warp), 1, mask, LINE)
        warp.issued.asked_ahead += LINE * (len(lines) + unsure)

    return step


def _in_shared(instruction: Instruction) -> Step:
    width = width_of(instruction)
    address, targets = of.address(_places(instruction)[0]), _targets(instruction, width)
    is_matrix = instruction.name in ("LDSM", "STSM")

    def step(warp: Warp, mask: int) -> None:
        # A matrix of 8 x 8 numbers of 16 bits is a pass.
        passed = width // 4 if is_matrix else passes(address(warp), width, mask)
        warp.issued.shared_cycles += passed
        for target in targets:
            warp.write(target, ZERO, 0, mask)

    return step


def _copy(instruction: Instruction) -> Step:
    """LDGSTS: from device memory to shared memory, past the registers."""
    width = width_of(instruction)
    to, start = (of.address(text) for text in _places(instruction))

    def step(warp: Warp, mask: int) -> None:
        warp.issued.shared_cycles += passes(to(warp), width, mask)
        _ask(warp, "read", start(warp), width, mask)
        warp.copy(width * mask.bit_count())

    return step


def _in_device(instruction: Instruction) -> Step:
    width = width_of(instruction)
    address, targets = of.address(_places(instruction)[-1]), _targets(instruction, width)
    kind = "read" if targets else "written"

    def step(warp: Warp, mask: int) -> None:
        at = address(warp)
        _ask(warp, kind, at, width, mask)
        if targets:
            warp.load(targets, width * mask.bit_count())
        for place, target in enumerate(targets):
            values, known = _known(warp, at, 4 * place, mask)
            warp.write(target, values, known, mask)

    return step


def _ask(warp: Warp, kind: str, address: Number, width: int, mask: int) -> None:
    sectors, unsure = pieces(address, width, mask, SECTOR)
    warp.issued.sectors[kind] += len(sectors) + unsure
    if kind == "read":
        warp.issued.places.update(sectors)


def _known(warp: Warp, address: Number, offset: int, mask: int) -> Number:
    """The words that lie there, as far as the launch says so."""
    values, known, found = np.zeros(LANES, np.int64), address[1] & mask, 0
    for start, contents in warp.known:
        for lane in lanes(known):
            at = int(address[0][lane]) + offset - start
            if 0 <= at <= len(contents) - 4:
                values[lane] = int.from_bytes(contents[at : at + 4], "little")
                found |= 1 << lane
    return values, found


def passes(address: Number, width: int, mask: int) -> int:
    """Passes of an access through shared memory: 32 banks of four bytes in each.

    Lanes go in turns of 128 bytes. In a turn a bank gives one word, to all that ask for it. Where
    addresses are not known there are no conflicts.
    """
    values, known = address
    # Only the distances between the words matter.
    words = (values >> 2) - (values[0] >> 2)
    return _passes(words.tobytes(), width, mask, known)


@functools.lru_cache(maxsize=100_000)
def _passes(words: bytes, width: int, mask: int, known: int) -> int:
    first_words = np.frombuffer(words, np.int64)
    together = min(LANES, LINE // width)
    total = 0
    for first in range(0, LANES, together):
        turn = lanes(mask & ((1 << together) - 1) << first)
        if not turn:
            continue
        asked = {
            int(first_words[lane]) + i
            for lane in turn
            for i in range(max(1, width // 4))
            if known >> lane & 1
        }
        total += max(Counter(word % BANKS for word in asked).values(), default=1)
    return total


def pieces(address: Number, width: int, mask: int, size: int) -> tuple[set[int], int]:
    """Aligned pieces of ``size`` bytes that the lanes ask for.

    Returns:
        Those whose addresses are known, as address / size; and of the others as many as there must
        be.
    """
    values, known = address
    sure = {int(values[lane]) // size for lane in lanes(mask & known)}
    unsure = lanes(mask & ~known)
    return sure, -(-len(unsure) * width // size)
