"""Runs the pieces of work of a section: errors become rows, and none starts after the deadline."""

from __future__ import annotations

import gc
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from .gpu_clock import CASE_MS, ROUNDS, Clock, Contender, Ready, Run, captured, first_line
from .gpu_progress import Progress
from .gpu_rows import Row, Rows

#: Median milliseconds of contenders, by name and backend.
Medians = dict[tuple[str, str], float]


class DeviceLost(BaseException):
    """The device accepts no more calls from this process, so the process must end."""


@dataclass(frozen=True)
class Ceilings:
    """The peak rates of a device per millisecond, measured by `gpu_ceilings.ceilings`."""

    bytes_per_ms: float  # of a copy, read and written
    products: dict[str, float]  # operations, by precision


class Bench:
    """What every section gets: a clock, rows, and the progress of its earlier processes."""

    def __init__(self, clock: Clock, rows: Rows, progress: Progress) -> None:
        self.clock, self.rows, self.progress = clock, rows, progress
        self.device, self.tiny = clock.device, clock.tiny
        self.ceilings: Ceilings | None = None
        self._piece = ""

    def piece(self, section: str, case: str, work: Callable[[], object]) -> None:
        """Runs one piece of work, unless the deadline has passed; a failure becomes a row."""
        name = f"{section} {case}"
        if self.progress.has_ended(name) or self.progress.is_broken(name):
            return
        if self.clock.left < 0:
            self.rows.add(Row(section, case, "", note="left out: no time"))
            return
        self._piece = name
        with self.progress.during(name):
            self.guarded(Row(section, case, ""), work)
            self._forget()

    def guarded(self, row: Row, work: Callable[[], object]) -> bool:
        """Runs work and returns whether it succeeded; an exception becomes the note of a row.

        Raises:
            DeviceLost: this process can do nothing more.
        """
        try:
            work()
            return True
        except Exception as error:
            failure = error
        if isinstance(failure, torch.OutOfMemoryError):
            note = f"out of memory: {first_line(failure)}"
        elif isinstance(failure, ArithmeticError):
            note = f"WRONG: {failure}"
        else:
            note = f"FAILED: {first_line(failure)}"
        self.rows.add(replace(row, note=note))
        print(f"-- {row.section} {row.case} {row.contender} {row.backend}", file=sys.stderr)
        traceback.print_exception(failure)
        del failure
        self._check_device(note)
        return False

    def race(
        self,
        section: str,
        case: str,
        contenders: Sequence[Contender],
        yardstick: str = "copy",
        ratios: Sequence[str] = (),
    ) -> Medians:
        """Prepares contenders one by one, times them in turn, and adds a row for each.

        Args:
            section, case: the names of the piece of work that contains this race.
            contenders: a contender is left out if it is absent, wrong or fails.
            yardstick: the contender to which percentages refer, if it is present.
            ratios: contenders of the same backend; notes give the ratios to them.
        """
        ready: list[Ready] = []
        for contender in contenders:
            self._prepare(Row(section, case, contender.name, contender.backend), contender, ready)
        found = self._rounds(section, case, ready)
        medians = {key: statistics.median(ms) for key, ms in found.items() if ms}
        copy_ms = next((ms for (name, _), ms in medians.items() if name == yardstick), None)
        for one in ready:
            contender = one.contender
            key = (contender.name, contender.backend)
            if key not in medians:
                continue
            ms, fifths = medians[key], _fifths(found[key])
            beside = copy_ms if contender.name != yardstick else None
            share = 100 * contender.share * beside / ms if beside else None
            notes = [one.note, *_ratios(medians, *key, ratios)]
            if contender.floor_ms:
                floor = contender.floor_ms
                notes.append(f"{100 * floor / ms:.0f} % of floor {floor:.3g} ms")
            measured = (share, beside, one.peak_mb, one.host_us)
            note = ", ".join(note for note in notes if note)
            self.rows.add(Row(section, case, *key, ms, *fifths, *measured, note))
        return medians

    def quick(self, run: Run) -> float:
        """Median milliseconds of one long call, launched without a graph; adds no row."""
        contender = Contender("", "", lambda: [run], "launched")
        ready = self.clock.prepare(contender, lambda block: None)
        return statistics.median(self.clock.time(ready) for _ in range(5))

    def _prepare(self, row: Row, contender: Contender, ready: list[Ready]) -> None:
        name = self._part(row)
        if contender.absent is not None:
            self.rows.add(replace(row, note=f"absent: {contender.absent}"))
            return
        if self.progress.is_broken(name):
            return  # the failure already has a row
        if self.clock.left < 0:
            self.rows.add(replace(row, note="left out: no time"))
            return

        def capture(block: Run) -> Run | None:
            if self.progress.is_broken(f"{name}|graph"):
                return None
            with self.progress.during(f"{name}|graph"):
                try:
                    return captured(block)
                except Exception as error:
                    note = f"FAILED: cannot be captured: {first_line(error)}"
                self.rows.add(replace(row, note=note))
                self._check_device(note)
            return None

        with self.progress.during(name):
            self.guarded(row, lambda: ready.append(self.clock.prepare(contender, capture)))

    def _rounds(
        self, section: str, case: str, ready: list[Ready]
    ) -> dict[tuple[str, str], list[float]]:
        found: dict[tuple[str, str], list[float]] = {}
        running, rounds, spent = list(ready), 3 if self.tiny else ROUNDS, 0.0
        for done in range(rounds):
            if done >= 3 and (spent > CASE_MS or self.clock.left < 0):
                break
            for one in list(running):
                contender = one.contender
                own = found.setdefault((contender.name, contender.backend), [])
                row = Row(section, case, contender.name, contender.backend)
                with self.progress.during(self._part(row)):
                    if self.guarded(row, partial(self._time, one, own)):
                        spent += own[-1] * one.calls
                    else:
                        running.remove(one)
                        own.clear()
        return found

    def _time(self, ready: Ready, ms: list[float]) -> None:
        ms.append(self.clock.time(ready))

    def _part(self, row: Row) -> str:
        return f"{self._piece}|{row.section} {row.contender} {row.backend}"

    def _check_device(self, why: str) -> None:
        """Checks after an error that the device still works."""
        try:
            self._forget()
            if self.clock.on_gpu:
                torch.ones(1, device=self.device).add_(1).item()
        except Exception as error:
            raise DeviceLost(why) from error

    def _forget(self) -> None:
        gc.collect()
        if self.clock.on_gpu:
            torch.cuda.empty_cache()


def _fifths(ms: list[float]) -> tuple[float, float]:
    fifths = statistics.quantiles(ms, n=5) if len(ms) > 1 else [ms[0], ms[0]]
    return fifths[0], fifths[-1]


def _ratios(medians: Medians, name: str, backend: str, others: Sequence[str]) -> list[str]:
    return [
        f"{medians[name, backend] / medians[other, backend]:.2f} x {other}"
        for other in others
        if other != name and (other, backend) in medians
    ]
