"""What was measured by hand, side by side, when a change was made: tables of those rows."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from . import documents

PATH = Path(__file__).parent / "results" / "tried.csv"
#: section of the rows -> what its column "what" has.
SECTIONS = {
    "core": "one core",
    "phases": "phase, one thread, r = 8",
    "tried": "what was tried",
    "host": "what was changed, and what it cost before and after",
    "rule": "what was tried",
    "gpu": "change",
}
#: Columns of the rows in the order of the tables.
COLUMNS = ("what", "case", "expected", "before", "after", "unit", "commit", "note")

Row = dict[str, str]


def read() -> list[Row]:
    """All rows, as they were written down."""
    with open(PATH, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """What stands between the marks: a table of each section, and the floor by operations."""
    found = {f"{section}_by_hand": _table(rows, section) for section in SECTIONS}
    return {**found, "floor_says": documents.paragraph(_floor(rows))}


def _table(rows: Sequence[Row], section: str) -> str:
    """The rows of one section; columns in which none of them has anything are left out."""
    chosen = [row for row in rows if row["section"] == section]
    columns = [name for name in COLUMNS if any(row[name] for row in chosen)]
    named = {"what": SECTIONS[section]} | ({} if "before" in columns else {"after": "measured"})
    heads = [named.get(name, name) for name in columns]
    return documents.table(heads, [[row[name] or "–" for name in columns] for row in chosen])


def _floor(rows: Sequence[Row]) -> str:
    """What rank-r products take one core at least, by the rates of FMAs that were measured."""
    said = []
    for row in rows:
        if row["unit"] == "per ns":
            lanes, rate = int(row["what"].split()[3]), float(row["after"])
            each = " and ".join(f"{2 * r / lanes / rate:.2f} ns at r = {r}" for r in (8, 32))
            said.append(f"{each} with vectors of {lanes} numbers")
    return (
        "By the rates of FMAs below they take one core at least this for a weight: "
        f"{', '.join(said)}."
    )
