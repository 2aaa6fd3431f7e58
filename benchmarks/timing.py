"""Robust timing on a shared machine: interleaved rounds, medians, paired ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm


@dataclass(frozen=True)
class Timing:
    """Median and spread of one contender, and its ratio to the yardstick of the same round."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float


def interleave(
    contenders: dict[str, Callable[[], object]], yardstick: str, rounds: int
) -> dict[str, Timing]:
    """Runs all contenders in turn, ``rounds`` times, after one warm-up each.

    The ratio is the median over the rounds of (time / time of the yardstick in that round). A
    disturbance of a round usually affects both.
    """
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    timings = {}
    for name, values in seconds.items():
        ratios = [t / base for t, base in zip(values, seconds[yardstick], strict=True)]
        fifths = statistics.quantiles(values, n=5)
        timings[name] = Timing(
            1e3 * statistics.median(values),
            1e3 * fifths[0],
            1e3 * fifths[-1],
            statistics.median(ratios),
        )
    return timings
