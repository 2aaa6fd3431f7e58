"""Kernels compiled once more with the oldest Triton that is supported, in a process of its own.

The compilers differ: 3.6 takes no inner size below 16 and makes products in TF32 of what looks like
a sum of products. It is what came with torch 2.11.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernels

TESTS = Path(__file__).parent
MATRIX = pytest.mark.matrix
OLDEST = Path(sys.prefix) / "oldest_triton"


@pytest.mark.parametrize(
    ("marker", "kernels", "count"),
    [
        ("not matrix", "launch_fits and sm_ and (float32-12] or float32-17])", 2),
        pytest.param("matrix", "launch_fits and bf16 and sm_90", 1, marks=MATRIX),
        pytest.param("matrix", "launch_fits and ieee and float32 and sm_", 3, marks=MATRIX),
        pytest.param("matrix", "at_other_ranks and sm_ and not 1-sm_", 6, marks=MATRIX),
    ],
    ids=["rank 8", "in bf16", "rank 8 at all lengths", "ranks 16 and 32"],
)
def test_with_the_oldest_supported_triton(marker, kernels, count):
    if not OLDEST.is_dir():
        pytest.skip("the oldest supported Triton is not there; `make test` installs it")
    pinned = (TESTS / "oldest_triton.txt").read_text().split("==")[-1].strip()
    path = os.pathsep.join(filter(None, [str(OLDEST), os.environ.get("PYTHONPATH")]))

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": path},
            cwd=TESTS.parent,
            capture_output=True,
            text=True,
            check=False,
        )

    found = run("-c", "import triton, tcur_kernels.operators.triton; print(triton.__version__)")
    assert found.stdout.strip() == pinned, found.stderr
    file = str(TESTS / "test_triton_compile.py")
    options = ("-q", "-p", "no:cacheprovider", "-m", marker, "-k", kernels)
    result = run("-m", "pytest", *options, file)
    assert result.returncode == 0, result.stdout[-5000:]
    assert f"{count} passed" in result.stdout
