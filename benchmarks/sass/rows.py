"""Rows of what was counted, in ``benchmarks/results/counted/sass.csv``."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .. import appending
from . import launches, model
from .cases import Case
from .count import KINDS, Counted, main_of

PATH = Path(__file__).parents[1] / "results" / "counted" / "sass.csv"
FIELDS = (
    "time", "commit", "nvcc", "triton", "case", "operator", "role", "kernel", "architecture",
    "blocks", "threads", "warp_instructions", *KINDS, "total", "shared_passes", "read_bytes",
    "written_bytes", "asked_ahead_bytes", "registers", "local_bytes", "shared_bytes",
    "blocks_together", "loads_kb", "copies_kb", "in_flight_kb", "busiest",
    *(f"{one.name}_{what}" for one in model.DEVICES for what in ("waves", "us", "percent")),
)  # fmt: skip

Row = dict[str, str]


def nvcc_version() -> str:
    """As "13.0.88"."""
    nvcc = launches.package_build().find_nvcc()
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return text.rpartition(" V")[2].split()[0]


def of_case(case: Case, found: list[Counted], commit: str) -> list[Row]:
    """A row for each launch of a call."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    common = {"time": now, "commit": commit, "nvcc": nvcc_version(), "triton": ""}
    main = main_of(found)
    rows = []
    for one in found:
        about = {"case": case.name, "operator": case.operator}
        about["role"] = "main" if one is main else "beside"
        row = common | about | {"architecture": one.kernel.architecture} | one.row(case)
        if one is not main:
            row = {name: value for name, value in row.items() if not name.endswith("_percent")}
        rows.append(row)
    return rows


def append(rows: list[Row], path: Path = PATH, columns: Sequence[str] = FIELDS) -> None:
    """Adds rows to a file, with the names of its columns if it is new."""
    appending.append(path, columns, rows)


def read(path: Path = PATH) -> list[Row]:
    """All rows, oldest first."""
    return appending.read(path)
