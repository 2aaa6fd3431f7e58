"""DDP and FSDP2 on two processes give what one process gives."""

import torchrun


def test_two_processes(tmp_path):
    """One launch for all ways: processes are what takes time."""
    result = torchrun.run("distributed_worker.py", 2, str(tmp_path))
    assert "all ways agree" in result.stdout
