"""Executes one warp of a kernel as far as its branches need it, and counts what it issues.

Loops take as many turns as the arguments of a launch say, because the integers behind them are
computed. What is loaded from memory is not known, unless a launch says what lies there. A branch
that depends on what is not known is an error and not a guess. Barriers hold nobody up: a warp needs
nothing from another warp to know its way. Where lanes part, those with the lowest address go first,
until the others are at the same place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from . import flow, memory, semantics
from . import operands as of
from .listing import Instruction, Kernel
from .operands import ALL, LANES, ZERO, Array, Number, Predicate, flags, same
from .roles import Step

#: Where constants of a launch lie in bank 0: the threads of a block, its blocks, its arguments.
BANK = {"sm_80": (0x0, 0xC, 0x160), "sm_90": (0x0, 0xC, 0x210), "sm_100": (0x360, 0x370, 0x380)}
#: A warp that issues more than this does not end.
MOST = 20_000_000

NotKnown = flow.NotKnown


@dataclass
class Issued:
    """What warps issued.

    Attributes:
        instructions: how often each instruction was issued, by its address.
        shared_cycles: passes through shared memory, conflicts of banks included.
        sectors: pieces of 32 bytes of device memory that were asked for, "read" and "written".
            One that several instructions ask for counts for each of them.
        most_loaded, most_copied, most_in_flight: the most bytes that a warp has on their way
            before it waits for them: to registers, to shared memory, and both together.
        asked_ahead: bytes that prefetches named, by lines of 128 bytes.
        places: the pieces whose addresses are known, as address / 32, and how often each was read.
    """

    instructions: Counter[int] = field(default_factory=Counter)
    shared_cycles: float = 0
    sectors: Counter[str] = field(default_factory=Counter)
    most_loaded: int = 0
    most_copied: int = 0
    most_in_flight: int = 0
    asked_ahead: float = 0
    places: Counter[int] = field(default_factory=Counter)

    def add(self, other: Issued, times: float = 1) -> None:
        """Adds what other warps issued, ``times`` times."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, Counter):
                for key, count in theirs.items():
                    mine[key] += count * times
            elif one.name.startswith("most"):
                setattr(self, one.name, max(mine, theirs))
            else:
                setattr(self, one.name, mine + theirs * times)


def constants_of(
    kernel: Kernel, threads: int, blocks: int | tuple[int, ...], arguments: bytes
) -> dict[int, bytes]:
    """The banks of constants of a launch, whose grid has up to three dimensions."""
    grid = (blocks,) if isinstance(blocks, int) else blocks
    at_threads, at_blocks, at_arguments = BANK[kernel.architecture]
    bank = bytearray(0x1000 + len(arguments))
    for place, sizes in ((at_threads, (threads,)), (at_blocks, grid)):
        for offset, size in enumerate((*sizes, 1, 1)[:3]):
            bank[place + 4 * offset : place + 4 * offset + 4] = size.to_bytes(4, "little")
    bank[at_arguments : at_arguments + len(arguments)] = arguments
    return {0: bytes(bank), 2: kernel.jumps, 4: bytes(0x1000)}


class Program:
    """A kernel, decoded."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.index = {one.address: place for place, one in enumerate(kernel.code)}
        self.steps = [_step(one) for one in kernel.code]
        self.meetings = {i for i, one in enumerate(kernel.code) if one.name == "BSYNC"}

    def run(
        self,
        constants: Mapping[int, bytes],
        block: int | tuple[int, ...],
        warp: int,
        threads: int,
        known: Sequence[tuple[int, bytes]] = (),
    ) -> Issued:
        """Executes a warp to its end.

        Args:
            constants: those of `constants_of`.
            block: up to three indices.
            warp: which one of the block.
            threads: of a block.
            known: addresses in device memory, and what lies there.

        Raises:
            NotKnown: a branch depends on what is not known, or the warp does not end.
        """
        state = Warp(constants, block, warp, known)
        waiting = {0: [(1 << min(LANES, threads - LANES * warp)) - 1]}  # by where they go on
        while waiting:
            place = min(waiting)
            groups = waiting.pop(place)
            state.mask = sum(groups)
            instruction = self.kernel.code[place]
            # Groups of lanes come to a BSYNC one after the other, and go on together.
            state.count(instruction, len(groups) if place in self.meetings else 1)
            self.steps[place](state, state.switched_on(instruction))
            for lanes, address in state.jumps:
                waiting.setdefault(self.index[address], []).append(lanes)
                state.mask &= ~lanes
            if state.mask:
                waiting.setdefault(place + 1, []).append(state.mask)
        return state.issued


class Warp:
    """Registers and predicates of a warp, the lanes that are at work, and what was issued.

    Attributes:
        constants: banks of constants.
        mask: lanes that are at work.
        jumps: lanes that go on elsewhere after this instruction, and the address.
        issued: what was issued.
    """

    def __init__(
        self,
        constants: Mapping[int, bytes],
        block: int | tuple[int, ...],
        warp: int,
        known: Sequence[tuple[int, bytes]],
    ) -> None:
        self.constants, self.known = constants, known
        self.registers: dict[str, Number] = {"RZ": (ZERO, ALL), "URZ": (ZERO, ALL)}
        self.predicates: dict[str, Predicate] = {}
        self.mask = 0
        self.jumps: list[tuple[int, int]] = []
        self.issued = Issued()
        self._total = 0
        self._unsure = 0  # lanes of which it is not known whether this instruction is on
        self._loads: dict[int, int] = {}  # bytes of a load by its number
        self._pending: dict[str, int] = {}  # number of the load that a register waits for
        self._copies = 0  # bytes on their way to shared memory
        lanes = np.arange(LANES, dtype=np.int64)
        self._special = {"SR_TID.X": lanes + LANES * warp, "SR_LANEID": lanes}
        names = ("SRZ", "SR_CgaCtaId", "SR_TID.Y", "SR_TID.Z", "SR_CTAID.Y", "SR_CTAID.Z")
        self._special.update(dict.fromkeys(names, ZERO))
        for axis, index in zip("XYZ", (block,) if isinstance(block, int) else block, strict=False):
            self._special[f"SR_CTAID.{axis}"] = same(index)

    def count(self, instruction: Instruction, times: int) -> None:
        """An instruction is issued."""
        self.issued.instructions[instruction.address] += times
        self.jumps = []
        self._total += 1
        if self._total > MOST:
            raise NotKnown(f"{instruction.address:#x}: more than {MOST} instructions")

    def special(self, name: str) -> Number:
        """A special register."""
        values = self._special.get(name)
        return (ZERO, 0) if values is None else (values, ALL)

    def switched_on(self, instruction: Instruction) -> int:
        """The lanes for which an instruction is on.

        Where that is not known, it counts as on, and what it writes is not known.
        """
        if not instruction.guard:
            self._unsure = 0
            return self.mask
        value, known = of.predicate(instruction.guard)(self)
        self._unsure = known ^ ALL
        return self.mask & (value | self._unsure)

    def read(self, name: str) -> Number:
        """A register."""
        return self.registers.get(name, (ZERO, 0))

    def write(self, name: str, values: Array, known: int, mask: int) -> None:
        """Writes a register for the lanes of a mask; a uniform one is the same for all lanes."""
        if name[-1] == "Z" or not mask:
            return
        known &= ~self._unsure
        if mask != ALL and name[0] != "U":
            before, sure = self.read(name)
            values = np.where(flags(mask), values, before)
            known = (known & mask) | (sure & ~mask)
        self.registers[name] = values, known

    def write_predicate(self, name: str, value: int, known: int, mask: int) -> None:
        """Writes a predicate for the lanes of a mask; a uniform one is the same for all lanes."""
        if name[-1] == "T" or not mask:
            return
        if name[0] == "U":
            mask = ALL
        known &= ~self._unsure
        before, sure = self.predicates.get(name, (0, 0))
        self.predicates[name] = (
            (value & mask) | (before & ~mask),
            (known & mask) | (sure & ~mask),
        )

    # What is on its way.
    def load(self, registers: Sequence[str], size: int) -> None:
        """A load of ``size`` bytes to registers begins."""
        self._loads[self._total] = size
        self._pending.update(dict.fromkeys(registers, self._total))
        self._note()

    def copy(self, size: int) -> None:
        """A copy of ``size`` bytes to shared memory begins."""
        self._copies += size
        self._note()

    def wait_for_copies(self) -> None:
        """All copies have arrived."""
        self._copies = 0

    def use(self, names: Sequence[str]) -> None:
        """Registers are used: their loads have arrived, and with them all that began before."""
        if not self._pending:
            return
        last = max((self._pending.get(name, 0) for name in names), default=0)
        if last:
            self._loads = {n: size for n, size in self._loads.items() if n > last}
            self._pending = {name: n for name, n in self._pending.items() if n > last}

    def _note(self) -> None:
        issued, loads = self.issued, sum(self._loads.values())
        issued.most_loaded = max(issued.most_loaded, loads)
        issued.most_copied = max(issued.most_copied, self._copies)
        issued.most_in_flight = max(issued.most_in_flight, loads + self._copies)


def _step(instruction: Instruction) -> Step:
    """How to execute an instruction."""
    if instruction.name in flow.MAKERS:
        return flow.MAKERS[instruction.name](instruction)
    inner = memory.step_of(instruction) or semantics.step_of(instruction)
    used = memory.registers_of(instruction)
    if not used:
        return inner

    def step(warp: Warp, mask: int) -> None:
        warp.use(used)
        inner(warp, mask)

    return step
