"""The commit of the code and the time, which every result row contains."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: What a benchmark measures, and what measures it.
CODE = ("csrc", "tcur_kernels", "benchmarks/*.py", "setup.py")


def commit(code: Sequence[str] = CODE) -> str:
    """The commit, with "+dirty" if files of the code differ from it; "unknown" without git."""
    head = git("rev-parse", "--short", "HEAD")
    if not head:
        return "unknown"
    dirty = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return head + ("+dirty" if dirty else "")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def git(*args: str) -> str:
    """What git says, stripped; nothing where git refuses or is not there."""
    try:
        result = subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:  # there is no git here
        return ""
    return result.stdout.strip()
