"""Weights sharded over processes: the same slices and cores as on one. Each test is a torchrun."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sharded_selection.py")


@pytest.mark.parametrize("processes", [2, 3])
def test_sharded_weights_give_the_same_indices(processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(SCRIPT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    for process in range(processes):
        assert f"process {process} of {processes}: done" in result.stderr
