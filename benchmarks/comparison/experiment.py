"""Which trainings there are: a search for a learning rate, the same for all, and then seeds."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from ..timing import interleave
from . import records
from .methods import METHODS, method
from .methods.base import RefusedError
from .process import EndedError, Result, memory_of_this_process, reset_peak, run
from .records import Key, Rows
from .summary import best_rate, of_task, refusals, searched
from .tasks import TASKS
from .tasks.base import DivergedError, Sources, Task
from .training import step_of, train

#: A search starts with these powers of `FACTOR`, of the middle rate of the method and the task. As
#: long as the best rate is at an end, the search goes on beyond it, to so many rates at most.
START, FACTOR, MOST = (-1, 0, 1), 3.0, 6
#: What is done for each task, one after the other; and rounds in which steps are timed.
PARTS = ("before", "search", "reported", "timed")
ROUNDS = 15


@dataclass(frozen=True)
class Plan:
    """What to train.

    Attributes:
        sources: data and models.
        tasks, methods: names.
        at_sizes: the methods that are trained at other sizes than that of the search.
        seeds: of the reported trainings.
        start, most: of the search, as `START` and `MOST`.
        parts: of `PARTS`.
        sizes: of the training sets; None: those of each task. The search is at the task's size if
            it is among them, else at the largest.
    """

    sources: Sources
    tasks: Sequence[str]
    methods: Sequence[str]
    at_sizes: Sequence[str]
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    start: Sequence[int] = START
    most: int = MOST
    parts: Sequence[str] = PARTS
    sizes: Sequence[int] | None = None

    def searched(self, task: str) -> int:
        """The size of the training sets of a search."""
        usual = TASKS[task].searched
        return usual if self.sizes is None or usual in self.sizes else max(self.sizes)

    def data(self, task: str) -> str:
        """The data of a task in a row: "default", or a digest of the user's files."""
        names = TASKS[task].own
        given = {n: value for n in names if (value := getattr(self.sources, n)) is not None}
        own = " ".join(f"{name}={_told(value)}" for name, value in given.items())
        return f"{'quick ' if self.sources.quick else ''}{own or 'default'}"

    def rate(self, task: str, name: str, power: int) -> float:
        """A rate that a method may try."""
        return float(f"{method(name).rate * TASKS[task].rate_scale * FACTOR**power:.3g}")

    def before(self, task: str) -> list[Key]:
        """The score of the model as it was."""
        return [Key(self.data(task), task, self.searched(task), "none", 0.0, 0, "before")]

    def searches(self, task: str, rows: Rows) -> list[Key]:
        """The trainings by which the searches go on; none once all are done."""
        return [
            key
            for name in self.methods
            if name != "head" and not self.refused(task, name, rows)
            for key in self._next(task, name, rows)
        ]

    def _next(self, task: str, name: str, rows: Rows) -> list[Key]:
        """The trainings by which the search of a method goes on."""
        far = self.most + max(map(abs, self.start))
        every = {power: self._at(task, name, power) for power in range(-far, far + 1)}
        begun = [p for p, keys in every.items() if p in self.start or any(k in rows for k in keys)]
        missing = [key for power in begun for key in every[power] if key not in rows]
        if missing or len(begun) >= self.most:
            return missing
        found = searched({key: rows[key] for power in begun for key in every[power]})
        best = best_rate(found)
        if best is None or best == self.rate(task, name, begun[0]):
            return every[begun[0] - 1]
        return every[begun[-1] + 1] if best == self.rate(task, name, begun[-1]) else []

    def _at(self, task: str, name: str, power: int) -> list[Key]:
        """The trainings of a search at one rate."""
        size, rate = self.searched(task), self.rate(task, name, power)
        return [
            Key(self.data(task), task, size, name, rate, seed, "search")
            for seed in TASKS[task].search
        ]

    def reported(self, task: str, rows: Rows) -> Iterator[Key]:
        """The trainings that are reported, of the methods whose search is done.

        Those of the size of the search come first.
        """
        sizes, first = self.sizes or TASKS[task].sizes, self.searched(task)
        for size in sorted(sizes, key=lambda size: size != first):
            for seed in self.seeds:
                for name in self.methods if size == first else self.at_sizes:
                    rate = self.chosen(task, name, rows)
                    if rate is not None:
                        yield Key(self.data(task), task, size, name, rate, seed, "reported")

    def check_searched(self, rows: Rows) -> None:
        """Checks that trainings which are reported without a search have had one.

        Raises:
            ValueError: some methods have no rate, because their search is not done.
        """
        if "reported" not in self.parts or "search" in self.parts:
            return
        for task in self.tasks:
            names = dict.fromkeys(key.method for key in self.searches(task, rows))
            if names:
                raise ValueError(
                    f"--parts: expected reported trainings of {task} after a search of training "
                    f"size {self.searched(task)}, got no whole search of {', '.join(names)}"
                )

    def timed(self, task: str, rows: Rows) -> list[Key]:
        """The methods whose steps are timed beside each other: those that take the model."""
        taken = [name for name in self.methods if not self.refused(task, name, rows)]
        size = self.searched(task)
        return [
            Key(self.data(task), task, size, name, self.rate(task, name, 0), 0, "timed")
            for name in taken
        ]

    def chosen(self, task: str, name: str, rows: Rows) -> float | None:
        """The rate with the best mean validation; None if the search is not done, or all diverged.

        A training that diverged counts as the worst.
        """
        if name == "head":
            return 0.0
        if self._next(task, name, rows):
            return None
        own = of_task(rows, self.data(task), task)
        mine = {k: row for k, row in own.items() if (k.method, k.part) == (name, "search")}
        return best_rate(searched(mine))

    def refused(self, task: str, name: str, rows: Rows) -> bool:
        """Whether it is known that a method does not take the model of a task."""
        return name in refusals(rows, self.data(task), task)


class Run:
    """Trains what a plan has and the rows lack; appends a row for each training."""

    def __init__(self, plan: Plan, rows: Rows, file: Path, jobs: int) -> None:
        self.plan, self.rows, self.file, self.jobs = plan, rows, file, jobs
        self.failed: list[str] = []
        self._made: tuple[tuple[str, int, int], Task] | None = None
        self._kept: dict[str, float] = {}

    def all(self) -> None:
        """Searches and trains everything, task by task.

        Raises:
            ValueError: trainings are reported without a search that was done.
        """
        self.plan.check_searched(self.rows)
        for task in self.plan.tasks:
            if "before" in self.plan.parts:
                self._wave(self.plan.before(task))
            if "search" in self.plan.parts:
                while keys := self.plan.searches(task, self.rows):
                    if not self._wave(keys):
                        break
            if "reported" in self.plan.parts:
                self._wave(self.plan.reported(task, self.rows))
            if "timed" in self.plan.parts:
                self._time(task)

    def _wave(self, keys: Iterable[Key]) -> int:
        """Does the trainings that are not recorded; returns how many of them are now."""
        missing = [key for key in keys if key not in self.rows]
        started = time.perf_counter()

        def works() -> Iterator[tuple[Key, Callable[[], Result]]]:
            for key in missing:
                if not self.plan.refused(key.task, key.method, self.rows):
                    task = self._task(key)
                    if key.part == "before":
                        yield key, partial(_untrained, task)
                    else:
                        yield key, partial(_trained, task, key, self._kept_before(key, task))

        with closing(run(works(), self.jobs)) as results:
            for done, (key, result) in enumerate(results, 1):
                left = (time.perf_counter() - started) / done * (len(missing) - done) / 60
                self._record(key, result, f"{done}/{len(missing)}, {left:.0f} min left")
        return sum(key in self.rows for key in missing)

    def _time(self, task: str) -> None:
        """Times steps of all methods beside each other, if any of them is not recorded."""
        keys = self.plan.timed(task, self.rows)
        if all(key in self.rows for key in keys):
            return
        rounds = 2 if self.plan.sources.quick else ROUNDS
        work = partial(_timed, self._task(keys[0]), keys, rounds)
        with closing(run([(task, work)], 1)) as results:
            ((_, result),) = results
        for key in keys:
            own = result if isinstance(result, EndedError) else result[key.method]
            self._record(key, own, "steps")

    def _record(self, key: Key, result: Result | EndedError, progress: str) -> None:
        """Appends a row, or keeps what went wrong for the end."""
        told = " ".join(str(part) for part in key[1:])
        if isinstance(result, EndedError):
            self.failed.append(f"{told}: {result}")
            print(self.failed[-1], flush=True)
            return
        row = self.rows[key] = records.append(self.file, {**key._asdict(), **result})
        found = row["test"] or row["validation"] or row["step_ms"] or row["state"]
        print(f"{progress}: {told}: {found}", flush=True)

    def _kept_before(self, key: Key, task: Task) -> float:
        """What is kept before adaptation: all of it, the same for all seeds and sizes."""
        if key.part == "reported" and key.task not in self._kept:
            self._kept[key.task] = task.kept(task.model())
        return self._kept.get(key.task, math.nan)

    def _task(self, key: Key) -> Task:
        """The task of a training; the last one is kept."""
        name = (key.task, key.size, key.seed)
        if self._made is None or self._made[0] != name:
            self._made = name, TASKS[key.task](self.plan.sources, key.size, key.seed)
        return self._made[1]


def _trained(task: Task, key: Key, kept_before: float) -> Result:
    """Trains, in a process of its own; says what it took, and the scores."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    reset_peak()
    before = memory_of_this_process("VmHWM")
    try:
        trained = train(task, method(key.method), key.rate, key.seed)
        peak = memory_of_this_process("VmHWM") - before
        scores = _scores(task, trained.model, key.part, kept_before)
    except DivergedError as error:
        return {"state": f"diverged: {error}"}
    except RefusedError as error:
        return {"state": f"refused: {error}"}
    return {
        "state": "done",
        "trained": trained.numbers,
        "peak_mb": peak,
        "file_kb": trained.file_kb,
        "curve": " ".join(f"{loss:.4g}" for loss in trained.curve),
        **scores,
        "seconds": time.perf_counter() - started,
    }


def _untrained(task: Task) -> Result:
    """The scores of the pretrained model, in a process of its own."""
    if task.new_head:
        return {"state": "none: the head is new"}
    torch.set_num_threads(1)
    started = time.perf_counter()
    try:
        scores = _tested(task, task.model())
    except DivergedError as error:
        return {"state": f"diverged: {error}"}
    return {"state": "done", **scores, "seconds": time.perf_counter() - started}


def _scores(task: Task, model: torch.nn.Module, part: str, kept_before: float) -> Result:
    """The validation alone in a search, else all that is reported."""
    validation = {"validation": task.score(model, "validation")}
    if part == "search":
        return validation
    return {
        **validation,
        **_tested(task, model),
        "kept_before": kept_before,
        "kept": task.kept(model),
    }


def _tested(task: Task, model: torch.nn.Module) -> Result:
    """The score on the test examples, and the measures beside it."""
    test, details = task.tested(model)
    text = ";".join(f"{name}={value:.6g}" for name, value in details.items())
    return {"test": test, "details": text}


def _timed(task: Task, keys: Sequence[Key], rounds: int) -> Result:
    """The milliseconds of a step of each method, with one thread."""
    torch.set_num_threads(1)
    steps = {key.method: step_of(task, method(key.method), key.rate, key.seed) for key in keys}
    timings = interleave(steps, keys[0].method, rounds)
    return {
        name: {"state": "done", "step_ms": timing.median_ms} for name, timing in timings.items()
    }


def _told(value: Path | str) -> str:
    """An option that was given, by the content of a file."""
    if isinstance(value, str):
        return value
    return f"{value.name}:{_digest(value, value.stat().st_mtime_ns)}"


@cache
def _digest(path: Path, changed: int) -> str:
    """A short digest of a file, or of the names and sizes in a folder, as it was changed last."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
    else:
        with open(path, "rb") as opened:
            while block := opened.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:8]


def names_of_methods(names: Sequence[str] | None) -> list[str]:
    """The methods of a command line, each once.

    Raises:
        ValueError: a method is not known.
    """
    for name in names or ():
        method(name)
    return list(dict.fromkeys(names or METHODS))
