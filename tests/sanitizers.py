"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

``memory`` compiles csrc/cpu with the first two, ``threads`` with the third, and drives every
operator in a process of its own, by every instruction set that runs here (`sanitized/drive.py`).
Any report fails. Then each of `MUTANTS`, a fault planted in one source, has to be reported: a
sanitizer that sees nothing would pass everything.

    python tests/sanitizers.py                    both; the last line is RESULT and a JSON object
    python tests/sanitizers.py memory             one of them
    python tests/sanitizers.py --quick memory     fewer calls; the transforms without the second
    python tests/sanitizers.py --build memory     compiles only

Under ThreadSanitizer `sanitized/pool.cpp` stands in for the threads of torch: libgomp is not
instrumented, so that its barriers would go unseen, and every write be taken for a race. The
stand-in is linked in place of torch's function; the sources are as they are. So nothing is
suppressed.

The library goes by the package's own name into a copy of the package. So it is loaded as the
package loads it, and no other library is.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
SOURCES = ROOT / "csrc"
POOL = TESTS / "sanitized" / "pool.cpp"
DRIVE = TESTS / "sanitized" / "drive.py"
KEPT = ROOT / "build" / "sanitizers"

#: Flags, runtimes to load first, and what the sanitizers are told, by kind.
KINDS = {
    "memory": (
        (
            "-fsanitize=address,undefined",
            # Null pointers end the process anyway; what they point to, the first one knows better.
            "-fno-sanitize=null,object-size",
            "-fno-sanitize-recover=all",
            # Functions with many accesses, such as the transforms, compile in a fifth of the time.
            "--param=asan-instrumentation-with-call-threshold=0",
        ),
        ("libasan.so", "libubsan.so", "libstdc++.so"),
        {
            "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it keeps
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
    ),
    "threads": (
        ("-fsanitize=thread",),
        ("libtsan.so", "libstdc++.so"),
        {"TSAN_OPTIONS": "exitcode=66 history_size=4"},
    ),
}

#: What a report begins with.
REPORT = re.compile(r"AddressSanitizer: [\w-]+|runtime error: .*|ThreadSanitizer: [\w -]+")

LOCK = "    const std::lock_guard<std::mutex> lock(mutex_);\n"
OWN = "    Scratch<T> scratch(basis.scratch()), tubes(basis.planes()), planes(basis.planes());\n"
PARALLEL = "  torch::stable::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {\n"
SUMS = "  std::vector<double> sums(size);\n"
#: Kind, source, what is written there, by what it is replaced, and what a report must say. The
#: first writes one element past a tensor that torch has allocated.
MUTANTS = {
    "one element past the end": (
        "memory", "cur_linear.cpp", "k.add_update(target, element, values, begin, end);",
        "k.add_update(target, element, values, begin, end + (end == y.numel()));",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "an integer that overflows": (
        "memory", "core_of_packed.cpp", SUMS,
        SUMS + "  volatile int most = 2147483647;\n  most = most + static_cast<int>(sizes.n3);\n",
        "runtime error: signed integer overflow",
    ),
    "scratch that threads share": (
        "threads", "cur_linear.cpp", PARALLEL + OWN, OWN + PARALLEL,
        "ThreadSanitizer: data race",
    ),
    "plans without their lock": (
        "threads", "plans.cpp", LOCK, "", "ThreadSanitizer: data race",
    ),
}  # fmt: skip


def instruction_sets():
    """Those of the sources, best last: every one whose folder has an `isa.h`."""
    return sorted(path.parent.name for path in (SOURCES / "cpu").glob("*/isa.h"))


def runnable(isas):
    """Those that this processor has, as Linux lists it; a library of others would not be driven."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lacks = {"avx512": "avx512bw" not in flags, "avx2": "avx2" not in flags}
    return [isa for isa in isas if not lacks.get(isa, False)]


def sources(isas):
    """What the library is compiled from."""
    folders = [SOURCES / "cpu", *(SOURCES / "cpu" / isa for isa in isas)]
    return [path for folder in folders for path in sorted(folder.glob("*.cpp"))]


def command(flags):
    """The compiler with the flags of the package's own build that matter here."""
    from torch.utils.cpp_extension import include_paths

    folders = include_paths()
    return [
        os.environ.get("CXX", "c++"),
        "-std=c++17",
        "-O1",
        "-g1",
        "-fPIC",
        "-fopenmp-simd",
        "-ffp-contract=fast",
        "-fvisibility=hidden",
        "-Wno-psabi",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DTORCH_EXTENSION_NAME=_cpu",
        *(f"-isystem{path}" for path in folders),
        f"-isystem{_python_headers()}",
        *flags,
    ]


def _python_headers():
    import sysconfig

    return sysconfig.get_paths()["include"]


def run(words, **kwargs):
    """Runs a command and returns its output; raises with all that it printed if it failed."""
    result = subprocess.run(words, capture_output=True, text=True, check=False, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def build(kind, isas, is_quick=False, folder=KEPT):
    """Compiles a library and its mutants; returns the library of each, and "" is the whole one.

    Objects are kept by what they were made of: the command, the source and all headers.
    """
    import torch
    from torch.utils.cpp_extension import library_paths

    flags = KINDS[kind][0]
    compiler = command(flags)
    headers = [*(SOURCES / "common").glob("*.h"), *(SOURCES / "cpu").rglob("*.h")]
    read = hashlib.sha256(f"{compiler} {torch.__version__}".encode())
    for path in sorted(headers):
        read.update(path.name.encode() + path.read_bytes())

    folder = Path(folder, kind)
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source, text=None):
        text = source.read_text() if text is None else text
        # The transforms of one instruction set take longer than all the rest of it.
        less = ["-fno-sanitize=undefined"] if is_quick and source.stem == "transforms" else []
        less = less if kind == "memory" else []
        made = read.copy()
        made.update(f"{less} {source}".encode() + text.encode())
        target = folder / f"{source.parent.name}_{source.stem}-{made.hexdigest()[:16]}.o"
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}.part")
            where = f"-I{source.parent}"
            run([*compiler, *less, where, "-x", "c++", "-c", "-", "-o", str(part)], input=text)
            part.rename(target)  # whole, or not there
        return target

    own = [*sources(isas), *([POOL] if kind == "threads" else [])]
    planted = {name: mutant for name, mutant in MUTANTS.items() if mutant[0] == kind}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # The longest first.
        longest = sorted(own, key=lambda path: path.parent.name not in isas)
        whole = {path: pool.submit(compile_one, path) for path in longest}
        mutated = {
            name: (SOURCES / "cpu" / source, pool.submit(compile_one, SOURCES / "cpu" / source, t))
            for name, (_, source, old, new, _) in planted.items()
            for t in [_replaced(SOURCES / "cpu" / source, old, new)]
        }
        objects = {path: each.result() for path, each in whole.items()}
        variants = {"": objects}
        for name, (source, each) in mutated.items():
            variants[name] = {**objects, source: each.result()}
    libraries = {}
    for name, parts in variants.items():
        words = " ".join(path.name for path in parts.values())
        library = folder / f"cpu_{hashlib.sha256(words.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            paths = [f"-L{path}" for path in library_paths()]
            part = library.with_suffix(f".{os.getpid()}.part")
            link = [compiler[0], "-shared", *flags, "-Wl,-Bsymbolic", *map(str, parts.values())]
            run([*link, *paths, "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(part)])
            part.rename(library)
        libraries[name] = library
    return libraries


def _replaced(source, old, new):
    text = source.read_text()
    assert old in text, (
        f"{source.name}: expected {old.strip()!r}, which a mutant replaces, got none"
    )
    return text.replace(old, new)


def place(library, folder):
    """A copy of the package with this library as its own; what a process imports it from."""
    built = sorted((ROOT / "tcur_kernels").glob("_cpu*.so"))
    assert built, "tcur_kernels: expected its CPU library, got none; build the package first"
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "tcur_kernels", Path(folder, "tcur_kernels"), ignore=without)
    shutil.copy(library, Path(folder, "tcur_kernels", built[0].name))


def drive(kind, library, *arguments):
    """What became of `drive.py` with a library: its exit status and all that it printed."""
    _, runtimes, options = KINDS[kind]
    compiler = os.environ.get("CXX", "c++")
    preloaded = [run([compiler, f"-print-file-name={name}"]) for name in runtimes]
    with tempfile.TemporaryDirectory() as folder:
        place(library, folder)
        environment = {
            **os.environ,
            **options,
            "PYTHONPATH": os.pathsep.join([folder, str(TESTS)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",  # there may be more threads than cores
        }
        if "--few" in arguments and kind == "threads":  # one report is enough, others take long
            environment["TSAN_OPTIONS"] += " halt_on_error=1"
        preload = f"LD_PRELOAD={' '.join(preloaded)}"
        words = ["env", preload, sys.executable, str(DRIVE), kind, folder, *arguments]
        if kind == "threads":
            words = [*_fixed_addresses(), *words]
        result = subprocess.run(
            words, capture_output=True, text=True, check=False, env=environment, cwd=folder
        )
    return result.returncode, result.stdout + result.stderr


def _fixed_addresses():
    """ThreadSanitizer of older compilers refuses addresses that are too random."""
    words = ["setarch", platform.machine(), "-R"]
    if shutil.which(words[0]) is None:
        return []
    tried = subprocess.run([*words, "true"], capture_output=True, check=False)
    return words if tried.returncode == 0 else []


def check(kind, isas, is_quick):
    """Drives the library of a kind and its mutants; returns calls, mutants and faults."""
    libraries, started = build(kind, isas, is_quick), time.perf_counter()
    status, output = drive(kind, libraries[""], *(["--quick"] if is_quick else []))
    reports = REPORT.findall(output)
    driven = re.search(r"^calls (\d+) of (.*)$", output, re.MULTILINE)
    faults = []
    if status != 0 or reports or driven is None:
        faults.append(f"{kind}: exit status {status}, {len(reports)} reports\n{output[-20000:]}")
    calls, here = (int(driven[1]), driven[2]) if driven else (0, "nothing")
    seconds = time.perf_counter() - started
    print(f"{kind}: {calls:,} calls by {here}, {len(reports)} reports, {seconds:.0f} s", flush=True)
    planted = 0
    for name, (own, _, _, _, wanted) in MUTANTS.items():
        if own != kind:
            continue
        planted += 1
        status, output = drive(kind, libraries[name], "--few")
        if status == 0 or wanted not in output:
            faults.append(f"{kind}: {name} was planted, and not reported\n{output[-5000:]}")
        else:
            print(f"{kind}: {name} was planted, and reported", flush=True)
    return calls, planted, faults


def main():
    """Builds, drives, and prints the RESULT line; exits with 1 if anything was reported."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], help="by default all")
    parser.add_argument("--build", action="store_true", help="compile only")
    parser.add_argument("--quick", action="store_true", help="fewer calls, as .ci/run has it")
    parser.add_argument("--isa", help="instruction sets, by default all of the sources")
    options = parser.parse_args()
    kinds = options.kinds or list(KINDS)
    isas = options.isa.split() if options.isa else runnable(instruction_sets())
    if options.build:
        for kind in kinds:
            build(kind, isas, options.quick)
        return
    started, tried, planted, faults = time.perf_counter(), 0, 0, []
    for kind in kinds:
        calls, mutants, found = check(kind, isas, options.quick)
        tried, planted, faults = tried + calls, planted + mutants, faults + found
    for fault in faults:
        print(fault)
    found = {"kind": "sanitizers", "tried": tried, "right": tried if not faults else 0}
    found |= {"refused": 0, "crashes": len(faults), "silent": 0, "planted": planted}
    found |= {"of": kinds, "seconds": round(time.perf_counter() - started)}
    print("RESULT " + json.dumps(found))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
