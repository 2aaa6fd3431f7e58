"""Runs the tests on a device, and the CUDA kernels under ``compute-sanitizer``."""

from __future__ import annotations

import re
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from .gpu_bench import Bench
from .gpu_build import finish, logged, start
from .gpu_rows import Row

WORKERS = 8
SUITE = (
    "conformance",
    "test_token_cores.py",
    "test_functional.py",
    "test_layers.py",
    "test_adapt.py",
    "test_t_product.py",
    "test_decompose.py",
)
#: Time limits of the parts in seconds; a part that is stopped keeps its results so far.
DEVICE_SECONDS, SUITE_SECONDS, SANITIZER_SECONDS = 75.0, 75.0, 120.0
SHOWN = 12  # failures of a part that get a row, at most; the log has all of them


def pytest(bench: Bench, workers: int, limit: int = 60) -> list[str]:
    """The pytest command for the device: each test has a time limit, and warnings are no errors."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
    if workers > 1 and find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    if find_spec("pytest_timeout") is not None:
        command += ["--timeout", str(limit)]
    return [*command, "--tb", "short", "--device", bench.device.type]


def summary(text: str) -> tuple[str, list[str]]:
    """pytest's summary, such as "3 failed, 4 passed in 5 s", and its lines about failures."""
    ends = re.findall(r"^=*\s*((?:\d+ \w+,? ?)+in [\d.]+ ?s.*?)\s*=*$", text, re.MULTILINE)
    failures = re.findall(r"^(?:FAILED|ERROR) (.+)$", text, re.MULTILINE)
    return (ends[-1] if ends else ""), failures


def _part(bench: Bench, name: str, selected: list[str], log: Path, limit: float) -> None:
    seconds = min(limit, bench.clock.left)
    if seconds < 10:
        bench.rows.add(Row("tests", name, bench.device.type, note="left out: no time"))
        return
    before = log.stat().st_size if log.exists() else 0
    command = pytest(bench, 1 if bench.tiny else WORKERS)
    ended = logged([*command, *selected], log, seconds)
    with open(log, encoding="utf-8", errors="replace") as file:
        file.seek(before)
        found, failures = summary(file.read())
    if ended == "passed":
        note = f"passed: {found}"
    elif re.search(r"^(no tests ran|\d+ deselected) in", ended.removeprefix("FAILED: ")):
        note = "none here"
    else:
        note = ended if found in ended else f"{ended}; {found}"
    bench.rows.add(Row("tests", name, bench.device.type, note=note))
    for failure in failures[:SHOWN]:
        test, _, why = failure.partition(" - ")
        bench.rows.add(Row("tests", test.rpartition("/")[2], name, note=f"FAILED: {why[:200]}"))


def tests(bench: Bench, out: Path) -> None:
    """Runs the tests for any device, then the whole suite with this device as the default."""
    log, ours = out / "tests.log", "tests/test_device.py"
    if bench.tiny:
        bench.piece(
            "tests", "small", lambda: _part(bench, "small", [ours, "-k", "small"], log, 120)
        )
        return
    parts = {
        "device, cuda": ([ours, "-k", "cuda"], DEVICE_SECONDS),
        "device, triton": ([ours, "-k", "triton"], DEVICE_SECONDS),
        "device, others": ([ours, "-k", "not cuda and not triton"], DEVICE_SECONDS),
        "suite": ([f"tests/{name}" for name in SUITE], SUITE_SECONDS),
    }
    for name, (selected, limit) in parts.items():
        bench.piece("tests", name, lambda n=name, s=selected, x=limit: _part(bench, n, s, log, x))


def sanitizer(bench: Bench, out: Path) -> None:
    """Runs both checks in parallel, without the caching allocator, which would hide errors."""
    bench.piece("sanitizer", "both", lambda: _sanitize(bench, out))


def _sanitize(bench: Bench, out: Path) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    seconds = min(SANITIZER_SECONDS, bench.clock.left)
    checks = ("memcheck", "racecheck")
    if tool is None or bench.device.type != "cuda" or seconds < 20:
        note = "left out: no time" if seconds < 20 else "absent"
        for check in checks:
            bench.rows.add(Row("sanitizer", check, "cuda", note=note))
        return
    small = [*pytest(bench, 1, 0), "-v", "-k", "small and cuda", "tests/test_device.py"]
    until = time.monotonic() + seconds
    running = {}
    for check in checks:
        options = ["--tool", check, "--kernel-name", "kernel_substring=tcur", "--print-limit", "20"]
        options += ["--target-processes", "application-only", "--error-exitcode", "1"]
        log = out / f"{check}.log"
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        running[check] = (start([tool, *options, *small], log, environment), log)
    for check, (process, log) in running.items():
        ended = finish(process, log, until - time.monotonic())
        text = log.read_text(encoding="utf-8", errors="replace")
        said = re.findall(r"={3,} ((?:ERROR|RACECHECK) SUMMARY.*)", text)
        tests_ended, failures = summary(text)
        details = [*said[-1:], tests_ended, *failures[:3]]
        note = "; ".join([ended, *(d for d in details if d and d not in ended)])
        bench.rows.add(Row("sanitizer", check, "cuda", note=note[:400]))
