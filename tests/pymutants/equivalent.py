"""Mutants that change nothing which anybody could rely on, and why: `equivalent.csv`.

A row names the module, the lines before and after the change, and the reason. So it stays true
when lines move, and is found to be stale when they are rewritten.
"""

import csv
from functools import cache
from pathlib import Path

COLUMNS = ("module", "before", "after", "reason")


@cache
def rows():
    """The table, as dictionaries."""
    path = Path(__file__).with_suffix(".csv")
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def reason_for(mutant):
    """Why a mutant changes nothing, or None."""
    before, after = mutant.difference()
    for row in rows():
        if (row["module"], row["before"], row["after"]) == (mutant.module, before, after):
            return row["reason"]
    return None
