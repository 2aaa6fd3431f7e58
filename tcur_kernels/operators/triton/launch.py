"""Launch parameters: one short table, `launch.csv`, rewritten by ``python -m benchmarks.tune``.

Columns: ``kernel``; ``arch``, the oldest architecture the row is for; ``n3_max``, the longest tube
it is for (empty: any); ``form`` of the transform; sizes of the tile; warps and pipeline stages; the
reason. Nothing is tuned in a user's first step: a row is looked up and used.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources
from typing import Any

import torch
from torch.library import wrap_triton as _wrap_triton
from triton.runtime.jit import JITFunction

#: Oldest first: a device takes the rows of the newest architecture that is not newer than its own.
NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = ("gfx942",)
#: Stands for Triton's interpreter: the rows are those of the oldest architecture.
CPU = "cpu"

#: Inner size of products over the rank of a core alone, and a tile of its r x r numbers: the least
#: that Triton 3.6 takes, for fp32 as for bf16.
PARTS = 16
#: Ranks at a time where real and imaginary parts lie side by side in one inner size of PARTS.
PART = PARTS // 2


def wrap_triton(kernel: Any) -> Any:
    """torch's own, which before torch 2.13 refuses kernels of Triton's interpreter."""
    return _wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


@dataclass(frozen=True)
class Row:
    """One row of the table; 0 and "" where a kernel has no such parameter."""

    kernel: str
    arch: str
    n3_max: int
    form: str
    rows: int
    cols: int
    bins: int
    slices: int
    span: int
    warps: int
    stages: int
    reason: str


def parse(text: str) -> tuple[Row, ...]:
    """Rows of a table as text."""
    names = [field.name for field in fields(Row)]
    texts = {"kernel", "arch", "form", "reason"}
    rows = []
    for line in csv.DictReader(text.splitlines()):
        values = {n: line[n] if n in texts else int(line[n] or 0) for n in names}
        rows.append(Row(**values))  # type: ignore[arg-type]
    return tuple(rows)


@lru_cache(maxsize=1)
def table() -> tuple[Row, ...]:
    """The rows in use."""
    file = resources.files(__package__).joinpath("launch.csv")
    return parse(file.read_text(encoding="utf-8"))


def arch_of(device: torch.device) -> str:
    """Architecture whose rows a device takes."""
    if device.type != "cuda":
        return CPU
    if torch.version.hip is not None:
        return AMD[0]
    major, minor = torch.cuda.get_device_capability(device)
    known = [arch for arch in NVIDIA if int(arch[3:]) <= 10 * major + minor]
    return known[-1] if known else NVIDIA[0]


def row(kernel: str, arch: str, n3: int = 0) -> Row:
    """The row for a kernel, an architecture and a length of tubes, if it matters."""
    family = AMD if arch in AMD else NVIDIA
    usable = family[:1] if arch == CPU else family[: family.index(arch) + 1]
    fitting = [
        row
        for row in table()
        if row.kernel == kernel and row.arch in usable and (row.n3_max == 0 or n3 <= row.n3_max)
    ]
    # The newest architecture first, then the shortest tubes that are long enough.
    return min(fitting, key=lambda row: (-usable.index(row.arch), row.n3_max or 1 << 62))


def dot_precisions(arch: str, precision: str, factors: torch.dtype) -> tuple[str, str]:
    """Precision of products that must be exact to fp32, and of those that may be ``precision``.

    In the words of `spectra.dot`; factors in bf16 mean products in bf16. NVIDIA reaches fp32 on
    tensor cores by three products of TF32, AMD's matrix cores multiply fp32 as it is. The
    interpreter, which multiplies exactly and does not know bf16, is handed operands rounded as the
    tensor cores round them.
    """
    exact = "ieee" if arch in AMD else "3xtf32"
    if factors == torch.bfloat16:
        precision = "bf16"
    if precision == "ieee":
        return exact, exact
    return exact, f"emulated {precision}" if arch == CPU else precision


def padded(rank: int, parts: int) -> int:
    """The rank, padded to a multiple of what a product takes at a time."""
    return -(-rank // parts) * parts
