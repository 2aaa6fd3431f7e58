"""Scripts run by torchrun: how a test starts one, and how each of its processes leaves."""

import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist


def run(script: str, processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``tests/script`` on some processes of this machine, checked to have ended well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(Path(__file__).with_name(script))]
    # Processes could wait for each other for ever; no machine is so busy that it takes that long.
    result = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=1500, check=False
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    return result


def leave():
    """The end of a process whose checks have all passed.

    torch's caches of DTensor layouts keep the process group past ``destroy_process_group``, and
    its threads then race the interpreter's end: seen once in hundreds of runs, as "terminate called
    without an active exception". What is tested is over by now, so the process ends here.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
