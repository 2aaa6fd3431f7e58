"""Compiles and steers faults.c, which counts what a process does to files, and makes it fail."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_suffix(".c").with_name("faults.c")
KEPT = Path(__file__).parents[2] / "build" / "faults"
MOST, PATH = 1024, 512

#: What happens at a call, in the order of faults.c.
NOTHING, KILL_BEFORE, KILL_HALF, KILL_AFTER, FAIL, SHORT = range(6)


class Call(NamedTuple):
    """A call that changes files: the function, its path, another, bytes, and the open file."""

    name: str
    path: str
    other: str
    bytes: int
    inode: int


class _Call(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 24),
        ("path", ctypes.c_char * PATH),
        ("other", ctypes.c_char * PATH),
        ("bytes", ctypes.c_long),
        ("inode", ctypes.c_ulong),
    )


class _State(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("armed", "how", "at", "onwards", "error", "hit")),
        ("count", ctypes.c_int),
        ("folder", ctypes.c_char * PATH),
        ("calls", _Call * MOST),
    )


def missing() -> str | None:
    """Why the shim cannot be used here; None if it can."""
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    if shutil.which("cc") is None:
        return "needs a C compiler (cc)"
    library = compiled()
    code = "import ctypes; ctypes.CDLL(None).faults_state"
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    return None if done.returncode == 0 else "needs LD_PRELOAD"


def compiled() -> Path:
    """The library, compiled once for each state of its source."""
    target = KEPT / f"faults-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not target.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        command = ["cc", "-O2", "-Wall", "-shared", "-fPIC", "-o", str(part), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        part.replace(target)
    return target


def preloaded() -> Shim | None:
    """The shim of this process; None if it was started without."""
    try:
        function = ctypes.CDLL(None).faults_state
    except AttributeError:
        return None
    function.restype = ctypes.POINTER(_State)
    return Shim(function().contents)


class Shim:
    """The page that steers the shim in this process and in those that it forks."""

    def __init__(self, state: _State) -> None:
        self._state = state

    def prepare(self, folder: Path, how: int, at: int, error: int = 0, onwards: bool = False):
        """Says what is to happen below a folder, once `arm` is called."""
        state = self._state
        state.armed, state.count, state.hit = 0, 0, 0
        state.how, state.at, state.error, state.onwards = how, at, error, onwards
        state.folder = os.fsencode(folder)

    def arm(self, armed: bool = True) -> None:
        """Begins, or ends."""
        self._state.armed = armed

    @property
    def hit(self) -> int:
        """How many calls failed, or were cut short."""
        return self._state.hit

    def calls(self) -> list[Call]:
        """What was called."""
        count = self._state.count
        assert count <= MOST, count
        return [
            Call(*map(os.fsdecode, (c.name, c.path, c.other)), c.bytes, c.inode)
            for c in self._state.calls[:count]
        ]
