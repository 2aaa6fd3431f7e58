"""Executes a call step by step, by step.cpp, which is compiled when it is first needed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tcur_kernels.files.whole import replacing

from . import listing

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("step.cpp")
KEPT = ROOT / "build" / "cpu_count"
NAMES = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp")
NAMES += tuple(f"r{number}" for number in range(8, 16))
NONE, LIBRARY = -1, -2
LOADS, STORES, PAST_CACHES, FETCHES_FIRST, FETCHES_SECOND, VECTOR = (1 << i for i in range(6))


class Access(ctypes.Structure):
    """How an instruction uses memory, as step.cpp has it."""

    _fields_ = (
        ("offset", ctypes.c_int64),
        ("base", ctypes.c_int32),
        ("index", ctypes.c_int32),
        ("scale", ctypes.c_int32),
        ("bytes", ctypes.c_int32),
        ("how", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Caches:
    """Sizes in bytes, and ways, of the two levels."""

    first: tuple[int, int]
    second: tuple[int, int]


@dataclass(frozen=True)
class Steps:
    """What was executed: how often each instruction, and how many lines the caches exchanged."""

    times: dict[listing.Instruction, int]
    on_stack: int  # reads and writes of vectors
    to_first: int
    from_first: int
    to_second: int
    from_second: int
    outside: int  # instructions of other libraries

    def total(self, of: Callable[[listing.Instruction], int]) -> int:
        """The sum over all executed instructions."""
        return sum(count * of(one) for one, count in self.times.items())


@functools.cache
def helper() -> ctypes.CDLL:
    """step.cpp, compiled.

    Raises:
        FileNotFoundError: there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "c++").split()[0]
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    target = KEPT / f"step-{digest}.so"
    if not target.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with replacing(target) as fresh:
            command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", str(SOURCE)]
            subprocess.run([*command, "-o", str(fresh)], check=True)
    return ctypes.CDLL(str(target))


class Library:
    """A library that this process has loaded, and its machine code."""

    def __init__(self, path: Path) -> None:
        self.functions = listing.read(path)
        self.code = [one for function in self.functions for one in function.code]
        self.place = _place(path)
        numbers = (ctypes.c_int32 * len(NAMES))()
        helper().registers(numbers)
        self._registers = dict(zip(NAMES, numbers, strict=True))
        self._size = max(one.address for one in self.code) + 1
        self._numbers = (ctypes.c_int32 * self._size)(*([NONE] * self._size))
        for number, one in enumerate(self.code):
            self._numbers[one.address] = number
        ends = [one.address for one in self.code[1:]] + [self._size]
        accesses = [self._access(one, end) for one, end in zip(self.code, ends, strict=True)]
        self._accesses = (Access * len(accesses))(*accesses)

    def _access(self, one: listing.Instruction, end: int) -> Access:
        """How an instruction uses memory; an offset from %rip counts from the next one."""
        memory = one.memory
        if memory is None:
            return Access(0, NONE, NONE, 1, 0, 0)
        how = LOADS * memory.is_loaded + STORES * memory.is_stored + VECTOR * (one.width > 0)
        if one.is_prefetch:
            how = FETCHES_FIRST if one.name == "prefetcht0" else FETCHES_SECOND
        if re.match("v?movnt", one.name) and memory.is_stored:
            how += PAST_CACHES
        relative = memory.base == "%rip"
        base = LIBRARY if relative else self._number(memory.base)
        offset = memory.offset + (end if relative else 0)
        index = self._number(memory.index)
        return Access(offset, base, index, memory.scale, memory.bytes, how)

    def _number(self, register: str | None) -> int:
        return NONE if register is None else self._registers[register.removeprefix("%")]

    def entry(self, name: str) -> int:
        """Where a function begins, by what its name with types of arguments begins with."""
        found = {one.code[0].address for one in self.functions if one.name.startswith(name)}
        if len(found) != 1:
            raise LookupError(f"expected one function {name}, found {len(found)}")
        return found.pop()

    def count(
        self,
        call: Callable[[], object],
        entry: int,
        caches: Caches,
        warm: int = 1,
    ) -> Steps:
        """What this library executes from one call of one of its functions to the next.

        Args:
            call: calls the function, in this thread.
            entry: where the function begins.
            caches: the two levels of the model.
            warm: how many calls only fill the caches.

        Raises:
            RuntimeError: the function was not called so often.
        """
        step = helper()
        size = [ctypes.c_int64(one) for one in (caches.first[0], caches.second[0])]
        step.caches(size[0], caches.first[1], size[1], caches.second[1])
        times = (ctypes.c_int64 * len(self.code))()
        stack = (ctypes.c_int64 * len(self.code))()
        crossed = (ctypes.c_int64 * 5)()
        integers = [ctypes.c_int64(i) for i in (len(self.code), entry, warm, 1)]
        place, length = ctypes.c_int64(self.place), ctypes.c_int64(self._size)
        step.start(place, length, self._numbers, self._accesses, *integers)
        try:
            call()
        finally:
            entries = step.stop(times, stack, crossed)
        if entries < warm + 1:
            raise RuntimeError(f"expected {warm + 1} calls of the function, got {entries}")
        executed = {one: count for one, count in zip(self.code, times, strict=True) if count}
        return Steps(executed, sum(stack), *crossed)


def _place(path: Path) -> int:
    """The address at which this process has a library."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if fields[-1] == str(path) and fields[2] == "00000000":
            return int(fields[0].partition("-")[0], 16)
    raise LookupError(f"{path} is not loaded")
