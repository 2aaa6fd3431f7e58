"""The machine code of the compiled library as objdump prints it, for x86-64."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

#: What objdump prints before the name of an instruction.
PREFIXES = {"lock", "rep", "repz", "repnz", "notrack", "bnd", "cs", "ds", "data16", "{evex}"}
FMA = re.compile(r"vfn?m(add|sub)")
#: Vectors: moves, and what only brings a number from memory into all lanes.
MOVE = re.compile(r"v?mov(a|u|dq|nt|q$|d$|ss|sd|l|h)")
BROADCAST = re.compile(r"vp?broadcast")
WIDTHS = {"x": 16, "y": 32, "z": 64}
#: Bytes of general registers by their names, for operands in memory beside them.
SUFFIXES = {"b": 1, "w": 2, "l": 4, "q": 8}
OPERAND = re.compile(r"^(?:%(?:fs|gs):)?(-?0x[0-9a-f]+)?\((%\w+)?(?:,(%\w+),(\d))?\)")


@dataclass(frozen=True)
class Memory:
    """An operand in memory: its address, base + index * scale + offset, and its size in bytes."""

    base: str | None
    index: str | None
    scale: int
    offset: int
    bytes: int
    is_loaded: bool
    is_stored: bool


@dataclass(frozen=True)
class Instruction:
    """One instruction; its operands are in the order of AT&T, the target last."""

    address: int
    name: str
    operands: tuple[str, ...]

    @property
    def is_vector(self) -> bool:
        """Whether it works on vector registers, whole or on their first number."""
        return any(re.match(r"%[xyz]mm", one) for one in self.operands)

    @property
    def width(self) -> int:
        """Bytes of its widest vector register."""
        found = (re.match(r"%([xyz])mm", one) for one in self.operands)
        return max((WIDTHS[match[1]] for match in found if match), default=0)

    @property
    def is_fma(self) -> bool:
        """Whether it multiplies and adds, whole vectors or first numbers."""
        return FMA.match(self.name) is not None

    @property
    def is_prefetch(self) -> bool:
        """Whether it only asks for a line of the caches."""
        return self.name.startswith("prefetch")

    @property
    def target(self) -> int | None:
        """Where a jump leads."""
        match = re.match(r"([0-9a-f]+) <", self.operands[0]) if self.operands else None
        return int(match[1], 16) if match and self.name.startswith("j") else None

    @property
    def kind(self) -> str:
        """One of `KINDS`: what units it needs beside those for loads and stores."""
        if self.is_fma:
            return "fmas"
        if self.is_prefetch:
            return "prefetches"
        if not self.is_vector:
            return "scalar"
        if MOVE.match(self.name) or (BROADCAST.match(self.name) and self.memory):
            return "moves"
        return "vector"

    @cached_property
    def memory(self) -> Memory | None:
        """Its operand in memory; a prefetch neither reads nor writes it, a push has none."""
        if self.name.startswith(("lea", "nop")):
            return None
        for place, operand in enumerate(self.operands):
            match = OPERAND.match(operand)
            if match:
                offset, base, index, scale = match.groups()
                is_last = place == len(self.operands) - 1
                is_loaded, is_stored = self._directions(is_last)
                return Memory(
                    base, index, int(scale or 1), int(offset or "0", 16),
                    self._bytes(operand), is_loaded, is_stored,
                )  # fmt: skip
        return None

    def _directions(self, is_last: bool) -> tuple[bool, bool]:
        """Whether the operand in memory is read, and whether it is written."""
        if self.is_prefetch:
            return False, False
        only_reads = ("cmp", "test", "call", "jmp", "push", "mul", "div", "idiv", "bt")
        if not is_last or self.name.startswith(only_reads):
            return True, False
        one = len(self.operands) == 1
        if one and self.name.startswith(("set", "pop")):
            return False, True
        if self.name.startswith(("mov", "vmov", "vextract", "vpextr", "vcvt")):
            return False, True
        return True, not self.name.startswith(("imul", "vucomi", "vcomi", "ucomi", "comi"))

    def _bytes(self, operand: str) -> int:
        """Size of the operand in memory."""
        if self.is_prefetch:
            return 64
        if re.search(r"\{1to\d+\}", operand) or BROADCAST.match(self.name):
            is_double = self.name.endswith(("pd", "sd", "q"))
            return 8 if is_double else {"b": 1, "w": 2}.get(self.name[-1], 4)
        if not self.is_vector:
            return self._scalar_bytes()
        if re.search(r"128|32x4|64x2", self.name):
            return 16
        if re.search(r"(32x8|64x4)", self.name):
            return 32
        if re.search(r"(?<!p)s[sd]$", self.name):
            return 4 if self.name.endswith("ss") else 8
        exact = {"vmovd": 4, "movd": 4, "vmovq": 8, "movq": 8, "vpinsrw": 2, "vpinsrd": 4}
        if self.name in exact:
            return exact[self.name]
        if re.match(r"v?mov[lh]p[sd]|vpinsrq|vpextrq", self.name):
            return 8
        halved = re.match(r"v?cvtps2pd|vpmov[sz]xwd|vpmov[sz]xdq", self.name)
        return self.width // 2 if halved else self.width

    def _scalar_bytes(self) -> int:
        """Size of an operand of an instruction without vectors."""
        for one in self.operands:
            match = re.match(r"%(\w+)$", one)
            if match:
                return register_bytes(match[1])
        if self.name.startswith(("call", "jmp", "push", "pop")):
            return 8
        return 1 if self.name.startswith("set") else SUFFIXES.get(self.name[-1], 8)


#: The kinds of instructions. Moves are those of vectors, to and from memory or registers.
KINDS = ("fmas", "vector", "moves", "prefetches", "scalar")


def register_bytes(name: str) -> int:
    """Bytes of a general register: rax is 8, r8d and eax are 4, ax is 2, al is 1."""
    if re.fullmatch(r"r([a-z]{2}|\d+)", name):
        return 8
    if name.startswith("e") or name.endswith("d"):
        return 4
    return 1 if name.endswith(("l", "b", "h")) else 2


@dataclass
class Function:
    """A function: its name without types of arguments, and its code."""

    name: str
    code: list[Instruction] = field(default_factory=list)

    def loops(self) -> list[list[Instruction]]:
        """The code between each jump backwards and where it leads."""
        first = self.code[0].address
        found = []
        for one in self.code:
            if one.target is not None and first <= one.target <= one.address:
                body = [i for i in self.code if one.target <= i.address <= one.address]
                found.append(body)
        return found

    def arithmetic_loops(self, least: int = 4) -> list[list[Instruction]]:
        """The innermost loops with at least so many FMAs of whole vectors."""
        whole = [
            body
            for body in self.loops()
            if sum(one.is_fma and one.width > 16 for one in body) >= least
        ]
        spans = [(body[0].address, body[-1].address) for body in whole]
        return [
            body
            for body, (low, high) in zip(whole, spans, strict=True)
            if not any(low <= a and b <= high and (a, b) != (low, high) for a, b in spans)
        ]

    def stack_registers(self) -> set[str]:
        """%rsp, and %rbp in functions that keep the place of their frame in it."""
        frame = any(i.name == "mov" and i.operands == ("%rsp", "%rbp") for i in self.code)
        return {"%rsp", "%rbp"} if frame else {"%rsp"}


def read(path: Path) -> list[Function]:
    """The functions of a library or an object.

    Raises:
        FileNotFoundError: there is no objdump.
    """
    if shutil.which("objdump") is None:
        raise FileNotFoundError("expected objdump (binutils) on the PATH")
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions: list[Function] = []
    for line in text.splitlines():
        head = re.match(r"[0-9a-f]+ <(.+)>:$", line)
        if head:
            functions.append(Function(head[1]))
            continue
        one = instruction(line)
        if one is not None:
            functions[-1].code.append(one)
    names = "\n".join(function.name for function in functions)
    command = ["c++filt"]
    plain = subprocess.run(command, input=names, capture_output=True, text=True, check=True).stdout
    for function, name in zip(functions, plain.splitlines(), strict=True):
        function.name = name
    return [function for function in functions if function.code]


def instruction(line: str) -> Instruction | None:
    """A line of the listing, " 1a2b:\\tvaddps (%rax,%rbx,4),%ymm0,%ymm1"."""
    match = re.match(r"\s+([0-9a-f]+):\t(.+)$", line)
    if not match:
        return None
    words = match[2].split()
    while len(words) > 1 and words[0] in PREFIXES:
        words = words[1:]
    text = " ".join(words[1:]).partition(" #")[0]
    # Commas inside of parentheses belong to an address.
    operands = re.findall(r"(?:\([^)]*\)|[^,(])+", text)
    return Instruction(int(match[1], 16), words[0], tuple(one.strip() for one in operands))
