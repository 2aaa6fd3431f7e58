"""What the rows say of each method: means over seeds, 95 % intervals, paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from scipy.stats import t as student

from .methods import METHODS
from .records import Rows

Row = dict[str, str]


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval, by Student's t.

    The width is nan for one number; both are where a number is unknown.
    """

    mean: float
    half: float

    def __format__(self, form: str) -> str:
        if math.isnan(self.mean):
            return "–"
        half = "" if math.isnan(self.half) else f" ± {self.half:{form.lstrip('+')}}"
        return f"{self.mean:{form}}{half}"


def interval(numbers: Sequence[float]) -> Interval:
    """The mean of some numbers and its interval; nan if one of them is unknown."""
    count = len(numbers)
    if count < 2 or any(map(math.isnan, numbers)):
        return Interval(fmean(numbers), math.nan)
    half = float(student.ppf(0.975, count - 1)) * stdev(numbers) / math.sqrt(count)
    return Interval(fmean(numbers), half)


@dataclass(frozen=True)
class Summary:
    """The reported trainings of one method, at one size, by the rate of its search.

    Attributes:
        rows: seed -> row; those that diverged are left out.
        diverged: how many did.
        rate: None where nothing was searched.
        is_edge: the rate is the smallest or the largest of the search.
        step_ms: of a step, beside those of the other methods; nan if it was not timed.
    """

    method: str
    rows: dict[int, Row]
    diverged: int
    rate: float | None
    is_edge: bool
    step_ms: float

    def numbers(self, column: str) -> list[float]:
        """A column, over the seeds."""
        return [float(row[column]) for row in self.rows.values()]

    def middle(self, column: str) -> float:
        """The median of a column."""
        return median(self.numbers(column))

    def detail(self, name: str) -> Interval:
        """One of the task's details."""
        return interval([details(row)[name] for row in self.rows.values()])

    def apart(self, other: Summary) -> Interval | None:
        """How much better it is than another, by the seeds that both have; None without any."""
        seeds = [seed for seed in self.rows if seed in other.rows]
        pairs = [(self.rows[seed]["test"], other.rows[seed]["test"]) for seed in seeds]
        return interval([float(a) - float(b) for a, b in pairs]) if pairs else None


def details(row: Row) -> dict[str, float]:
    """The measures beside the score, by their names."""
    parts = (part.split("=") for part in row["details"].split(";") if part)
    return {name: float(value) for name, value in parts}


def experiments(rows: Rows) -> list[tuple[str, str]]:
    """Data and task of all rows, as they came first."""
    return list(dict.fromkeys((key.data, key.task) for key in rows))


def sizes(rows: Rows, data: str, task: str) -> list[int]:
    """The sizes for which there are reported trainings."""
    own = of_task(rows, data, task).items()
    return sorted({key.size for key, row in own if key.part == "reported" and row["test"]})


def main_size(rows: Rows, data: str, task: str) -> int:
    """The size of the search, or the largest that is reported where nothing was searched."""
    every = of_task(rows, data, task)
    return max([key.size for key in every if key.part == "search"] or [key.size for key in every])


def of_task(rows: Rows, data: str, task: str) -> Rows:
    """The rows of one task."""
    return {key: row for key, row in rows.items() if (key.data, key.task) == (data, task)}


def summaries(rows: Rows, data: str, task: str, size: int) -> dict[str, Summary]:
    """Method -> what was found, in the order of the methods."""
    found = {}
    own = of_task(rows, data, task)
    for method in METHODS:
        mine = {key: row for key, row in own.items() if key.method == method}
        rates = searched({key: row for key, row in mine.items() if key.part == "search"})
        reported = [key for key in mine if key.part == "reported" and key.size == size]
        rate = best_rate(rates) if rates else 0.0
        at = {key.seed: mine[key] for key in reported if key.rate == rate}
        done = {seed: row for seed, row in sorted(at.items()) if row["test"]}
        if done:
            is_edge = len(rates) > 1 and rate in (min(rates), max(rates))
            steps = [float(r["step_ms"]) for key, r in mine.items() if key.part == "timed"]
            shown = rate if rates else None
            step = steps[-1] if steps else math.nan
            found[method] = Summary(method, done, len(at) - len(done), shown, is_edge, step)
    return found


def searched(rows: Rows) -> dict[float, float]:
    """Rate -> the mean validation of a search; rates at which a training diverged are left out."""
    by_rate: dict[float, list[Row]] = {}
    for key, row in rows.items():
        by_rate.setdefault(key.rate, []).append(row)
    return {
        rate: fmean(float(row["validation"]) for row in found)
        for rate, found in sorted(by_rate.items())
        if all(row["validation"] for row in found)
    }


def best_rate(found: dict[float, float]) -> float | None:
    """The rate with the best validation, the smaller of equals; None if there is none."""
    return max(found, key=found.__getitem__) if found else None


def untrained(rows: Rows, data: str, task: str) -> float:
    """The score before adaptation; nan if there is none."""
    own = of_task(rows, data, task).items()
    scores = [float(row["test"]) for key, row in own if key.part == "before" and row["test"]]
    return scores[-1] if scores else math.nan


def refusals(rows: Rows, data: str, task: str) -> dict[str, str]:
    """Method -> why it does not take the model of a task."""
    return {
        key.method: row["state"].removeprefix("refused: ")
        for key, row in of_task(rows, data, task).items()
        if row["state"].startswith("refused: ")
    }
