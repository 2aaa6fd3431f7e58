"""Rows in CSV files: appended whole or not at all, by any number of processes."""

from __future__ import annotations

import csv
import fcntl
import io
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def append(
    path: Path,
    columns: Sequence[str],
    rows: Iterable[Mapping[str, Any]],
    end: str = "\n",
    is_locked: bool = False,
) -> None:
    """Appends rows to a file, with the names of its columns if it is new.

    All rows are there afterwards, on the disk, or none. A process that is killed meanwhile can
    leave a line without an end. The next one to append removes that line, and says so.

    Args:
        path: the file; made if it does not exist, with the folder it is in.
        columns: of the file.
        rows: column -> value; what is missing stays empty.
        end: of a line.
        is_locked: whether the caller holds the file's lock (``flock``). Else this waits for it.

    Raises:
        ValueError: the file has other columns, a row has others, or a value goes over lines.
        OSError: the rows cannot be written; ``filename`` is the file, which is as it was.
    """
    head = _text(columns, [dict(zip(columns, columns, strict=True))], end)
    append_lines(path, _text(columns, rows, end), head, is_locked)


def append_lines(path: Path, lines: str, head: str = "", is_locked: bool = False) -> None:
    """Appends lines as `append` does, after ``head`` if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    file = os.open(path, flags, 0o666)
    try:
        if not is_locked:
            fcntl.flock(file, fcntl.LOCK_EX)
        wanted = head.encode()
        if not wanted.startswith(os.pread(file, len(wanted), 0)):
            raise ValueError(f"{path}: expected the columns {head.strip()} in its first line")
        size = _mended(path, file)
        data = memoryview((lines if size else head + lines).encode())
        try:
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(file, size)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # all of it is on the disk
            os.close(file)


def read(path: Path) -> list[dict[str, str]]:
    """All rows of a file, oldest first.

    Raises:
        ValueError: its last line has no end, or a row is not as long as the first line.
        OSError: it cannot be read.
    """
    with open(path, newline="", encoding="utf-8") as file:
        text = file.read()
    if text and not text.endswith("\n"):
        raise ValueError(
            f"{path}: expected whole lines, got a last one that was cut short: "
            f"{text.rpartition(chr(10))[2]!r}. The next run that appends to it removes it."
        )
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    wrong = [number for number, row in enumerate(rows, 2) if None in row or None in row.values()]
    if wrong:
        raise ValueError(f"{path}: expected as many values as columns in line {wrong[0]}")
    return rows


def _text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], end: str) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator=end)
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str) and ("\n" in value or "\r" in value):
                raise ValueError(f"{name}: expected a value of one line, got {value!r}")
        writer.writerow(row)
    return text.getvalue()


def _mended(path: Path, file: int) -> int:
    """Removes a last line without an end; returns the size of the file."""
    size = os.fstat(file).st_size
    if size == 0 or os.pread(file, 1, size - 1) == b"\n":
        return size
    content = b""
    while len(content) < size and (part := os.pread(file, size - len(content), len(content))):
        content += part
    whole = content.rfind(b"\n") + 1
    os.ftruncate(file, whole)
    cut = content[whole:].decode(errors="replace")
    print(f"{path}: removed a last line that a killed run had cut short: {cut!r}", file=sys.stderr)
    return whole
