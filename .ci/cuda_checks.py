"""Checks of the CUDA sources that need no GPU and take too long for every test run.

``resources``: nvcc compiles every kernel for every architecture; ptxas must report no spills, no
stack frame, and no more registers than the header comment of the source plans for.
``sanitizers``: the host build runs under AddressSanitizer and UndefinedBehaviorSanitizer.
``barriers``: each barrier is left out in turn, and the host build must notice every time.

What has passed, for every architecture, is recorded; see `cuda_sources`.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc" / "cuda"
HOST = ROOT / "tests" / "cuda_host.py"
#: Builds that are made many times: kernels of their own for three lengths only.
FAST = ("-O1", "-DTCUR_LENGTHS=5,12,48")
REGISTERS = 65536  # of a multiprocessor, on every architecture from sm_80 on

ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}  # of a release

sys.path.insert(0, str(ROOT))
import cuda_sources  # noqa: E402

import setup as build  # noqa: E402


def resources():
    """Compiles with nvcc, reads what ptxas says of every kernel; returns the architectures."""
    nvcc = build.find_nvcc()
    if nvcc is None:
        print("resources: no nvcc here, not checked")
        return set()
    command = build.nvcc_command(nvcc)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile_one(source):
            kept = log_of_build(source, command)
            if kept is not None:
                return kept
            target = Path(folder, source.with_suffix(".o").name)
            return build.run([*command, "-c", str(source), "-o", str(target)])

        sources = sorted(SOURCES.glob("*.cu"))
        logs = dict(zip(sources, pool.map(compile_one, sources), strict=True))
    wrong = [line for source, log in logs.items() for line in check_log(source, log)]
    assert not wrong, "\n".join(wrong)
    return {kernel["target"] for log in logs.values() for kernel in KERNEL.finditer(log)}


def log_of_build(source, command):
    """What ptxas said when the package was built, if by this command of sources as they are."""
    if not build.is_up_to_date(source, command):
        return None
    return build.cuda_object(source).with_suffix(".log").read_text()


PLAN = re.compile(r"Planned: (\d+) threads, up to (\d+) registers, (\d+) blocks")
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def check_log(source, log):
    """One source: its plan against what ptxas made of it. Returns a line for all that is wrong."""
    kernels = list(KERNEL.finditer(log))
    if not kernels:
        assert "TCUR_KERNEL" not in source.read_text(), (
            f"{source.name}: no kernel in ptxas's report"
        )
        return []
    text = re.sub(r"\n// ?", " ", source.read_text())
    plan = PLAN.search(text)
    by_length = "Planned by `Tubes`" in text  # its launch bounds are the plan
    assert plan or by_length, (
        f"{source.name}: the header comment has no plan of threads, registers and blocks"
    )
    threads, registers, blocks = map(int, plan.groups()) if plan else (1, 255, 1)
    assert threads * registers * blocks <= REGISTERS, f"{source.name}: the plan does not fit"
    wrong = []
    for kernel in kernels:
        where = f"{source.name}, {kernel['target']}, {kernel['name']}"
        spilled = [what for what in ("stack", "stores", "loads") if kernel[what] != "0"]
        wrong += [f"{where}: {what} {kernel[what]} bytes" for what in spilled]
        if int(kernel["registers"]) > registers:
            wrong.append(f"{where}: {kernel['registers']} registers")
    used = sorted({int(kernel["registers"]) for kernel in kernels})
    targets = sorted({kernel["target"] for kernel in kernels})
    print(f"resources: {source.name}: {len(kernels)} kernels for {targets}, registers {used}")
    return wrong


def run_host(*arguments, environment=None):
    """What became of tests/cuda_host.py."""
    return subprocess.run(
        [sys.executable, str(HOST), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )


def host(*arguments, environment=None):
    """Output of tests/cuda_host.py."""
    result = run_host(*arguments, environment=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def sanitizers():
    """Runs the host build with both sanitizers in it."""
    flags = [*FAST, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    with tempfile.TemporaryDirectory() as folder:
        library = host("--build", ROOT / "csrc", folder, *flags)
        compiler = os.environ.get("CXX", "c++")
        runtimes = [
            subprocess.run(
                [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in ("libasan.so", "libubsan.so", "libstdc++.so")
        ]
        environment = {
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it keeps
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        assert host(library, environment=environment) == "agree"
    print("sanitizers: every kernel ran, nothing found")


def places():
    """Every barrier of the kernels: its source and where it stands in the text."""
    for source in sorted(path for path in SOURCES.iterdir() if path.is_file()):
        for match in re.finditer(r"^ *__syncthreads\(\);$", source.read_text(), re.MULTILINE):
            yield source, match.start()


def is_missed(source, place):
    """Whether the orders of the threads disagree without this barrier.

    Or whether the kernels fail: without a barrier a place in memory may be read before it is there.
    """
    text = source.read_text()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "csrc", Path(folder, "csrc"))
        rest = text[place:].replace("__syncthreads();", "", 1)
        Path(folder, "csrc", "cuda", source.name).write_text(text[:place] + rest)
        library = host("--build", Path(folder, "csrc"), Path(folder, "build"), *FAST)
        result = run_host(library)
        failed = -result.returncode in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)
        assert failed or result.returncode == 0, result.stdout + result.stderr
        return failed or result.stdout.strip() == "differ"


def barriers():
    """Leaves out one barrier after the other."""
    all_places = list(places())
    host("--build", ROOT / "csrc", ROOT / "build" / "cuda_host", *FAST)  # what stays as it is
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (source, place), missed in zip(
            all_places, pool.map(lambda one: is_missed(*one), all_places), strict=True
        ):
            line = source.read_text().count("\n", 0, place) + 1
            assert missed, f"{source.name}:{line}: nobody misses this barrier"
    print(f"barriers: each of {len(all_places)} is missed when it is left out")


if __name__ == "__main__":
    compiled = resources()
    with ThreadPoolExecutor(1) as beside:  # it runs in one thread, most of the time
        sanitized = beside.submit(sanitizers)
        barriers()
        sanitized.result()
    if compiled >= ARCHITECTURES:
        cuda_sources.record()
