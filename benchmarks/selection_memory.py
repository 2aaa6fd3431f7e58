"""Peak memory of choosing slices above that of the weights, each rule in its own process.

``python -m benchmarks.selection_memory CASE RULE FILE`` is such a process; it prints bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import tcur_kernels as tcur
from tcur_kernels.decompose import HeldSlices, Leverage, open_stack

from .memory import Peak, status

MIB = 1 << 20
#: name -> (n3, n1, n2, rank, MiB of workspace, in files). The stacks of a ViT-B are in memory. The
#: others are in sparse files, whose holes read as zeros at the same cost. They show how the peak
#: grows with each size; the largest are gate and up projections of an 8B Llama, 14 GiB.
CASES = {
    "vit_b_attention_slices": (48, 768, 768, 8, 1024, False),
    "vit_b_mlp_up_slices": (12, 3072, 768, 8, 1024, False),
    "files_16x1024x1024": (16, 1024, 1024, 8, 128, True),
    "files_64x1024x1024": (64, 1024, 1024, 8, 128, True),
    "files_16x4096x1024": (16, 4096, 1024, 8, 128, True),
    "files_16x1024x4096": (16, 1024, 4096, 8, 128, True),
    "llama_8b_gate_up": (64, 14336, 4096, 8, 1024, True),
}
YARDSTICK = "weights"
RULES = {"norm": "norm", "norm2": "norm2", "leverage": Leverage("randomized")}


def measure(case: str, rounds: int) -> dict[str, Peak]:
    """Runs one child process per rule; ignores ``rounds``, since memory hardly varies.

    ``weights`` is the size of the stack itself, in fp32.

    Raises:
        RuntimeError: a child failed; the message contains its output.
    """
    n3, n1, n2, _, _, in_files = CASES[case]
    size = 4 * n3 * n1 * n2 / 1e6
    peaks = {YARDSTICK: Peak(size, 1.0)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stack.safetensors"
        if in_files:
            write_sparse(path, n3, n1, n2)
        for rule in RULES:
            peak = _measure_in_child(case, rule, path) / 1e6
            peaks[rule] = Peak(peak, peak / size)
    return peaks


def write_sparse(path: Path, n3: int, n1: int, n2: int) -> None:
    """Writes a safetensors file of n3 fp32 matrices: some rows of numbers, holes for the rest."""
    size = 4 * n1 * n2
    header = {
        f"layer{i}": {"dtype": "F32", "shape": [n1, n2], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(n3)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for i in range(n3):
            file.seek(start + i * size)
            file.write(torch.randn(min(n1, 32), n2, generator=generator).numpy().tobytes())
        file.truncate(start + n3 * size)


def peak_of_choice(case: str, rule: str, path: str) -> int:
    """Bytes that ``tensor_cur`` adds to the peak memory of the process, including C and R."""
    n3, n1, n2, rank, workspace, in_files = CASES[case]
    tcur.tensor_cur(torch.randn(4, 32, 32), 2, RULES[rule], "zero")  # starts threads, libraries
    if in_files:
        names = [f"layer{i}" for i in range(n3)]
        stack = open_stack(path, names, max_workspace=workspace * MIB, progress=True)
    else:
        slices = list(torch.randn(n3, n1, n2))
        stack = HeldSlices("weights", slices, max_workspace=workspace * MIB)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    tcur.tensor_cur(stack, rank, RULES[rule], "zero")
    return status("VmHWM") - before


def _measure_in_child(case: str, rule: str, path: Path) -> int:
    command = [sys.executable, "-m", "benchmarks.selection_memory", case, rule, str(path)]
    root = Path(__file__).parent.parent
    # Its progress bars go to our stderr.
    result = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{rule}: the child process failed")
    return int(json.loads(result.stdout.splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps(peak_of_choice(*sys.argv[1:])))
