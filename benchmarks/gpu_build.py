"""Runs commands with a log and a time limit, and builds the libraries if they are missing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from .gpu_bench import Bench
from .gpu_rows import Row

ROOT = Path(__file__).parent.parent
#: Builds one library in place, with setup.py from which the other one is left out.
COMMAND = (
    "import setup; setup.setup(ext_modules=[setup.{}_extension()], "
    "cmdclass={{'build_ext': setup.build_ext()}}, script_args=['build_ext', '--inplace'])"
)
PROBE = (
    "import tcur_kernels as t; print([n for n in ('cpu', 'cuda') if t.build_info()[n]['built']])"
)


def start(
    command: list[str], log: Path, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts a command in its own process group; its output is appended to a file."""
    # The tests need a deterministic cuBLAS, which needs this setting.
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **(environment or {})}
    with open(log, "ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes], grace: float = 8.0) -> None:
    """Ends a process and its children; asks first, so that it can report its progress."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(process: subprocess.Popen[bytes], log: Path, seconds: float) -> str:
    """Waits for a command; returns "passed" or how it ended."""
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        end(process)
        return f"FAILED: not done after {max(0.0, seconds):.0f} s"
    end(process)  # ends children that it left running
    if process.returncode == 0:
        return "passed"
    return f"FAILED: {last_line(log) or f'exit status {process.returncode}'}"


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else ""


def logged(
    command: list[str], log: Path, seconds: float, environment: dict[str, str] | None = None
) -> str:
    """Runs a command with its output in a file; returns "passed" or how it ended."""
    return finish(start(command, log, environment), log, seconds)


def built() -> list[str]:
    """The libraries that a fresh process can load."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return [name for name in ("cpu", "cuda") if f"'{name}'" in result.stdout]


def run(bench: Bench, log: Path) -> None:
    """Compiles the missing libraries in place, in parallel, only for this GPU."""
    here = built()
    missing = [name for name in ("cuda", "cpu") if name not in here]
    for name in here:
        bench.rows.add(Row("build", name, "", note="here already"))
    if bench.device.type != "cuda" or "cuda" in here:
        for name in missing:
            bench.rows.add(Row("build", name, "", note="left out: not needed"))
        return
    major, minor = torch.cuda.get_device_capability(bench.device)
    environment = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    started, until = time.monotonic(), bench.clock.left
    folder = Path(tempfile.mkdtemp())
    logs = {name: folder / f"{name}.log" for name in missing}
    processes = {
        name: start([sys.executable, "-c", COMMAND.format(name)], logs[name], environment)
        for name in missing
    }
    for name, process in processes.items():
        # Without the CPU library only a few tests are lost, so do not wait longer for a late build.
        seconds = until - (time.monotonic() - started)
        ended = finish(process, logs[name], seconds if name == "cuda" else min(seconds, 20.0))
        with open(log, "a", encoding="utf-8") as file:
            file.write(logs[name].read_text(encoding="utf-8", errors="replace"))
            if name == "cuda":
                for report in sorted((ROOT / "build" / "cuda").glob("*.log")):
                    file.write(f"\n{report.name}\n{report.read_text(encoding='utf-8')}")
        if ended != "passed" and name == "cuda":
            ended += "; Triton alone from here on"
        bench.rows.add(Row("build", name, "", note=ended))
    shutil.rmtree(folder)
