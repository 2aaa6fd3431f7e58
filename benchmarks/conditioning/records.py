"""The rows of the experiment: one for each training."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import torch

from ..commit import commit
from ..rows import RESULTS

FILE = RESULTS / "conditioning" / "accuracies.csv"
FIELDS = (
    "time",
    "commit",
    "torch",
    "task",
    "method",
    "rate",
    "seed",
    "trained",
    "validation",
    "test",
    "seconds",
)


#: Task, method, learning rate, seed.
Key = tuple[str, str, float, int]


def key(row: Mapping[str, Any]) -> Key:
    """What names a training: task, method, learning rate, seed."""
    return row["task"], row["method"], float(row["rate"]), int(row["seed"])


def read() -> list[dict[str, str]]:
    """All rows, oldest first."""
    if not FILE.exists():
        return []
    with open(FILE, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(row: Mapping[str, Any]) -> dict[str, str]:
    """Appends one row, in one write: several processes may do so. Returns it as `read` would."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    if not FILE.exists():
        FILE.parent.mkdir(parents=True, exist_ok=True)
        writer.writeheader()
    numbers = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    made = {"time": when, "commit": commit(), "torch": torch.__version__, **numbers}
    writer.writerow(made)
    with open(FILE, "a", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())
    return {name: str(value) for name, value in made.items()}
