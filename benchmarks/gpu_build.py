"""Commands with a log, and the build of the libraries, before the package is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def build(log: Path, device: torch.device) -> None:
    """Compiles the libraries in place, for this GPU alone, where one of them is missing."""
    package = ROOT / "tcur_kernels"
    is_needed = not (package / "_cuda.so").exists() and device.type == "cuda"
    probe = [sys.executable, "-c", "import tcur_kernels._cpu"]
    is_needed |= subprocess.run(probe, cwd=ROOT, capture_output=True, check=False).returncode != 0
    if not is_needed:
        return
    environment = dict(os.environ)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        environment.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if logged(command, log, 200, environment) != "passed":
        raise SystemExit(f"the build failed; see {log}")


def logged(
    command: list[str], log: Path, seconds: float, environment: dict[str, str] | None = None
) -> str:
    """Runs a command with its output in a file; "passed", or how it ended."""
    # cuBLAS is deterministic, which the tests ask for, with this alone.
    environment = {**(environment or os.environ), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    with open(log, "w", encoding="utf-8") as file:
        try:
            result = subprocess.run(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"FAILED: not done after {seconds:.0f} s"
    if result.returncode == 0:
        return "passed"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"FAILED: {lines[-1] if lines else f'exit status {result.returncode}'}"
