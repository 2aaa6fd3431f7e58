"""Times on a device, rows that are on disk as soon as they exist, and a limit for all of it."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import torch

from .rows import commit


@dataclass(frozen=True)
class Row:
    """One contender of one case."""

    section: str
    case: str
    contender: str
    ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    percent_of_copy: float | None = None  # of the bytes that must be moved, at the copy's rate
    peak_mb: float | None = None
    note: str = ""  # "graph": replayed from a CUDA graph; or why there is no time


class Rows:
    """Appends rows to a file, one by one, and keeps them for the table at the end."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.all: list[Row] = []
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self._common = {"commit": commit(), "torch": torch.__version__, "device": name}
        self._path = path
        self._names = ["time", *self._common, *(field.name for field in fields(Row))]
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._names).writeheader()

    def add(self, row: Row) -> None:
        """Writes and shows a row."""
        self.all.append(row)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        values = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
        with open(self._path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._names).writerow({"time": now, **self._common, **values})
        print(show(row), flush=True)


def show(row: Row) -> str:
    """A line of the table."""
    ms = "" if row.ms is None else f"{row.ms:.4g} ms"
    share = "" if row.percent_of_copy is None else f"{row.percent_of_copy:.0f} % of copy"
    peak = "" if row.peak_mb is None else f"{row.peak_mb:.0f} MB"
    name = f"{row.section:16} {row.case:34} {row.contender:16}"
    return f"{name} {ms:>12} {share:>14} {peak:>9} {row.note}"


def table(rows: list[Row]) -> str:
    """A line per case: its contenders side by side, or what became of them."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        share = "" if row.percent_of_copy is None else f" ({row.percent_of_copy:.0f})"
        result = f"{row.ms:.4g}{share}" if row.ms is not None else row.note.partition(":")[0]
        cases.setdefault(f"{row.section} {row.case}", []).append(f"{row.contender} {result}")
    return "\n".join(f"{case}: {', '.join(found)}" for case, found in cases.items())


class Clock:
    """Times calls on one device, until a deadline."""

    def __init__(self, device: torch.device, seconds: float, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._end - time.monotonic()

    def time(self, run: Callable[[], object], graph: bool = True) -> tuple[list[float], str]:
        """Milliseconds of every round, and how they were taken.

        On a GPU a call is captured in a CUDA graph, if it can be, and replayed: what is timed is
        the device's work, not the time that Python needs to launch it.
        """
        for _ in range(2):
            run()
        if self.device.type != "cuda":
            return [self._on_host(run) for _ in range(self.rounds)], ""
        torch.cuda.synchronize(self.device)
        replay, note = (captured(run) if graph else None), ""
        if replay is not None:
            run, note = replay, "graph"
            run()
        first = self._on_device(run)
        # Short calls are repeated more often, long ones less: about a fifth of a second each.
        rounds = max(3, min(4 * self.rounds, int(200 / max(first, 1e-3))))
        return [self._on_device(run) for _ in range(rounds)], note

    @staticmethod
    def _on_host(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    @staticmethod
    def _on_device(run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def captured(run: Callable[[], object]) -> Callable[[], object] | None:
    """The call as a graph, or None where something in it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


class Bench:
    """What every section gets: the clock, the rows, and the measured copy rate."""

    def __init__(self, clock: Clock, rows: Rows, tiny: bool) -> None:
        self.clock, self.rows, self.tiny = clock, rows, tiny
        self.device = clock.device
        self.bytes_per_ms = 0.0  # of a copy, reads and writes both

    def measure(
        self,
        section: str,
        case: str,
        contender: str,
        run: Callable[[], object],
        moved: int | None = None,
        graph: bool = True,
    ) -> None:
        """Times a call and adds its row; ``moved`` are the bytes that it cannot avoid to move."""
        if self.clock.left < 0:
            self.rows.add(Row(section, case, contender, note="left out: no time"))
            return
        try:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            ms, note = self.clock.time(run, graph)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.rows.add(Row(section, case, contender, note="out of memory"))
            return
        median = statistics.median(ms)
        fifths = statistics.quantiles(ms, n=5)
        share = None
        if moved is not None and self.bytes_per_ms > 0:
            share = 100 * moved / self.bytes_per_ms / median
        peak = None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 1e6
        self.rows.add(
            Row(section, case, contender, median, fifths[0], fifths[-1], share, peak, note)
        )
