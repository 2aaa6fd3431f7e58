"""Memory of a store of adapters: on the device, of the host, and in its file.

``python -m benchmarks.store_memory CASE WHERE`` is a process that fills one store and prints bytes.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from .memory import Peak, status
from .store import CASES as STORES
from .store import RANK, fill

CASES = STORES
YARDSTICK = "stacked"
WHERE = ("memory", "file")


def measure(case: str, rounds: int) -> dict[str, Peak]:
    """Fills a store in memory and one in a file, each in a process; ignores ``rounds``.

    "device": the slots. "host": by how much the process grows with a store in memory, and
    "host_with_file" with one in a file; "file": that file. "stacked": all cores on the device.

    Raises:
        RuntimeError: a child failed; the message contains its output.
    """
    found = {where: _in_child(case, where) for where in WHERE}
    bytes_of = {
        "stacked": found["memory"]["waiting"],
        "device": found["memory"]["device"],
        "host": found["memory"]["grown"],
        "host_with_file": found["file"]["grown"],
        "file": found["file"]["waiting"],
    }
    return {k: Peak(v / 1e6, v / bytes_of[YARDSTICK]) for k, v in bytes_of.items()}


def _in_child(case: str, where: str) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.store_memory", case, where]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{where}: the child process failed:\n{result.stderr}")
    found: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return found


def filled(case: str, where: str) -> dict[str, int]:
    """Bytes of a store on the device and of what waits, and by how much this process grew."""
    import tcur_kernels as tcur

    from .served import layers

    count, slots, width, blocks, _ = CASES[case]
    adapter = tcur.adapt(layers(width, blocks), rank=RANK)
    with tempfile.TemporaryDirectory() as directory:
        store = adapter.store(slots, directory=directory if where == "file" else None)
        gc.collect()
        before = status("VmRSS")
        fill(store, adapter, count)
        gc.collect()
        grown = status("VmRSS") - before
        return {"device": store.nbytes, "waiting": store.nbytes_waiting, "grown": grown}


if __name__ == "__main__":
    print(json.dumps(filled(sys.argv[1], sys.argv[2])))
