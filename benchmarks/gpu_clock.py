"""Times calls on a device, without the influence of launches and caches, until a deadline.

Calls that are safe to capture run as a CUDA graph. All others are launched, several between two
events, behind a kernel that keeps the device busy until all of them are in its queue. In both cases
Python's time does not count; it is measured separately. Calls alternate between several sets of
buffers, so that none finds its data in the second-level cache. The contenders of a case take turns,
round by round, and medians are reported.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Run = Callable[[], object]

BLOCK_MS = 2.0  # device time between two events
ROUNDS = 15
CASE_MS = 2000.0  # time of all rounds of a case
CACHES = 8  # size of all sets of buffers, in units of the second-level cache
SETS = 96  # most sets of buffers
#: Most launched calls between two events, and most milliseconds of the host for them. Within these
#: limits the queue of the device holds all calls.
LAUNCHES, QUEUE_MS = 24, 4.0
CYCLES_PER_MS = 2e6  # of a device's clock, roughly


@dataclass(frozen=True)
class Contender:
    """A call to be timed. It is made when its turn comes, so a failed allocation becomes a row.

    Attributes:
        make: returns the calls, one for each set of buffers.
        mode: "graph" if the call is safe to capture; "launched" if not; or "wall" for wall-clock
            time, which includes Python's time.
        share: the bytes that the call must move, as a fraction of those of the yardstick.
        floor_ms: a lower bound of its time, if that is not a copy.
        check: returns what is wrong with the result, or None.
        absent: why the contender is not available, or None.
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
    """A contender after warm-up: its block of calls between two events, and first measurements."""

    contender: Contender
    block: Run
    calls: int  # in a block
    hidden_ms: float  # host time to issue a block
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
        """How many sets of ``size`` bytes are needed to make the cache useless."""
        return max(1, min(SETS, math.ceil(CACHES * self.l2_bytes / max(1, size))))

    def wait(self) -> None:
        """Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def time(self, ready: Ready) -> float:
        """Milliseconds per call, measured over one block."""
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
        """Milliseconds that the host needs to issue a block, without waiting for the device."""
        found = []
        for _ in range(rounds):
            self.wait()
            start = time.perf_counter()
            block()
            found.append(1e3 * (time.perf_counter() - start))
        self.wait()
        return statistics.median(found)

    def prepare(self, contender: Contender, capture: Callable[[Run], Run | None]) -> Ready:
        """Warms a contender up, and captures it if that is allowed.

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
        """Peak memory of a call, including what earlier calls keep, such as W_eff."""
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
    """Captures a block as a CUDA graph; returns its replay."""
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
        graph.replay()  # reads models and inputs, which the block keeps alive

    return replay


def first_line(error: BaseException) -> str:
    """The type and the first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
