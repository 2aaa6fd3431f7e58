"""Every Python, torch, peft and transformers that is claimed: `make test-versions`.

One library, the one that `make build` made, serves all of them. Each cell of `CELLS` is an
environment with those versions. There the package is loaded, `build_info` is asked, and the tests
of `TESTS` run. Each cell that was tried is a row of ``tests/versions.csv``; the newest row of each
is the table of the README.

An environment takes some 5 GB below ``build/environments`` and is removed after its last cell,
unless ``--keep``. Exits with 1 if anything failed, and if a Python is not to be had here.
"""

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass

from environments import ROOT, Environment, interpreter, run

sys.path.append(str(ROOT))

from benchmarks import appending, documents
from benchmarks.commit import CODE, commit, now

ROWS = ROOT / "tests" / "versions.csv"
PAGE = ROOT / "README.md"
#: What the environments have beside torch, peft and transformers.
PACKAGES = ("numpy", "safetensors", "tqdm", "filelock", "setuptools", "matplotlib", "monai")
PACKAGES += ("einops", "hypothesis", "pytest", "pytest-xdist", "accelerate")
#: Operators, adapters, peft, and what depends on transformers.
TESTS = ("conformance/test_values.py", "conformance/test_contract.py", "test_functional.py")
TESTS += ("test_adapt.py", "test_checkpoint.py", "test_api.py", "test_imports.py")
TESTS += ("test_peft.py", "test_peft_config.py", "test_peft_errors.py", "test_peft_rows.py")
TESTS += ("test_peft_patterns.py", "test_peft_lora.py", "test_names.py")
TESTS += ("test_experts_transformers.py",)
#: Without the CUDA kernels on the CPU: to compile them takes longer than all of these tests.
CHOSEN = "not cudahost"
#: Packages whose installed versions are recorded.
SHOWN = ("torch", "triton", "peft", "transformers", "numpy")
COLUMNS = ("time", "commit", "version", "cell", "python", *SHOWN, "processor", "isa")
COLUMNS += ("passed", "skipped", "failed", "seconds", "wrong")


@dataclass(frozen=True)
class Cell:
    """Versions to try; what is None is that of constraints.txt."""

    python: str
    torch: str | None = None
    peft: str | None = None
    transformers: str | None = None

    @property
    def name(self):
        """Python 3.11, peft 0.18.0."""
        asked = (("Python", self.python), ("torch", self.torch), ("peft", self.peft))
        asked += (("transformers", self.transformers),)
        return ", ".join(f"{what} {version}" for what, version in asked if version)

    @property
    def environment(self):
        """Cells with one Python and torch share an environment."""
        return Environment(f"{self.python}-{self.torch or 'pinned'}")

    def packages(self):
        """What pip is asked for, and what is then not pinned."""
        asked = {"torch": self.torch, "peft": self.peft, "transformers": self.transformers}
        free = {name for name, version in asked.items() if version}
        if self.torch:
            free.add("setuptools")  # older ones do not take the newest
        if self.transformers and self.transformers < "5":
            free |= {"huggingface_hub", "tokenizers"}  # those that transformers 4 takes
        pins = [f"{name}=={version}" if version else name for name, version in asked.items()]
        return (*pins, *PACKAGES), tuple(sorted(free))


#: Every Python with the newest of all; then every torch; then the oldest and the newest peft and
#: transformers; then the oldest of all.
CELLS = tuple(Cell(python) for python in ("3.10", "3.12", "3.13", "3.14", "3.11"))
CELLS += (
    Cell("3.11", peft="0.18.0", transformers="4.57.6"),
    Cell("3.11", transformers="4.57.6"),
    Cell("3.11", peft="0.18.0"),
    Cell("3.11", torch="2.10.0"),
    Cell("3.11", torch="2.11.0"),
    Cell("3.11", torch="2.15.0"),
    Cell("3.10", torch="2.10.0", peft="0.18.0", transformers="4.57.6"),
)

#: Asks an environment what it has and what of the package runs there.
FACTS = f"""
import json, platform
from importlib import metadata
import tcur_kernels as tcur
from benchmarks.rows import processor_name
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
info = tcur.build_info()
assert info["cpu"]["built"], info
print(json.dumps({{
    "version": tcur.__version__, "python": platform.python_version(),
    **{{name: version(name) for name in {SHOWN!r}}},
    "processor": processor_name(), "isa": info["cpu"]["isa_chosen"],
}}))
"""


def counts(summary):
    """ "3 failed, 5 passed, 1 error in 2 s" as passed, skipped, and failed with errors."""
    found = {what: int(number) for number, what in re.findall(r"(\d+) ([a-z]+)", summary)}
    failed = found.get("failed", 0) + found.get("error", 0) + found.get("errors", 0)
    return {"passed": found.get("passed", 0), "skipped": found.get("skipped", 0), "failed": failed}


def tried(cell, tests):
    """Tries a cell: the row of how it went, and what was printed where it failed."""
    python = interpreter(cell.python)
    if python is None:
        return {"python": cell.python, "wrong": f"not tried: no Python {cell.python} here"}, ""
    environment = cell.environment
    try:
        environment.make(python)
        packages, free = cell.packages()
        environment.install(*packages, without=free)
    except RuntimeError as error:
        return {"python": cell.python, "wrong": "cannot be installed"}, str(error)
    facts = run([environment.python, "-c", FACTS], PYTHONPATH=str(ROOT))
    if facts.returncode != 0:
        return {"python": cell.python, "wrong": "does not load"}, facts.stdout
    row = json.loads(facts.stdout.strip().splitlines()[-1])
    result = environment.test([f"tests/{name}" for name in tests], chosen=CHOSEN)
    last = (result.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    row |= counts(last)
    if result.returncode != 0:
        return {**row, "wrong": f"pytest ended with {result.returncode}"}, result.stdout[-12000:]
    return row, ""


def newest(rows):
    """The newest row of each cell, in the order of `CELLS`."""
    found = {row["cell"]: row for row in rows}
    return [found[cell.name] for cell in CELLS if cell.name in found]


def table(rows):
    """The newest rows as Markdown."""
    heads = ["Python", *(name if name != "triton" else "Triton" for name in SHOWN)]
    lines = []
    for row in newest(rows):
        went = row["wrong"] or f"{int(row['passed']):,} passed, {row['skipped']} skipped"
        versions = [row[name] or "–" for name in ("python", *SHOWN)]
        lines.append([*versions, went, row["time"][:10]])
    return documents.table([*heads, "tests", "day"], lines)


def write(rows):
    """Writes the table of the README."""
    documents.fill({"versions": table(rows)}, [PAGE])


def main(arguments=None):
    """Tries the cells, one after another."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    names = [cell.name for cell in CELLS]
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="CELL")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files; then no row is kept")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    chosen = parser.parse_args(arguments)
    cells = [cell for cell in CELLS if cell.name in chosen.only]
    failed = 0
    for number, cell in enumerate(cells):
        started = time.monotonic()
        row, output = tried(cell, chosen.tests)
        about = {"time": now(), "commit": commit((*CODE, "tests/*.py"))}
        about |= {"cell": cell.name, "seconds": f"{time.monotonic() - started:.0f}"}
        row = {**dict.fromkeys(COLUMNS, ""), **about, **row}
        failed += bool(row["wrong"])
        shown = row["wrong"] or "passed"
        print(f"{cell.name}, {row['seconds']} s: {shown}, {row['passed']} tests", flush=True)
        if output:
            print(output, flush=True)
        if tuple(chosen.tests) == TESTS:
            appending.append(ROWS, COLUMNS, [row])
            write(appending.read(ROWS))
        needed = {later.environment.folder for later in cells[number + 1 :]}
        if not chosen.keep and cell.environment.folder not in needed:
            cell.environment.remove()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
