"""Every writer of the project, killed at every call that changes files, or failing there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parent / "faults"


def test_every_writer_leaves_the_old_or_the_new_and_nothing_else(monkeypatch):
    monkeypatch.syspath_prepend(str(FAULTS))
    import shim

    reason = shim.missing()
    if reason is not None:
        pytest.skip(reason)
    command = [sys.executable, str(FAULTS / "faults.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert result["tried"] == result["right"] > 200
    assert result["by fault"]["kill before"] > 150
    assert (result["half-written"], result["left behind"], result["silent"]) == (0, 0, 0)
