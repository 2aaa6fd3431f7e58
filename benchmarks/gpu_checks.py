"""The ceilings of a device, and the tests on it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from .gpu_build import logged
from .gpu_clock import Bench, Row


def _copy_rate(bench: Bench) -> None:
    count = 2**20 if bench.tiny else 2**30
    source = torch.randn(count, device=bench.device)
    target = torch.empty_like(source)
    case = f"copy of {4 * count / 1e9:.2g} GB"
    bench.measure("rates", case, "copy", lambda: target.copy_(source))
    ms = bench.rows.all[-1].ms
    if ms is not None:
        bench.bytes_per_ms = 8 * count / ms
        note = f"{bench.bytes_per_ms / 1e9:.3g} TB/s read and written"
        bench.rows.add(Row("rates", case, "rate", note=note))


def rates(bench: Bench) -> None:
    """The ceilings: a copy, and products of square matrices in every precision used."""
    _copy_rate(bench)
    size = 64 if bench.tiny else 8192
    for contender, dtype, tf32 in (
        ("fp32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
    ):
        a = torch.randn(size, size, device=bench.device).to(dtype)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        bench.measure("rates", f"product {size}", contender, lambda a=a: a @ a)
        torch.set_float32_matmul_precision(before)
        ms = bench.rows.all[-1].ms
        if ms is not None:
            note = f"{2 * size**3 / ms / 1e9:.3g} TFLOP/s"
            bench.rows.add(Row("rates", f"product {size}", f"{contender}, rate", note=note))


def pytest(bench: Bench) -> list[str]:
    """pytest on the device; newer versions of anything may warn there."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
    return [*command, "--device", bench.device.type]


def tests(bench: Bench, out: Path) -> None:
    """The tests on the device: those made for any device, then the suite's with that default."""
    suites = {"device": ["tests/test_device.py"]}
    if bench.tiny:
        suites["device"] += ["-k", "small"]
    else:
        names = ("ops", "token_cores", "functional", "nn", "adapt", "tubal", "decompose")
        suites["suite"] = [f"tests/test_{name}.py" for name in names]
    for name, selected in suites.items():
        seconds = min(75.0, max(5.0, bench.clock.left))
        ended = logged([*pytest(bench), *selected], out / f"tests_{name}.log", seconds)
        bench.rows.add(Row("tests", name, bench.device.type, note=ended))


def sanitizer(bench: Bench, out: Path) -> None:
    """The CUDA kernels on small tensors under ``compute-sanitizer``."""
    name = "compute-sanitizer"
    tool = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    for check in ("memcheck", "racecheck"):
        seconds = min(40.0, bench.clock.left)
        if tool is None or bench.device.type != "cuda" or seconds < 10:
            note = "left out: no time" if seconds < 10 else "absent"
            bench.rows.add(Row("sanitizer", check, "cuda", note=note))
            continue
        ours = ["--kernel-name", "kernel_substring=tcur", "--error-exitcode", "1"]
        small = [*pytest(bench), "-k", "small and cuda", "tests/test_device.py"]
        ended = logged([tool, "--tool", check, *ours, *small], out / f"{check}.log", seconds)
        bench.rows.add(Row("sanitizer", check, "cuda", note=ended))
