"""Breaks the kernels of a language in every way of its table: does the suite notice?

``python tests/mutants/mutants.py --language cpu|cuda [--only NUMBER…] [--kernel NAME…]``

One compilation holds all mutants (`schemata`). pytest collects the tests as ever. In place of
running them, this process forks a child for each mutant, which puts it in force and runs the tests
until the first one fails. Nothing of the library has run before the fork, so that every table is
made by the mutant itself. A child that crashes or hangs has noticed, too, and is listed.

Without a mutant the tests must pass. The choices between mutants round a few sums in another way,
and some bounds are so tight that one small result in hundreds exceeds its own. Such tests
are listed and left out. More than `MOST_LEFT_OUT` of them are an error.
"""

import argparse
import functools
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads cannot be forked

ROOT = Path(__file__).parent.parent.parent
sys.path[0] = str(ROOT / "tests")  # else this file would be the package that it is in

import pytest  # noqa: E402
import torch  # noqa: E402

from mutants import cpu, cuda, schemata  # noqa: E402

LANGUAGES = {"cpu": cpu, "cuda": cuda}
BUILD = ROOT / "build" / "mutants"
#: Quick tests with many cases, which are run before the others.
FIRST = ("test_values.py", "test_isa.py", "test_cuda_host_tokens.py", "test_inputs.py")
FIRST += ("test_buffers.py", "test_bits.py", "test_token_kernels.py", "test_derivatives.py")
SECONDS = 60  # a test that takes longer hangs
MOST_LEFT_OUT = 0.005
FEW = 40  # mutants
BYTES = 16 << 30  # of memory that a child may have


def build_cpu(kernels):
    """A copy of the package with the mutants in it, which builds itself; returns its library."""
    folder = BUILD / "cpu"
    for name in ("tcur_kernels", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            skipped = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, folder / name, dirs_exist_ok=True, ignore=skipped)
        else:
            shutil.copy(source, folder / name)
    setup = (ROOT / "setup.py").read_text()
    assert setup.count('"-O3",\n            "-g0"') == 1
    (folder / "setup.py").write_text(setup.replace('"-O3",\n            "-g0"', '"-O1", "-g0"'))
    schemata.copy_sources(kernels, folder / "csrc")
    schemata.write(folder / "csrc" / "cpu" / "mutant.cpp", schemata.DEFINITION)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    isa = "avx2" if " avx2 " in flags and " fma " in flags else "baseline"
    environment = {**os.environ, "TCUR_ONLY": "cpu", "TCUR_ISA": isa}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    mark, made_of = folder / "made_of", f"{isa} {schemata.digest(folder / 'csrc')}"
    if not mark.exists() or mark.read_text() != made_of:
        mark.unlink(missing_ok=True)
        run = functools.partial(subprocess.run, cwd=folder, env=environment, check=False)
        result = run(command, capture_output=True, text=True)
        assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
        mark.write_text(made_of)
    sys.path.insert(0, str(folder))
    (library,) = (folder / "tcur_kernels").glob("_cpu*.so")
    import tcur_kernels

    assert Path(tcur_kernels.__file__).is_relative_to(folder)
    return library


def build_cuda(kernels):
    """The host build of the mutated CUDA sources, in place of that of the sources as they are."""
    import cuda_host

    folder = BUILD / "cuda"
    schemata.copy_sources(kernels, folder / "csrc")
    controls = Path("cuda", "emulator", "controls.cpp")
    text = (schemata.SOURCES / controls).read_text() + schemata.DEFINITION
    schemata.write(folder / "csrc" / controls, text)
    library = cuda_host.build(folder / "objects", folder / "csrc", cuda.FLAGS)
    host = cuda_host.load(str(library))
    cuda_host.load = lambda library=None: host
    return library


class Runner:
    """In place of pytest's loop: runs the tests for every mutant, each in a process of its own."""

    def __init__(self, language, library, quick):
        self.language, self.library, self.quick, self.chosen = language, library, quick, []
        self.kernel_of = {}
        for name, mutants in language.KERNELS.items():
            for _ in mutants:
                self.kernel_of[len(self.kernel_of) + 1] = name
        self.outcomes, self.failure = {}, None
        self.failed = []  # of a child
        self.left_out_file = library.parent / "left_out.json"

    def pytest_configure(self):
        """What is expected is computed once, and kept for all children."""
        from conformance import data

        for name in ("arguments", "expected", "norm_of_terms"):
            function = getattr(data, name)
            setattr(data, name, functools.cache(getattr(function, "__wrapped__", function)))

    def pytest_runtestloop(self, session):
        from conformance import data

        self.switch = schemata.Switch(self.library)
        torch.use_deterministic_algorithms(False)  # imports what every child would import
        # For few mutants each child computes what it needs itself.
        few = self.chosen if len(self.chosen) > FEW else []
        used = {item for number in few for item in self.ordered(session.items, number)}
        for item in used:
            case = getattr(item, "callspec", None) and item.callspec.params.get("case")
            if case is not None:
                data.expected(case)
                if case.is_reduction:
                    data.norm_of_terms(case)
        if 0 in self.chosen:
            self.try_without(session)
        left_out = set()
        if self.left_out_file.exists():
            left_out = set(json.loads(self.left_out_file.read_text()))
        session.items[:] = [item for item in session.items if item.nodeid not in left_out]
        for number in self.chosen:
            if number == 0:
                continue
            begin = time.monotonic()
            self.outcomes[number] = self.in_child(session, number)
            kind, where, ran = self.outcomes[number]
            name, took = self.kernel_of.get(number, "none"), time.monotonic() - begin
            print(f"{number} {name}: {kind} {where} ({ran} tests, {took:.1f} s)", flush=True)
        return True

    def try_without(self, session):
        """No mutant is in force: keeps which tests fail all the same, and asserts that few do."""
        kind, where, ran = self.in_child(session, 0)
        failed = json.loads(where) if kind == "caught" else []
        assert kind in ("passed", "caught"), f"without a mutant: {kind} {where}"
        for name in failed:
            print(f"left out: {name}")
        print(f"without a mutant: {ran} tests, {len(failed)} left out", flush=True)
        assert len(failed) <= MOST_LEFT_OUT * ran
        self.left_out_file.write_text(json.dumps(failed))

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)
        if report.failed and self.failure is None:
            self.failure = f"{report.nodeid}: {report.longreprtext.strip().splitlines()[-1]}"

    def in_child(self, session, number):
        """What became of the tests: its kind, the test, and how many ran."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            self.run(session, number, writing)
        os.close(writing)
        said = self.listen(reading, child)
        os.close(reading)
        status = os.waitpid(child, 0)[1]
        *ran, last = said.splitlines() or [""]
        if os.WIFSIGNALED(status):
            hangs = os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGKILL)
            return ("hangs" if hangs else "crashes"), last, len(ran)
        passed = os.WEXITSTATUS(status) == 0
        return ("passed", "", len(ran) + 1) if passed else ("caught", last, len(ran))

    def listen(self, reading, child):
        """What the child says; ends it if it says nothing for long."""
        said = b""
        while True:
            if not select.select([reading], [], [], SECONDS + 30)[0]:
                os.kill(child, signal.SIGKILL)
                return said.decode()
            part = os.read(reading, 65536)
            if not part:
                return said.decode()
            said += part

    def run(self, session, number, writing):
        """The child: its number, the tests, the exit."""
        code = 3
        try:
            log = os.open(os.devnull, os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            self.switch.set(number)
            items = self.ordered(session.items, number)
            for item, following in zip(items, [*items[1:], None], strict=True):
                signal.alarm(SECONDS)
                os.write(writing, f"{item.nodeid}\n".encode())
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if self.failure is not None and number > 0:
                    os.write(writing, f"{self.failure}\n".encode())
                    break
            if self.failed and number == 0:
                os.write(writing, f"{json.dumps(self.failed)}\n".encode())
            code = int(bool(self.failed))
        finally:
            os._exit(code)

    def ordered(self, items, number):
        """All tests, those first that use the kernel of a mutant, and of these the quick ones."""
        pattern = re.compile(self.language.CHECKS.get(self.kernel_of.get(number), ""))

        def place(item):
            name = item.path.name
            return pattern.search(item.nodeid) is None, FIRST.index(name) if name in FIRST else 99

        items = sorted(items, key=place)
        return [item for item in items if place(item) < (True, 0)] if self.quick else items


def result(name, language, runner):
    """The line for the table of the nights, and whether all is well."""
    every = schemata.numbered(language.KERNELS)
    tried = runner.outcomes
    of = {kind: [n for n, one in tried.items() if one[0] == kind] for kind in ("passed", "hangs")}
    of["crashes"] = [number for number, one in tried.items() if one[0] == "crashes"]
    kernels = {}
    for number in tried:
        count = kernels.setdefault(runner.kernel_of[number], [0, 0])
        count[0] += 1
        count[1] += number not in of["passed"]
    for number in of["passed"]:
        mutant = every[number]
        print(f"survived: {number} {mutant.file}: {mutant.words}: {mutant.where} -> {mutant.new}")
    caught = len(tried) - len(of["passed"])
    if tried:
        print(f"{name}: {caught} of {len(tried)} noticed, {100 * caught / len(tried):.1f} %")
    line = {
        "kind": "mutants",
        "language": name,
        "tried": len(tried),
        "caught": caught,
        "survived": of["passed"],
        "crashed": of["crashes"],
        "hung": of["hangs"],
        "kernels": {kernel: f"{caught}/{count}" for kernel, (count, caught) in kernels.items()},
    }
    return line, not of["passed"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language", choices=LANGUAGES, required=True)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutants; 0 is none")
    parser.add_argument("--kernel", nargs="*", help="mutants of these kernels")
    parser.add_argument(
        "--quick", action="store_true", help="only the tests that are named after the kernels"
    )
    parser.add_argument("--tests", default="", help="only tests of this expression (pytest -k)")
    asked = parser.parse_args()
    language = LANGUAGES[asked.language]
    begin = time.monotonic()
    builder = {"cpu": build_cpu, "cuda": build_cuda}[asked.language]
    library = builder(language.KERNELS)
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    runner = Runner(language, library, asked.quick)
    numbers = [
        number
        for number, kernel in runner.kernel_of.items()
        if (asked.only is None or number in asked.only)
        and (asked.kernel is None or kernel in asked.kernel)
    ]
    runner.chosen = [0, *numbers] if asked.only is None or 0 in asked.only else numbers
    options = [
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
        "-p",
        "no:xdist",
        "--tb=native",
    ]
    tests = [str(ROOT / "tests" / name) for name in language.TESTS]
    chosen = f"({language.SELECTED}) and ({asked.tests})" if asked.tests else language.SELECTED
    options += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-k", chosen]
    code = pytest.main([*options, *tests], plugins=[runner])
    line, is_well = result(asked.language, language, runner)
    print("RESULT " + json.dumps(line))
    return 0 if is_well and code == 0 and len(runner.outcomes) == len(numbers) else 1


if __name__ == "__main__":
    sys.exit(main())
