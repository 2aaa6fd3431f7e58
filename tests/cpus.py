"""What depends on roundings, under the older instruction sets of this machine: `make test-cpus`.

torch, oneDNN and the kernels of this package choose their code by the processor. Each round limits
all of them to one level, as an older processor would, with 2 or 4 threads. The tests are those
of the modules that use a bound of `tolerance.py`. Our kernels give the same bits for any number of
threads (`conformance/test_bits.py`), so each number is tried at one level only; the best level with
one thread is that of `make test`. `.ci/run` asks by `--quick` for the first round alone, of the
operators' own tests. Exits with 1 if any round fails.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent
OPERATORS = TESTS / "conformance"
#: torch's name of a level, ours, and oneDNN's.
LEVELS = {
    "default": ("baseline", "SSE41"),
    "avx2": ("avx2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE"),
}
#: Of the rounds, one after the other.
THREADS = (2, 4)
#: Kernels of other languages, and programs as a whole: they take minutes, and what of them depends
#: on this processor is in the others.
LEFT_OUT = ("test_cuda_host.py", "test_cuda_host_tokens.py", "test_device.py", "test_example.py")
LEFT_OUT += ("test_peft_examples.py", "test_segmentation_afterwards.py")
LEFT_OUT += ("test_segmentation_datalist.py",)
#: What torch asks of an operator, and what is refused: no matter of roundings.
LEFT_OUT += ("test_contract.py",)
#: Half of the time, and mostly torch's. They run at the lowest level only; `make test` runs them at
#: the best one.
LOWEST = ("test_families.py", "test_adapt.py", "test_batch.py", "test_two_modalities.py")
LOWEST += ("test_transforms.py", "test_unetr.py", "test_graph.py", "test_export.py")


def modules(level):
    """Test files that use a bound and run at a level."""
    left_out = LEFT_OUT if level == next(iter(LEVELS)) else LEFT_OUT + LOWEST
    return [
        path
        for path in sorted([*TESTS.glob("test_*.py"), *OPERATORS.glob("test_*.py")])
        if path.name not in left_out and "from tolerance import" in path.read_text()
    ]


def run(level, threads, tests):
    """One round; whether it passed."""
    isa, onednn = LEVELS[level]
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": level,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # there may be more threads than cores
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--isa", isa]
    command += ["-n", "logical", "--maxprocesses", "8", "--dist", "worksteal"]
    started = time.perf_counter()
    result = subprocess.run(
        [*command, *map(str, tests)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    passed = result.returncode == 0
    last = result.stdout.strip().splitlines()[-1].strip("= ") if result.stdout.strip() else ""
    print(f"{level:>8}, {threads} threads, {seconds:4.0f} s: {last}", flush=True)
    if not passed:
        print(result.stdout[-20000:] + result.stderr[-5000:], flush=True)
    return passed


def main():
    """One round for each number of threads, at the lowest levels."""
    from tcur_kernels.operators import native

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, of the operators' tests")
    levels = [level for level, (isa, _) in LEVELS.items() if isa in native.runnable_isas()]
    if parser.parse_args().quick:
        sys.exit(not run(levels[0], THREADS[0], [OPERATORS]))
    passed = []
    for i, threads in enumerate(THREADS):
        level = levels[min(i, len(levels) - 1)]
        passed.append(run(level, threads, modules(level)))
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
