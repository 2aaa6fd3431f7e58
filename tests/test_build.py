"""The build: without a C++ compiler it says so in one sentence."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_no_compiler_is_one_clear_sentence(tmp_path):
    environment = {**os.environ, "CXX": "no-such-compiler"}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last == (
        "tcur_kernels: no C++ compiler: 'no-such-compiler' is not on the PATH; "
        "install g++ or clang (C++17), or name one by CXX."
    )
    assert not list(tmp_path.iterdir())
