"""Times on a device that launching and caching cannot spoil, until a deadline.

What is known to be safe is captured in a CUDA graph; everything else is launched, several calls
between two events, behind a kernel that keeps the device busy until all of them are in its queue.
Either way the time of Python does not count; it is measured for itself. A call comes on several
sets of buffers, so that none finds its data in the second-level cache. Contenders of a case take
turns, round by round, and medians are what counts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Run = Callable[[], object]

BLOCK_MS = 2.0  # of device time between two events
ROUNDS = 15
CASE_MS = 2000.0  # of all rounds of a case
CACHES = 8  # data of all sets of buffers, in second-level caches
SETS = 96  # of buffers, at most
#: Launched calls between two events at most, and milliseconds that the host needs for them, so that
#: the queue of the device holds them all.
LAUNCHES, QUEUE_MS = 24, 4.0
CYCLES_PER_MS = 2e6  # of a device's clock, about


@dataclass(frozen=True)
class Contender:
    """A call to be timed, made when its turn comes: what it cannot allocate is a row then.

    Attributes:
        make: returns the call on each set of buffers.
        mode: "graph" for what is safe to capture; "launched"; or "wall", by the clock on the wall,
            Python's time included.
        share: bytes that it must move, as a part of those that the yardstick moves.
        floor_ms: what it cannot be faster than, where that is not a copy.
        check: what is wrong with its result, or None.
        absent: why it is not here, or None.
    """

    name: str
    backend: str
    make: Callable[[], Sequence[Run]]
    mode: str = "graph"
    share: float = 1.0
    floor_ms: float | None = None
    check: Callable[[], str | None] | None = None
    absent: str | None = None


@dataclass(frozen=True)
class Ready:
    """A contender that ran already: what is between two events, and what was measured before."""

    contender: Contender
    block: Run
    calls: int  # in a block
    hidden_ms: float  # that the host needs to issue a block
    host_us: float | None = None
    peak_mb: float | None = None
    note: str = ""


class Clock:
    """Times blocks of calls on one device."""

    def __init__(self, device: torch.device, until: float, tiny: bool) -> None:
        self.device, self.tiny, self._until = device, tiny, until
        self.on_gpu = device.type == "cuda"
        properties = torch.cuda.get_device_properties(device) if self.on_gpu else None
        self.l2_bytes = getattr(properties, "L2_cache_size", 0)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._until - time.time()

    def sets(self, size: int) -> int:
        """Sets of buffers of so many bytes for the cache to be of no use."""
        return max(1, min(SETS, math.ceil(CACHES * self.l2_bytes / max(1, size))))

    def wait(self) -> None:
        """Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def time(self, ready: Ready) -> float:
        """Milliseconds of one call, in a block of them."""
        if not self.on_gpu or ready.note == "wall":
            self.wait()
            start = time.perf_counter()
            ready.block()
            self.wait()
            return 1e3 * (time.perf_counter() - start) / ready.calls
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(CYCLES_PER_MS * min(100.0, 1.5 * ready.hidden_ms + 0.05)))
        before.record()
        ready.block()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / ready.calls

    def issue_ms(self, block: Run, rounds: int = 3) -> float:
        """Milliseconds that the host needs to issue a block, nothing waited for."""
        found = []
        for _ in range(rounds):
            self.wait()
            start = time.perf_counter()
            block()
            found.append(1e3 * (time.perf_counter() - start))
        self.wait()
        return statistics.median(found)

    def prepare(self, contender: Contender, capture: Callable[[Run], Run | None]) -> Ready:
        """Warms a contender up, and has it captured if it may be.

        Raises:
            ArithmeticError: its result is wrong.
        """
        runs = contender.make()
        if contender.check is not None and (wrong := contender.check()):
            raise ArithmeticError(wrong)
        before = torch.cuda.memory_allocated(self.device) if self.on_gpu else 0
        for run in runs:
            run()
        self.wait()
        if not self.on_gpu:
            return Ready(contender, _sequence(runs, 1), len(runs), 0.0)
        peak = self._peak_mb(runs[-1], before)
        host_ms = self.issue_ms(_sequence(runs, 1), 5) / len(runs)
        measured = (1e3 * host_ms, peak)
        most = max(1, min(LAUNCHES, int(QUEUE_MS / max(1e-3, host_ms))))
        runs, all_runs = runs[:most], runs
        note = "wall" if contender.mode == "wall" else "launched"
        once = Ready(contender, _sequence(runs, 1), len(runs), len(runs) * host_ms, note=note)
        each_ms = max(1e-3, min(self.time(once) for _ in range(2)))
        if contender.mode == "graph":
            loops = max(1, min(400, math.ceil(BLOCK_MS / each_ms / len(all_runs))))
            if (replay := capture(_sequence(all_runs, loops))) is not None:
                block, calls = _sequence([replay], 2), 2 * loops * len(all_runs)
                block()
                return Ready(contender, block, calls, self.issue_ms(block), *measured, "graph")
        loops = math.ceil(BLOCK_MS / each_ms / len(runs))
        loops = max(3, loops) if note == "wall" else max(1, min(loops, most // len(runs)))
        calls = loops * len(runs)
        return Ready(contender, _sequence(runs, loops), calls, calls * host_ms, *measured, note)

    def _peak_mb(self, run: Run, before: int) -> float:
        """Peak of a call; what earlier ones keep, like W_eff, belongs to it."""
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.wait()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e6


def _sequence(runs: Sequence[Run], loops: int) -> Run:
    def block() -> None:
        for _ in range(loops):
            for run in runs:
                run()

    return block


def captured(block: Run) -> Run:
    """A block as a CUDA graph, replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        block()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block()

    def replay(_kept: Run = block) -> None:
        graph.replay()  # reads what the block refers to: models, inputs

    return replay


def first_line(error: BaseException) -> str:
    """A name and a line for an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
