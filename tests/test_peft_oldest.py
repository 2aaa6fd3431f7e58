"""The tests of the plug-in once more, with the oldest peft it supports, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
#: They are slow, and take no other way into peft. tests/versions.py runs them, too.
LEFT_OUT = "not unetr and not compiles and not out_of_range and not offloaded"
OLDEST = Path(sys.prefix) / "oldest_peft"


def test_with_the_oldest_supported_peft():
    if not OLDEST.is_dir():
        pytest.skip("the oldest supported peft is not there; `make test` installs it")
    pinned = (TESTS / "oldest_peft.txt").read_text().split("==")[-1].strip()
    path = os.pathsep.join(filter(None, [str(OLDEST), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}

    def run(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False
        )

    found = run("-c", "import peft, tcur_kernels.peft; print(peft.__version__)")
    assert found.stdout.strip() == pinned, found.stderr
    files = [
        str(TESTS / f"test_peft{part}.py")
        for part in ("", "_models", "_errors", "_config", "_layer", "_rows", "_patterns")
    ]
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT, *files)
    assert result.returncode == 0, result.stdout[-5000:]
    assert " passed" in result.stdout
