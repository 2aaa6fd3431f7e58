"""Rows of measurements on a device, written to disk at once, and a short table of them."""

from __future__ import annotations

import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from . import appending

#: The note of a row begins with one of these if something went wrong.
BAD = ("FAILED", "WRONG")


@dataclass(frozen=True)
class Row:
    """The result of one contender in one case; milliseconds are medians."""

    section: str
    case: str
    contender: str
    backend: str = ""
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    percent_of_copy: float | None = None  # time to copy the bytes it must move, over its time
    copy_ms: float | None = None  # a copy of the same shape and dtypes, timed in the same rounds
    peak_mb: float | None = None  # of device memory, above what was allocated before the call
    host_us: float | None = None  # of the Python call alone, without waiting for the device
    note: str = ""  # "graph" or "launched"; or why there is no time

    @property
    def is_bad(self) -> bool:
        """Whether something went wrong."""
        return self.note.startswith(BAD)


def facts(device: torch.device, commit: str) -> dict[str, str | int]:
    """The columns that all rows of a run share; allocates nothing on the device."""
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "commit": commit,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "driver": _driver() if on_gpu else "",
        "device": properties.name if properties else "cpu",
        "l2_bytes": getattr(properties, "L2_cache_size", 0),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip().partition("\n")[0]


class Rows:
    """Appends rows to a file, one by one."""

    def __init__(self, path: Path, common: dict[str, str | int]) -> None:
        self._path, self._common = path, common
        self._names = ["time", *common, *(field.name for field in fields(Row))]
        appending.append(path, self._names, [], end="\r\n")

    def add(self, row: Row) -> None:
        """Writes and shows a row."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        values = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
        row_of_file = {"time": now, **self._common, **values}
        appending.append(self._path, self._names, [row_of_file], end="\r\n")
        print(show(row), flush=True)


def read(path: Path, start: int = 0) -> list[Row]:
    """The rows of a file, beginning with number ``start``."""
    texts = {"section", "case", "contender", "backend", "note"}
    rows = []
    for line in appending.read(path)[start:]:
        values = {
            field.name: line[field.name]
            if field.name in texts
            else (float(line[field.name]) if line[field.name] else None)
            for field in fields(Row)
        }
        rows.append(Row(**values))  # type: ignore[arg-type]
    return rows


def show(row: Row) -> str:
    """A line for a row."""
    ms = "" if row.ms is None else f"{row.ms:.4g} ms"
    share = "" if row.percent_of_copy is None else f"{row.percent_of_copy:.0f} % of copy"
    peak = "" if row.peak_mb is None else f"{row.peak_mb:.0f} MB"
    host = "" if row.host_us is None else f"host {row.host_us:.0f} us"
    name = f"{row.section:16} {row.case:38} {row.contender:14} {row.backend:8}"
    return f"{name} {ms:>12} {share:>14} {peak:>8} {host:>14} {row.note}".rstrip()


def table(rows: list[Row]) -> list[str]:
    """A line per case with the milliseconds of its contenders and, in brackets, % of a copy."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row.section, row.case), []).append(row)
    return [
        f"{section} {case}: {', '.join(map(_entry, sorted(own, key=lambda row: row.ms is None)))}"
        for (section, case), own in cases.items()
    ]


def _entry(row: Row) -> str:
    share = "" if row.percent_of_copy is None else f" ({row.percent_of_copy:.0f})"
    result = f"{row.ms:.4g}{share}" if row.ms is not None else row.note.partition(":")[0]
    return f"{row.contender} {row.backend}".strip() + f" {result}"


def shortened(lines: list[str], most: int, width: int) -> list[str]:
    """Shortens a table to ``most`` lines; every section keeps its first lines."""
    sections: dict[str, list[str]] = {}
    for line in lines:
        own = sections.setdefault(line.partition(" ")[0], [])
        own.append(line if len(line) <= width else line[: width - 1] + "…")
    left, quota = most, dict.fromkeys(sections, 0)
    while left > 0 and any(quota[name] < len(own) for name, own in sections.items()):
        for name, own in sections.items():
            if left > 0 and quota[name] < len(own):
                quota[name] += 1
                left -= 1
    kept = []
    for name, own in sections.items():
        kept += own[: quota[name]]
        if quota[name] < len(own):
            kept[-1:] = [kept[-1], f"{name}: {len(own) - quota[name]} more in table.txt"]
    return kept
