"""Records in a file what a section has begun and ended, so that it can continue after a crash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .appending import append_lines


class Progress:
    """Pieces of work by name, including those of earlier processes of the same section.

    A piece that was begun but not ended broke its process. Parts of a piece are pieces named
    ``whole|part``. If only a part broke, the whole is tried again without it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._order: list[str] = []  # in the order in which they began
        self._open: Counter[str] = Counter()
        self._ended: set[str] = set()
        if path is not None and path.exists():
            text = path.read_text(encoding="utf-8")
            for line in text[: text.rfind("\n") + 1].splitlines():  # of a cut line nothing is known
                what, _, name = line.partition(" ")
                if what == "begin":
                    self._order.append(name)
                    self._open[name] += 1
                else:
                    self._open[name] -= 1
                    self._ended.add(name)

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Context of a piece: records its beginning and, unless the process dies, its end."""
        self._write(f"begin {name}")
        try:
            yield
        except Exception:
            self._write(f"end {name}")
            raise
        self._write(f"end {name}")

    def has_ended(self, name: str) -> bool:
        """Whether an earlier process completed a piece."""
        return name in self._ended

    def is_broken(self, name: str) -> bool:
        """Whether a piece, and not only a part of it, broke an earlier process."""
        parts = sum(n for part, n in self._open.items() if part.startswith(f"{name}|"))
        return self._open[name] > parts

    def latest(self) -> str:
        """The innermost open piece; "" if there is none."""
        return next((name for name in reversed(self._order) if self._open[name] > 0), "")

    def count(self) -> int:
        """How many pieces were begun."""
        return len(self._order)

    def _write(self, line: str) -> None:
        if self._path is not None:
            append_lines(self._path, line + "\n")
