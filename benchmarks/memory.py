"""Peak memory of a training step above that of the model, each method in its own process.

``python -m benchmarks.memory METHOD TOKENS WIDTH`` is such a process; it prints bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from . import methods

#: name -> (tokens,): the MLP stacks of a ViT-B, 12 x 3072 x 768 and 12 x 768 x 3072.
CASES = {f"vit_b_mlp_{tokens}_tokens": (tokens,) for tokens in (216, 864, 4096)}
YARDSTICK = "lora"
CONTENDERS = ("lora", "tcur", "fourierft", "full", "frozen")


@dataclass(frozen=True)
class Peak:
    """Peak memory of one contender, and its ratio to that of the yardstick."""

    peak_mb: float
    ratio: float


def measure(case: str, rounds: int) -> dict[str, Peak]:
    """Runs one child process per method; ignores ``rounds``, since memory hardly varies.

    Raises:
        RuntimeError: a child failed; the message contains its output.
    """
    (tokens,) = CASES[case]
    peaks = {method: _measure_in_child(method, tokens) / 1e6 for method in CONTENDERS}
    return {method: Peak(peak, peak / peaks[YARDSTICK]) for method, peak in peaks.items()}


def _measure_in_child(method: str, tokens: int) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", method, str(tokens), str(methods.WIDTH)]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{method}: the child process failed:\n{result.stderr}")
    return int(json.loads(result.stdout.splitlines()[-1]))


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field}, got none")


def peak_of_step(method: str, tokens: int) -> int:
    """Bytes that a step needs above the prepared model; W_eff counts, since a step makes it."""
    model = methods.prepared(method, methods.build(methods.MLP))
    before = status("VmRSS")
    methods.step_of(model, 16)()  # starts threads, loads libraries, allocates kept buffers
    step = methods.step_of(model, tokens)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    step()
    return status("VmHWM") - before


if __name__ == "__main__":
    methods.WIDTH = int(sys.argv[3])
    print(json.dumps(peak_of_step(sys.argv[1], int(sys.argv[2]))))
