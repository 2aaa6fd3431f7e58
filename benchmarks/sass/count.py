"""Counts what the launches of a call would execute, on a GPU of some architecture."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from . import model
from .cases import Case
from .launches import Launch, compiled
from .listing import CLASSES, Kernel
from .machine import Issued, Program, constants_of
from .memory import SECTOR

#: How many blocks are executed where blocks differ.
SPREAD = 32
#: Classes of instructions, in the order of tables.
KINDS = tuple(name for name, _ in CLASSES)


@dataclass(frozen=True)
class Counted:
    """One launch, and what all of its warps issue together."""

    launch: Launch
    kernel: Kernel
    issued: Issued

    @property
    def instructions(self) -> int:
        """Warp instructions."""
        return round(sum(self.issued.instructions.values()))

    def by_kind(self) -> dict[str, float]:
        """Warp instructions by class."""
        found = dict.fromkeys(KINDS, 0.0)
        for one in self.kernel.code:
            found[one.kind] += self.issued.instructions[one.address]
        return found

    def by_opcode(self) -> Counter[str]:
        """Warp instructions by opcode."""
        found: Counter[str] = Counter()
        for one in self.kernel.code:
            found[one.opcode] += self.issued.instructions[one.address]
        return found

    @property
    def blocks_together(self) -> int:
        """Blocks of a multiprocessor."""
        return model.blocks_together(self.kernel, self.launch.threads, self.launch.shared_bytes)

    def in_flight(self, of_a_warp: int) -> float:
        """KB of a multiprocessor, if every warp has as many bytes on their way."""
        warps = -(-self.launch.threads // 32) * self.blocks_together
        return of_a_warp * warps / 1e3

    def row(self, case: Case) -> dict[str, str]:
        """The numbers of a row. "per element" is of lanes, by the numbers of W."""
        issued, launch, kernel = self.issued, self.launch, self.kernel
        busy = model.cycles(self.by_opcode(), issued.shared_cycles)
        most = max(busy, key=lambda part: busy[part])
        row = {
            "kernel": launch.kernel,
            "blocks": str(launch.blocks),
            "threads": str(launch.threads),
            "warp_instructions": str(self.instructions),
        }
        row |= {kind: _per(32 * count, case) for kind, count in self.by_kind().items()}
        row |= {
            "total": _per(32 * self.instructions, case),
            "shared_passes": str(round(issued.shared_cycles)),
            "read_bytes": _per(SECTOR * issued.sectors["read"], case),
            "written_bytes": _per(SECTOR * issued.sectors["written"], case),
            "asked_ahead_bytes": _per(issued.asked_ahead, case),
            "registers": str(kernel.registers),
            "local_bytes": str(kernel.local_bytes),
            "shared_bytes": str(launch.shared_bytes + kernel.shared_bytes),
            "blocks_together": str(self.blocks_together),
            "loads_kb": f"{self.in_flight(issued.most_loaded):.1f}",
            "copies_kb": f"{self.in_flight(issued.most_copied):.1f}",
            "in_flight_kb": f"{self.in_flight(issued.most_in_flight):.1f}",
            "busiest": most,
        }
        for device in model.DEVICES:
            if device.architecture == kernel.architecture:
                together = self.blocks_together * device.multiprocessors
                row[f"{device.name}_waves"] = f"{launch.blocks / together:.2f}"
                row[f"{device.name}_us"] = f"{model.microseconds(device, busy[most]):.2f}"
                if case.floor_bytes:
                    moved = case.elements * case.floor_bytes
                    percent = model.percent_of_copy(device, busy[most], moved)
                    row[f"{device.name}_percent"] = f"{percent:.1f}"
        return row


def _per(count: float, case: Case) -> str:
    return f"{count / case.elements:.4f}"


def of_case(case: Case, architecture: str, spread: int = SPREAD) -> list[Counted]:
    """All launches of a call; ``spread`` is that of `of_grid`.

    Raises:
        FileNotFoundError: there is no nvcc.
        machine.NotKnown: a branch depends on data that the case does not know.
    """
    found = []
    for launch in case.launches():
        kernel = compiled(launch, architecture, case.sizes[0])
        found.append(Counted(launch, kernel, of_grid(launch, kernel, spread)))
    return found


def main_of(found: list[Counted]) -> Counted:
    """The launch that issues most."""
    return max(found, key=lambda one: one.instructions)


def of_grid(launch: Launch, kernel: Kernel, spread: int = SPREAD) -> Issued:
    """What all warps of a launch issue.

    All warps of the first, second, middle and last block are executed. If these blocks differ,
    ``spread`` blocks that are evenly spread are executed, or all if there are no more. The others
    are taken to issue as many as these do on average.
    """
    program = Program(kernel)
    constants = constants_of(kernel, launch.threads, launch.blocks, launch.arguments)
    last = launch.blocks - 1

    def of_block(block: int) -> Issued:
        total = Issued()
        for warp in range(-(-launch.threads // 32)):
            issued = program.run(constants, block, warp, launch.threads, launch.known)
            issued.places.clear()  # how many there were is all that is asked here
            total.add(issued)
        return total

    def differ(one: Issued, other: Issued) -> bool:
        return (one.instructions, one.shared_cycles, one.sectors) != (
            other.instructions,
            other.shared_cycles,
            other.sectors,
        )

    found = [of_block(block) for block in sorted({0, min(1, last), last // 2, last})]
    if any(differ(found[0], one) for one in found):
        count = min(spread, launch.blocks)
        found = [of_block(last * i // max(1, count - 1)) for i in range(count)]
    total = Issued()
    for one in found:
        total.add(one, launch.blocks / len(found))
    return total
