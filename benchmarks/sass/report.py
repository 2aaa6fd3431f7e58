"""Tables of what was counted."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..documents import table
from ..gpu_operators import SHAPES, text
from . import model
from .count import KINDS
from .rows import Row

DOCS = Path(__file__).parents[2] / "docs"
DOCUMENTS = (DOCS / "performance.md", DOCS / "design.md")
NSIGHT = Path(__file__).parents[1] / "results" / "gpu" / "NVIDIA-H100-80GB-HBM3.csv"
#: The commit that Nsight Compute's rows are of. What is counted of it is for `nsight` alone.
MEASURED = "d50b9b3"


@dataclass(frozen=True)
class Call:
    """The rows of one case on one architecture, as they were counted together."""

    rows: Sequence[Row]

    @property
    def main(self) -> Row:
        """The row of the main kernel."""
        return next(row for row in self.rows if row["role"] == "main")

    @property
    def beside(self) -> float:
        """Lane instructions of the other launches, for each number of W."""
        return sum(float(row["total"]) for row in self.rows if row["role"] != "main")


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """The tables by the names of their marks."""
    calls = calls_of([row for row in rows if row["commit"] != MEASURED])
    return {
        "sass_instructions": instructions(calls),
        "sass_ceilings": ceilings(calls),
        "sass_totals": totals(calls),
        "sass_nsight": nsight([row for row in rows if row["commit"] == MEASURED], measured()),
    }


def measured() -> list[Row]:
    """Nsight Compute's rows of that commit and of the CUDA kernels, in the order of launches."""
    with open(NSIGHT, newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    about = ("ncu", MEASURED, "cuda")
    return [row for row in found if (row["section"], row["commit"], row["backend"]) == about]


def calls_of(rows: Sequence[Row]) -> list[tuple[Call, Call]]:
    """For each case and architecture, how it was counted first and last."""
    found: dict[tuple[str, str], dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        runs = found.setdefault((row["case"], row["architecture"]), {})
        runs.setdefault((row["commit"], row["time"]), []).append(row)
    every = [list(runs.values()) for runs in found.values()]
    return [(Call(runs[0]), Call(runs[-1])) for runs in every]


def change(before: float | str, now: float | str, form: str) -> str:
    """A number, behind what it was where that was another one."""
    both = [format(float(one), form) if one != "" else "–" for one in (before, now)]
    return " → ".join(dict.fromkeys(both))


def instructions(calls: Sequence[tuple[Call, Call]]) -> str:
    """Table of lane instructions for each number of W: of main kernels, and of launches beside."""
    heads = ["case", "kernel", "architecture", "total", *KINDS, "beside it"]
    lines = []
    for before, now in calls:
        row = now.main
        line = [row["case"], f"`{row['kernel']}`", row["architecture"]]
        line.append(change(before.main["total"], row["total"], ".3g"))
        line += [f"{float(row[kind]):.3g}" for kind in KINDS]
        line.append(change(before.beside, now.beside, ".3g"))
        lines.append(line)
    return table(heads, lines)


def totals(calls: Sequence[tuple[Call, Call]]) -> str:
    """Table of what main kernels execute for each number of W, and of loads on their way."""
    heads = ["case", "architecture", "instructions", "loads, KB", "blocks"]
    return table(
        heads,
        [
            [
                now.main["case"],
                now.main["architecture"],
                change(before.main["total"], now.main["total"], ".3g"),
                f"{float(now.main['loads_kb']):.0f}",
                now.main["blocks_together"],
            ]
            for before, now in calls
            if now.main["operator"] in ("materialize", "core_grad_dense")
            and now.main["architecture"] == "sm_90"
        ],
    )


def ceilings(calls: Sequence[tuple[Call, Call]]) -> str:
    """Table of what a multiprocessor holds at a time, and of the speed that nothing can pass."""
    heads = ["case", "architecture", "registers", "shared, KiB", "blocks", "waves", "loads, KB"]
    heads += ["copies, KB", "binds", *(f"{device.name}, %" for device in model.DEVICES)]
    lines = []
    for before, now in ((one.main, other.main) for one, other in calls):
        waves = dict.fromkeys(now[f"{device.name}_waves"] for device in model.DEVICES)
        lines.append(
            [
                now["case"],
                now["architecture"],
                change(before["registers"], now["registers"], ".0f"),
                f"{float(now['shared_bytes']) / 1024:.0f}",
                change(before["blocks_together"], now["blocks_together"], ".0f"),
                next(filter(None, waves)),
                change(before["loads_kb"], now["loads_kb"], ".0f"),
                change(before["copies_kb"], now["copies_kb"], ".0f"),
                now["busiest"],
                *(
                    change(before[f"{one.name}_percent"], now[f"{one.name}_percent"], ".0f")
                    for one in model.DEVICES
                ),
            ]
        )
    return table(heads, lines)


def nsight(counted: Sequence[Row], others: Sequence[Row]) -> str:
    """Table of warp instructions as counted and as Nsight Compute measured them.

    The launches of a call are in the same order in both: Nsight Compute cuts their names off.
    """
    heads = ["case", "kernel", "registers", "measured", "instructions", "measured", "difference"]
    lines = []
    for name in dict.fromkeys(row["case"] for row in others):
        operator, _, shape = name.partition(" ")
        case = f"{operator} {text(SHAPES[shape])} "
        ours = [row for row in counted if row["case"].startswith(case)]
        theirs = [row for row in others if row["case"] == name]
        for row, other in zip(ours, theirs, strict=True):
            found, known = int(row["warp_instructions"]), _said(other, "instructions")
            difference = f"{100 * (found - known) / known:+.2f} %"
            registers = [row["registers"], str(_said(other, "registers"))]
            numbers = [f"{found:,}", f"{known:,}", difference]
            lines.append([row["case"], f"`{row['kernel']}`", *registers, *numbers])
    return table(heads, lines)


def _said(row: Row, name: str) -> int:
    """A counter in a row's note."""
    match = re.search(rf"\b{name} ([\d,]+)", row["note"])
    if match is None:
        raise ValueError(f"expected {name} in the note of {row['case']}")
    return int(match[1].replace(",", ""))
