"""Rows of what Triton's kernels would execute, in ``benchmarks/results/counted/sass_triton.csv``.

The Triton that is imported compiles them. For an older one, put it before the others:
``PYTHONPATH=.venv/oldest_triton:. python -m benchmarks.sass triton``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import triton

from ..documents import table
from . import rows, triton_launches
from .cases import BF16, FP32, NAMES, SHAPES
from .report import change
from .triton_launches import Counted, Launch

PATH = Path(__file__).parents[1] / "results" / "counted" / "sass_triton.csv"
FIELDS = (
    "commit", "triton", "case", "kernel", "architecture", "registers", "local_bytes",
    "shared_bytes", "programs", "total", "factor_bytes", "load_bytes",
)  # fmt: skip

#: On sm_100 Triton's kernels poll for memory of their tensor cores, and go by what they find there.
ARCHITECTURE = "sm_90"


def cases() -> Iterator[tuple[str, int, list[Launch]]]:
    """Names of calls, the numbers of their W, and their launches."""
    for shape in SHAPES:
        n3, n1, n2, _ = shape
        text = "x".join(map(str, shape))
        for base, out, layers in ((FP32, FP32, False), (BF16, BF16, False), (FP32, FP32, True)):
            found = triton_launches.materialize_launches(ARCHITECTURE, shape, base, out, layers)
            form = "layers" if layers else "stack"
            name = f"materialize {text} {NAMES[base]}->{NAMES[out]} {form}"
            yield name, n3 * n1 * n2, found
        found = triton_launches.core_grad_launches(ARCHITECTURE, shape, FP32)
        yield f"core_grad_dense {text} fp32", n3 * n1 * n2, found


def of_call(name: str, elements: int, launches: Sequence[Launch], commit: str) -> rows.Row:
    """The row of the launch of a call that executes most."""
    found = [triton_launches.count(ARCHITECTURE, launched) for launched in launches]
    main = max(found, key=lambda one: sum(one.classes.values()))
    return {
        "commit": commit,
        "triton": triton.__version__,
        "case": name,
        "kernel": main.kernel,
        "architecture": ARCHITECTURE,
        "registers": str(main.registers),
        "local_bytes": str(main.local_bytes),
        "shared_bytes": str(main.shared_bytes),
        "programs": str(main.programs),
        "total": f"{sum(main.classes.values()) / elements:.4f}",
        "factor_bytes": f"{_factor_bytes(main) / elements:.4f}",
        "load_bytes": str(max(main.widths["LDG"])),
    }


def _factor_bytes(one: Counted) -> float:
    return one.once.get("mixed_ptr", 0.0) + one.once.get("horizontal_ptr", 0.0)


def comparison() -> str:
    """Table of main kernels, with what became of a number since the first rows."""
    heads = ["case", "Triton", "kernel", "instructions", "P and R̂, bytes"]
    heads += ["registers", "programs", "widest load, bytes"]
    found: dict[tuple[str, str], list[rows.Row]] = {}
    for row in rows.read(PATH):
        found.setdefault((row["case"], row["triton"]), []).append(row)
    lines = []
    for (case, version), runs in found.items():
        before, now = runs[0], runs[-1]
        line = [case, version, f"`{now['kernel']}`"]
        line.append(change(before["total"], now["total"], ".3g"))
        line.append(change(before["factor_bytes"], now["factor_bytes"], ".3g"))
        for name in ("registers", "programs", "load_bytes"):
            line.append(change(before[name], now[name], ".0f"))
        lines.append(line)
    return table(heads, lines)
