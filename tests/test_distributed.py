"""DDP and FSDP2 on two processes give what one process gives."""

import subprocess
import sys
from pathlib import Path


def test_two_processes(tmp_path):
    """One launch for all ways: processes are what takes time."""
    worker = Path(__file__).parent / "distributed_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, str(worker), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all ways agree" in result.stdout
