"""How fast a GPU could be at what was counted. A model: nothing here is measured but copies.

A kernel takes at least as long as the busiest part of a multiprocessor. All parts are taken to be
busy all the time, on all multiprocessors at once: latencies, the last wave and caches are left out.
So a real kernel takes longer.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from .listing import Kernel

#: What a multiprocessor has, from sm_90 on. A warp's registers come in pieces of 256.
REGISTERS, SHARED_BYTES, WARPS, BLOCKS = 65536, 228 * 1024, 64, 32
#: Warp instructions that a multiprocessor can begin in a cycle.
ISSUED, FP32, MULTIPLIED, INTEGER = 4, 4, 2, 2

_FP32 = re.compile(r"(FFMA|FADD|FMUL)\b")
_MULTIPLIED = re.compile(r"IMAD\b")
_INTEGER = re.compile(
    r"(IADD3?|LOP3|SHF|LEA|I?ABS|[IFHB]SETP|F?SEL|PRMT|V?[IF]MNMX|VIADD|VIADDMNMX|VIMNMX|SGXT|MOV"
    r"|PLOP3|P2R|R2P|F2FP)\b"
)


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: as in tables.
        architecture: as "sm_90".
        multiprocessors: how many it has.
        gigahertz: of the boost clock.
        copy_tb_s: what a copy moves, reads and writes together, in 10^12 bytes per second.
    """

    name: str
    architecture: str
    multiprocessors: int
    gigahertz: float
    copy_tb_s: float


#: The H100 copied as fast (rows of benchmarks/results/gpu). The others are taken to reach 90 % of
#: their data sheets' 4.8 and 8 TB/s.
DEVICES = (
    Device("H100", "sm_90", 132, 1.98, 3.0),
    Device("H200", "sm_90", 132, 1.98, 4.3),
    Device("B200", "sm_100", 148, 1.965, 7.2),
)


def blocks_together(kernel: Kernel, threads: int, shared_bytes: int) -> int:
    """How many blocks a multiprocessor holds at a time.

    Args:
        kernel: registers of a thread, and shared memory that every launch takes.
        threads: of a block.
        shared_bytes: of a block, that the launch asks for.
    """
    warps = -(-threads // 32)
    of_warp = -(-kernel.registers * 32 // 256) * 256
    return min(
        REGISTERS // (of_warp * warps),
        SHARED_BYTES // max(1, shared_bytes + kernel.shared_bytes),
        WARPS // warps,
        BLOCKS,
    )


def cycles(opcodes: Counter[str], shared_passes: float) -> dict[str, float]:
    """Cycles of one multiprocessor that each of its parts needs for all that was issued.

    A multiplication of integers takes the pipe of fp32 and goes through one half of it alone.
    """
    fp32 = _sum(opcodes, _FP32)
    multiplied = _sum(opcodes, _MULTIPLIED)
    return {
        "issue": sum(opcodes.values()) / ISSUED,
        "fp32": max((fp32 + multiplied) / FP32, multiplied / MULTIPLIED),
        "integer": _sum(opcodes, _INTEGER) / INTEGER,
        "shared": shared_passes,
    }


def _sum(opcodes: Counter[str], pattern: re.Pattern[str]) -> float:
    return sum(count for opcode, count in opcodes.items() if pattern.match(opcode))


def microseconds(device: Device, busy: float) -> float:
    """The time for ``busy`` cycles that all multiprocessors share evenly."""
    return busy / device.multiprocessors / device.gigahertz / 1e3


def budget(device: Device, moved: int) -> float:
    """Instructions of lanes that a device can issue while a copy moves ``moved`` bytes."""
    issued = ISSUED * 32 * device.multiprocessors * device.gigahertz * 1e9
    return issued * moved / (device.copy_tb_s * 1e12)


def percent_of_copy(device: Device, busy: float, moved: int) -> float:
    """The speed relative to a copy of ``moved`` bytes, at most 100."""
    copied = moved / device.copy_tb_s / 1e6
    return min(100.0, 100 * copied / microseconds(device, busy))
