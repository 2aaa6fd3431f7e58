"""One source and one binary for every torch that is claimed: `make test-builds`.

For each release of `RELEASES` there is an environment of its own with the Triton that it came with.
The libraries are built there, for the CPU and with nvcc for GPUs too. Each build is then loaded
under its own and every later release, and the tests of the operators run; under its own release
also the tests of layers, of Triton's kernels, interpreted and compiled, and of the harness for a
GPU. Where all releases pass, the table of docs/design.md is written anew.

The environments take some 5 GB each and stay in ``build/environments``, the builds in
``build/versions``; how a failure ended is printed. Exits with 1 if anything failed.
"""

import argparse
import shutil
import sys
import time

from environments import ROOT, Environment, done, run

sys.path.append(str(ROOT))

from benchmarks import documents

#: The oldest that pyproject.toml admits, what the GPU machines have, what constraints.txt pins, and
#: the newest.
RELEASES = ("2.10.0", "2.11.0", "2.13.0", "2.15.0")
#: The Triton that each is run with: what it came with; for 2.13, whose build for CPUs brings none,
#: that of tests/newest_triton.txt.
TRITON = {"2.10.0": "3.6.0", "2.11.0": "3.6.0", "2.13.0": "3.9.0", "2.15.0": "3.9.0"}
#: numpy whose scalars the interpreter of a Triton knows.
NUMPY = {"3.6.0": "numpy<2.4"}
DOCUMENT = ROOT / "docs" / "design.md"
PACKAGES = ("ninja", "safetensors", "tqdm", "filelock", "hypothesis", "matplotlib")
PACKAGES += ("peft", "pytest", "pytest-xdist", "setuptools>=77")
#: Tests of a binary under a release, and those of a release.
OPERATORS = ("functional", "isa", "token_cores", "device", "cuda", "reference")
RELEASE = ("eager", "gradient_sum", "nn", "kept", "graph", "stack", "batch", "build")
RELEASE += ("gpu_harness", "triton", "triton_compile")


class Release:
    """A release of torch: its environment, and a copy of the sources that is built for it."""

    def __init__(self, torch, triton=None):
        self.torch, self.triton = torch, triton or TRITON[torch]
        self.environment = Environment(torch)
        self.python = self.environment.python
        self.tree = ROOT / "build" / "versions" / torch
        self.is_built = False

    def install(self):
        """The environment, if it is not complete."""
        self.environment.make()
        numpy = NUMPY.get(self.triton, "numpy")
        without = ("torch", "numpy", "setuptools")
        pinned = (f"torch=={self.torch}", f"triton=={self.triton}", numpy)
        self.environment.install(pinned[0], without=without)
        self.environment.install(*pinned, *PACKAGES, without=without)

    def build(self):
        """Both libraries, in the copy; what is up to date is kept. How it ended."""
        listed = done(["git", "ls-files", "-co", "--exclude-standard"]).splitlines()
        for name in listed:
            source, target = ROOT / name, self.tree / name
            if not source.exists():
                target.unlink(missing_ok=True)
            elif not target.exists() or source.read_bytes() != target.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        result = run([self.python, "setup.py", "build_ext", "--inplace"], self.tree)
        self.is_built = result.returncode == 0
        return "built" if self.is_built else f"FAILED to build\n{result.stdout[-8000:]}"

    def load(self, binary):
        """Whether both libraries of a build load under this release, or what went wrong."""
        code = (
            "import tcur_kernels as t; i = t.build_info(); "
            "print('loads' if i['cpu']['built'] and i['cuda']['built'] else i)"
        )
        return run([self.python, "-c", code], binary.tree).stdout.strip()

    def test(self, binary, names):
        """How tests of a build ended under this release."""
        files = ["tests/conformance", *(f"tests/test_{name}.py" for name in names)]
        result = self.environment.test(files, binary.tree)
        lines = result.stdout.strip().splitlines() or ["no output"]
        if result.returncode != 0:
            return f"FAILED: {lines[-1]}\n{result.stdout[-12000:]}"
        return lines[-1].strip("= ")


def table(releases, cells):
    """The results as Markdown: a row for each build, a column for each release it ran under."""
    head = [f"{one.torch}, Triton {one.triton}" for one in releases]
    lines = [f"| built with \\ under torch | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for binary in releases:
        row = [cells.get((binary.torch, one.torch), "–") for one in releases]
        lines.append(f"| torch {binary.torch} | {' | '.join(row)} |")
    return lines


def main():
    """Builds, loads, tests; then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("releases", nargs="*", default=RELEASES, help="of torch; default: all")
    parser.add_argument("--triton", help="in place of the one that belongs to them")
    args = parser.parse_args()
    releases = [Release(torch, args.triton) for torch in RELEASES if torch in args.releases]
    cells, failed = {}, 0

    def report(what, how, started):
        print(f"{what}, {time.time() - started:.0f} s: {how}", flush=True)
        return how.startswith("FAILED")

    for one in releases:
        started = time.time()
        one.install()
        failed += report(f"torch {one.torch}, Triton {one.triton}", one.build(), started)
    for binary in (one for one in releases if one.is_built):
        for one in releases[releases.index(binary) :]:
            started, loaded = time.time(), one.load(binary)
            if loaded != "loads":
                failed += report(f"{binary.torch} under {one.torch}", f"FAILED: {loaded}", started)
                cells[binary.torch, one.torch] = "does not load"
                continue
            names = OPERATORS if one is not binary else (*OPERATORS, *RELEASE)
            how = one.test(binary, names)
            failed += report(f"{binary.torch} under {one.torch}", how, started)
            cells[binary.torch, one.torch] = how.splitlines()[0].split(" in ")[0]
    lines = "\n".join(table(releases, cells))
    print(lines)
    if not failed and len(releases) == len(RELEASES) and args.triton is None:
        documents.fill({"builds": f"{lines}\n"}, [DOCUMENT])
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
