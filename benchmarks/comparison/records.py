"""The rows of the comparison: one for each training, appended as it ends."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import appending
from ..commit import commit
from ..rows import RESULTS, device_name

FILE = RESULTS / "comparison" / "trainings.csv"
FIELDS = (
    "time",
    "commit",
    "torch",
    "peft",
    "device",
    "data",
    "task",
    "size",
    "method",
    "rate",
    "seed",
    "part",
    "state",
    "trained",
    "validation",
    "test",
    "kept_before",
    "kept",
    "details",
    "step_ms",
    "peak_mb",
    "file_kb",
    "seconds",
    "curve",
)


class Key(NamedTuple):
    """What names a row.

    Attributes:
        data: "default", or what tells a user's files.
        task, size, method, rate, seed: of the training.
        part: "before" adaptation, with the method "none"; "search" for a learning rate; "reported";
            or "timed".
    """

    data: str
    task: str
    size: int
    method: str
    rate: float
    seed: int
    part: str


Rows = dict[Key, dict[str, str]]


class RowsError(Exception):
    """A file of rows that cannot be used; the message says why."""


def key(row: Mapping[str, Any]) -> Key:
    """The key of a row."""
    numbers = {"size": int(row["size"]), "rate": float(row["rate"]), "seed": int(row["seed"])}
    return Key(**{**{name: row[name] for name in Key._fields}, **numbers})


def read(file: Path = FILE) -> Rows:
    """All rows by their keys; of rows with one key, the latest.

    Raises:
        RowsError: the file has other columns, or a row that is not whole.
    """
    if not file.exists():
        return {}
    text = file.read_text(encoding="utf-8")
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != FIELDS:
        raise RowsError(f"{file}: expected the columns {', '.join(FIELDS)}")
    rows = list(reader)
    wrong = [n for n, row in enumerate(rows, 2) if None in row or None in row.values()]
    if wrong or not text.endswith("\n"):
        number = wrong[0] if wrong else len(rows) + 1
        raise RowsError(f"{file}: expected {len(FIELDS)} values in line {number}, and a line's end")
    return {key(row): row for row in rows}


@contextlib.contextmanager
def writing(file: Path) -> Iterator[Rows]:
    """The rows of a file to which this process alone may append; others are refused meanwhile.

    A last line that was cut short, as by a process that was killed, is removed, and this is said.

    Raises:
        RowsError: another process appends to the file, or it is not one of rows.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RowsError(f"{file}: expected no other run to write to it") from error
        try:
            appending.append(file, FIELDS, [], is_locked=True)
        except ValueError as error:
            raise RowsError(str(error)) from error
        yield read(file)


def append(file: Path, row: Mapping[str, Any]) -> dict[str, str]:
    """Appends one row, within `writing`. Returns it as `read` would."""
    numbers = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
    made = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "torch": torch.__version__,
        "peft": version("peft"),
        "device": device_name(),
        **numbers,
    }
    appending.append(file, FIELDS, [made], is_locked=True)
    return {name: str(made.get(name, "")) for name in FIELDS}
