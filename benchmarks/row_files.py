"""Files of rows, to which rows are appended and in which none is rewritten."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

Row = dict[str, str]


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def append(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Adds rows to a file, with the names of its columns if it is new.

    Raises:
        ValueError: a row has something that is no column.
    """
    is_new = not path.exists()
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """All rows of a file, oldest first; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
