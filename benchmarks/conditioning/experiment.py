"""What is trained: the same search for every method, and cores over ranks and learning rates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import mean

from ..comparison.tasks import TASKS
from ..comparison.tasks.base import Sources, Task
from ..comparison.training import train
from . import records
from .methods import method

#: Seeds that search the learning rate, and those that are added at the chosen one.
SEARCH, MORE = (0, 1), (2, 3, 4)

#: Examples are those of the searches of `comparison`, and so are the tasks.
NAMES = ("minilm", "digits", "letters")

#: Learning rates of a search. Models that are pretrained here are small and want larger ones, by
#: every method; training all real weights wants smaller ones.
RATES = {
    "minilm": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "minilm full": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    "digits": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "letters": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}

RULES = ("norm2", "leverage", "deim", "uniform", "inverse", "gradient")
MAIN = (
    "head",
    "cores:slices:norm:8",
    "cores:orthonormal:norm:8",
    "cores:slices:norm:32",
    "cores:orthonormal:norm:32",
    "lora:1",
    "lora:8",
    "full",
    "cores:slices:inverse:8:layer",
)
METHODS = (*MAIN, *(f"cores:{basis}:{r}:8" for r in RULES for basis in ("orthonormal", "slices")))

#: What `sweep` trains.
RANKS = {"minilm": (2, 8, 16, 32, 64), "digits": (2, 4, 8, 16, 32), "letters": (2, 4, 8, 16, 32)}


def rates_of(task: str, method: str) -> tuple[float, ...]:
    """The learning rates that a method tries."""
    if method == "head":
        return (0.0,)
    return RATES.get(f"{task} {method}", RATES[task])


class Experiment:
    """Trainings of one task; the rows that there are already are known."""

    def __init__(self, name: str, sources: Sources) -> None:
        self.name, self._sources = name, sources
        self._tasks: dict[int, Task] = {}
        self.rows = {records.key(row): row for row in records.read()}

    def row(self, name: str, rate: float, seed: int) -> dict[str, str]:
        """The row of a training, which is done now unless it is recorded."""
        key = (self.name, name, rate, seed)
        if key not in self.rows:
            if seed not in self._tasks:
                kind = TASKS[self.name]
                self._tasks = {seed: kind(self._sources, kind.searched, seed)}
            task, started = self._tasks[seed], time.perf_counter()
            trained = train(task, method(name), rate, seed)
            made = {
                "task": self.name,
                "method": name,
                "rate": rate,
                "seed": seed,
                "trained": trained.numbers,
                "validation": task.score(trained.model, "validation"),
                "test": task.score(trained.model, "test"),
                "seconds": time.perf_counter() - started,
            }
            self.rows[key] = records.append(made)
            print(*self.rows[key].values(), flush=True)
        return self.rows[key]


def compare(run: Experiment, methods: Sequence[str] | None, part: tuple[int, int]) -> None:
    """Searches the rate of every method, and trains it with more seeds."""
    for name in (methods or METHODS)[part[0] :: part[1]]:
        for seed in SEARCH:
            for rate in rates_of(run.name, name):
                run.row(name, rate, seed)
        for seed in MORE:
            run.row(name, chosen(run.rows, run.name, name), seed)


def sweep(run: Experiment, methods: Sequence[str] | None, part: tuple[int, int]) -> None:
    """Trains cores of all ranks at all rates, in both bases, with seed 0."""
    names = [f"cores:{b}:norm:{r}" for r in RANKS[run.name] for b in ("orthonormal", "slices")]
    for name in (methods or names)[part[0] :: part[1]]:
        for rate in rates_of(run.name, name):
            run.row(name, rate, 0)


def chosen(rows: dict[records.Key, dict[str, str]], task: str, method: str) -> float:
    """The rate with the best mean accuracy on validation data over the seeds of the search."""

    def score(rate: float) -> float:
        return mean(float(rows[task, method, rate, seed]["validation"]) for seed in SEARCH)

    return max(rates_of(task, method), key=score)
