"""The machine code of a kernel, as CUDA's tools print it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: What one instruction of a kind counts as. The first pattern that its name begins with decides.
CLASSES = (
    ("tensor", r"[A-Z]?MMA|[HIQO]G?MMA|UTC[A-Z]*MMA|WARPGROUP|LDT|STT|UTCBAR"),
    ("conversion", r"F2F|F2I|I2F|F2FP|I2I|FRND|HADD2\.F32|F2IP"),
    ("predicate", r"U?ISETP|FSETP|U?PLOP3|U?P2R|U?R2P|VOTE|DSETP|HSETP2|BSETP"),
    ("fp32", r"F(ADD|MUL|FMA|SEL|MNMX|CHK|SWZADD)|MUFU"),
    ("fp64", r"D(ADD|MUL|FMA|MNMX)"),
    ("shared", r"LDS|STS(?!M)|ATOMS|SHFL|MOVM|STSM"),
    ("global", r"LDG(?!DEP)|STG|ATOM|RED(?!UX)|CCTL|UBLK|UTMA|LD$|ST$|LD\.|ST\.|LDL|STL"),
    (
        "control",
        r"BRA|BRX|BSSY|BSYNC|BREAK|BAR|EXIT|CALL|RET|NOP|WARPSYNC|U?DEPBAR|LDGDEPBAR|ACQBULK|PREEXIT"
        r"|MEMBAR|ERRBAR|FENCE|SYNCS|YIELD|ENDCOLLECTIVE|NANOSLEEP|ELECT|JMP|KILL|BMOV|BPT|UCGABAR",
    ),
    ("integer", r""),
)
_CLASSES = tuple((name, re.compile(pattern)) for name, pattern in CLASSES)

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+) )?\s*([^;]+?) ?;")


@dataclass(frozen=True)
class Instruction:
    """One line of the listing.

    Attributes:
        address: in bytes from the start of the kernel.
        guard: the predicate that switches it on, as "P0" or "!UP1"; empty: always on.
        opcode: its name, with modifiers, as "IMAD.WIDE.U32".
        operands: as they are printed.
    """

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """One of `CLASSES`."""
        return next(name for name, pattern in _CLASSES if pattern.match(self.opcode))


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        name: its symbol.
        architecture: as "sm_90".
        code: its instructions, in the order of their addresses.
        registers: of a thread.
        shared_bytes: of a block, without what a launch asks for, with what the system keeps.
        local_bytes: of a thread: spilled registers and the stack. None is 0.
        jumps: constants of the bank that holds tables of jumps.
    """

    name: str
    architecture: str
    code: tuple[Instruction, ...]
    registers: int
    shared_bytes: int
    local_bytes: int
    jumps: bytes


@cache
def tool(name: str) -> str:
    """Path of cuobjdump: Triton's, which has one always, or that of the CUDA toolkit."""
    import shutil

    import triton.backends.nvidia

    own = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"expected {name} in Triton or on the PATH")
    return found


def _dump(cubin: Path, *how: str) -> str:
    command = [tool("cuobjdump"), *how, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read(cubin: Path) -> dict[str, Kernel]:
    """The kernels of a file that nvcc or Triton made for one architecture, by their symbols."""
    text, usage, elf = (_dump(cubin, how) for how in ("-sass", "-res-usage", "-elf"))
    architecture = _found(r"(?:\.target\s+|code for )(sm_\d+)", text)  # older tools say the latter
    kernels = {}
    for part in text.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        own = re.search(
            rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
        )
        assert own, f"{cubin}: no resources of {name}"
        registers, stack, shared, local = map(int, own.groups())
        code = tuple(map(_instruction, filter(None, map(_LINE.match, body.splitlines()))))
        kernels[name] = Kernel(
            name, architecture, code, registers, shared, stack + local, _constants(elf, name)
        )
    return kernels


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, pattern
    return match.group(1)


def _constants(elf: str, name: str) -> bytes:
    match = re.search(
        rf"^\.nv\.constant2\.{re.escape(name)}\n(.*?)(?:\n\n|\Z)", elf, re.DOTALL | re.MULTILINE
    )
    words = re.findall(r"0x([0-9a-f]{8})", match.group(1)) if match else []
    return b"".join(int(word, 16).to_bytes(4, "little") for word in words)


def _instruction(match: re.Match[str]) -> Instruction:
    address, guard, text = match.groups()
    opcode, _, operands = text.strip().partition(" ")
    parts = (
        tuple(part.strip().replace(".reuse", "") for part in operands.split(","))
        if operands
        else ()
    )
    return Instruction(int(address, 16), guard or "", opcode, parts)
