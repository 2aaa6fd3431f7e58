"""Shows the progress of a program with several stages: of each stage and of the whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


@dataclass
class Whole:
    """The progress of a program. It may be passed to the process that runs the next stage.

    Work is counted in seconds that were measured once, of which only the ratios matter. The
    remaining time is estimated from the time that the work so far has taken.
    """

    work: float
    done: float = 0.0
    started: float = field(default_factory=time.time)

    def track(
        self,
        stage: str,
        items: Iterable[Item],
        count: int,
        work: float,
        note: Callable[[], str] = str,
    ) -> Iterator[Item]:
        """Yields the ``count`` items of a stage with this ``work``; ``note`` adds to the line."""
        before = self.done
        try:
            with tqdm(desc=f"{stage:<21}", total=count, ncols=100, mininterval=0.5) as bar:
                for item in items:
                    yield item
                    self.done = before + work * (bar.n + 1) / count
                    said = [note(), str(self)]
                    bar.set_postfix_str(", ".join(filter(None, said)), refresh=False)
                    bar.update()
        finally:  # a stage may end early
            self.done = before + work

    def skip(self, work: float) -> None:
        """Leaves out work that an earlier run has done."""
        self.work -= work

    def follow(self, other: Whole) -> None:
        """Takes over the progress of a copy, which another process has made."""
        self.work, self.done = other.work, other.done

    def __str__(self) -> str:
        part = min(1.0, self.done / self.work)
        left = round((time.time() - self.started) * (1 - part) / max(part, 1e-9))
        return f"all {part:.0%}, {left // 60}:{left % 60:02} left"
