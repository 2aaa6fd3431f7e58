"""Result rows, which are appended and never rewritten; each records its circumstances."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

import tcur_kernels as tcur

from .appending import append as append_rows
from .appending import read as read_rows
from .commit import commit
from .memory import Peak
from .timing import Timing

RESULTS = Path(__file__).parent / "results"
MEMORY = "-memory"  # suffix of the names of files with rows about memory


def processor_name() -> str:
    """The processor, as the system calls it."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(is_forced: bool = False) -> str:
    """The processor, its instruction set and second-level cache, in words for a file name.

    "forced" is added where our kernels were forced to these: torch's own stay as they are.
    """
    cpu = tcur.build_info()["cpu"]
    facts = f"{cpu['isa_chosen']}-{cpu['l2_cache'] // 1024}K{'-forced' if is_forced else ''}"
    name = f"{processor_name()}-{facts}"
    return "".join(c if c.isalnum() else "-" for c in name)


def append(
    op: str,
    case: str,
    shape: tuple[int | bool, ...],
    measured: Mapping[str, Timing | Peak],
    is_forced: bool = False,
) -> Path:
    """Appends one row per contender and returns the file; times and memory have separate files."""
    common = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "op": op,
        "case": case,
        "shape": "x".join(map(str, shape)),
    }
    (kind,) = {type(numbers) for numbers in measured.values()}
    path = RESULTS / f"{device_name(is_forced)}{MEMORY if kind is Peak else ''}.csv"
    rows = []
    for contender, result in measured.items():
        numbers = {name: f"{value:.4g}" for name, value in asdict(result).items()}
        rows.append({**common, "contender": contender, **numbers})
    append_rows(path, [*common, "contender", *kind.__dataclass_fields__], rows, end="\r\n")
    return path


def read() -> list[dict[str, str]]:
    """All rows of all devices, oldest first.

    Adds the columns ``device`` and ``value``, which is milliseconds or megabytes.
    """
    found = []
    for path in sorted(RESULTS.glob("*.csv")):
        device = path.stem.removesuffix(MEMORY)
        for row in read_rows(path):
            if "contender" in row:  # else of what was counted
                value = row["peak_mb" if path.stem.endswith(MEMORY) else "median_ms"]
                found.append({"device": device, "value": value, **row})
    return sorted(found, key=lambda row: row["time"])
