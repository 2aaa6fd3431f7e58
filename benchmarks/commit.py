"""The commit of the code, which every result row contains."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commit() -> str:
    """The commit, with "+dirty" if files differ from it; "unknown" without git."""
    code = ("csrc", "tcur_kernels", "benchmarks/*.py", "setup.py")
    head = _git("rev-parse", "--short", "HEAD")
    if not head:
        return "unknown"
    dirty = _git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return head + ("+dirty" if dirty else "")


def _git(*args: str) -> str:
    try:
        result = subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:  # there is no git here
        return ""
    return result.stdout.strip()
