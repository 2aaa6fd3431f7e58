"""Processes that are forked or spawned from one with an adapted model; see `children.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILDREN = Path(__file__).parent / "children.py"
ROOT = CHILDREN.parent.parent.parent
#: The others start a Python and a torch for every process; the nightly program has them all.
CASES = ("fork", "fork_in_a_change", "pickles", "loader_fork", "store", "shared", "spawn")


@pytest.mark.parametrize("case", CASES)
def test_children(case):
    result = subprocess.run(
        [sys.executable, "-W", "error", str(CHILDREN), case],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.stdout.strip() == "right", result.stdout + result.stderr
