"""Says whether the kernels for GPUs are those whose tests have passed.

Without a GPU their tests compile, interpret and emulate, which is a third of the time of all
tests. They depend on the kernels, on what calls these, and on the tests alone. So `make
test-kernels` records what has passed, in ``kernels_checked.txt``, and `make test` repeats it for
anything else. The exit status is 0 if they have passed. With ``--record`` it is recorded that they
have.
"""

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORD = ROOT / ".ci" / "kernels_checked.txt"
FOLDERS = ("csrc/cuda", "csrc/common", "tcur_kernels/operators", "benchmarks/sass")
FOLDERS += ("tests/conformance", "tests/interpreted")
FILES = ("setup.py", "pyproject.toml", "tests/cases.py", "tests/cuda_host.py", "tests/oracle.py")
FILES += ("tests/conftest.py", "tests/plain.py", "tests/tolerance.py")
FILES += ("tests/newest_triton.txt", "tests/oldest_triton.txt")
#: Whose tests are marked so.
TESTS = ("cuda_host", "cuda_host_tokens", "kernels_issue", "sass_triton", "triton")
TESTS += ("triton_compile", "triton_oldest")
#: Packages whose versions matter.
PINS = ("torch==", "triton==", "numpy==")


def digest():
    """A digest of all that the tests of the kernels depend on."""
    found = [
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    ]
    found += [ROOT / name for name in (*FILES, *(f"tests/test_{name}.py" for name in TESTS))]
    whole = hashlib.sha256()
    for path in sorted(found):
        whole.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith(PINS):
            whole.update(f"{line}\n".encode())
    return whole.hexdigest()


if __name__ == "__main__":
    if sys.argv[1:] == ["--record"]:
        RECORD.write_text(f"{digest()}\n")
    elif not (RECORD.is_file() and RECORD.read_text().strip() == digest()):
        sys.exit(1)
