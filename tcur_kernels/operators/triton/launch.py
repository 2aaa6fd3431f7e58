"""Launch parameters of the kernels, from the table `launch.csv`.

A row is for one ``kernel``, for the architecture ``arch`` and later ones, and for tubes of at most
``n3_max`` slices (empty: any number). It gives the ``form`` of the transform, the sizes of a tile,
the number of warps and of pipeline stages, and the reason for them. A kernel looks up its row and
never tunes anything itself, so a user's first step does not wait for that.
``python -m benchmarks.tune`` rewrites the table.
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

#: Oldest first. A device takes the row of the newest architecture that is not newer than its own.
NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = ("gfx942",)
#: Stands for Triton's interpreter, which takes the rows of the oldest NVIDIA architecture.
CPU = "cpu"

#: How many of the r ranks a product takes at a time, as its inner size or as the sides of a tile of
#: r x r numbers. It is the smallest inner size that Triton 3.6 takes, for fp32 as for bf16.
PARTS = 16
#: The same for products that take real and imaginary parts side by side: PART of each.
PART = PARTS // 2


def wrap_triton(kernel: Any) -> Any:
    """Wraps a compiled kernel by torch's function, and leaves an interpreted kernel as it is.

    Before torch 2.13, torch's function refuses kernels of Triton's interpreter.
    """
    return _wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


@dataclass(frozen=True)
class Row:
    """One row of the table, with 0 or "" for parameters that the kernel does not have."""

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
    """Reads the rows of a table from the text of a CSV file."""
    names = [field.name for field in fields(Row)]
    texts = {"kernel", "arch", "form", "reason"}
    rows = []
    for line in csv.DictReader(text.splitlines()):
        values = {n: line[n] if n in texts else int(line[n] or 0) for n in names}
        rows.append(Row(**values))  # type: ignore[arg-type]
    return tuple(rows)


@lru_cache(maxsize=1)
def table() -> tuple[Row, ...]:
    """Returns the rows of `launch.csv`, which is read once."""
    file = resources.files(__package__).joinpath("launch.csv")
    return parse(file.read_text(encoding="utf-8"))


def arch_of(device: torch.device) -> str:
    """Returns the architecture whose rows a device takes: of `NVIDIA` or `AMD`, or `CPU`.

    An NVIDIA GPU older than all of them takes the oldest, and every GPU of AMD takes gfx942.
    """
    if device.type != "cuda":
        return CPU
    if torch.version.hip is not None:
        return AMD[0]
    major, minor = torch.cuda.get_device_capability(device)
    known = [arch for arch in NVIDIA if int(arch[3:]) <= 10 * major + minor]
    return known[-1] if known else NVIDIA[0]


def row(kernel: str, arch: str, n3: int = 0) -> Row:
    """Returns the row for a kernel, an architecture and tubes of n3 slices.

    ``n3`` may be left out for kernels whose rows are for any length.
    """
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
    """Returns two precisions for `spectra.dot`.

    The first is for products that must be exact to fp32, the second for those that the user may
    have in a lower ``precision``. Factors in bf16 make the second bf16. NVIDIA's tensor cores reach
    fp32 by three products in TF32. AMD's matrix cores multiply fp32 numbers directly. Triton's
    interpreter multiplies exactly and does not know bf16. For it, TF32 and bf16 are emulated:
    `spectra.dot` rounds the operands as tensor cores do.

    Args:
        arch: as `arch_of` returns it.
        precision: "ieee", "tf32" or "bf16".
        factors: dtype of the packed factors.
    """
    exact = "ieee" if arch in AMD else "3xtf32"
    if factors == torch.bfloat16:
        precision = "bf16"
    if precision == "ieee":
        return exact, exact
    return exact, f"emulated {precision}" if arch == CPU else precision


def padded(rank: int, parts: int) -> int:
    """Rounds the rank up to a multiple of ``parts``, `PART` or `PARTS`."""
    return -(-rank // parts) * parts
