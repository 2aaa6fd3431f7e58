"""The rows of the experiment: one for each training."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import torch

from .. import appending
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
    return appending.read(FILE)


def append(row: Mapping[str, Any]) -> dict[str, str]:
    """Appends one row; several processes may do so. Returns it as `read` would."""
    numbers = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    made = {"time": when, "commit": commit(), "torch": torch.__version__, **numbers}
    appending.append(FILE, FIELDS, [made])
    return {name: str(value) for name, value in made.items()}
