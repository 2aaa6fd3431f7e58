"""Says whether the kernels for GPUs are those whose tests have passed.

Without a GPU their tests compile, interpret and emulate, which is a quarter of the time of all
tests. They depend on the kernels, on what calls these, and on the tests alone. So `make
test-kernels` records what has passed, in ``kernels_checked.txt``, and `make test` repeats it for
anything else. The exit status is 0 if they have passed. With ``--record`` it is recorded that they
have.
"""

import sys

import cuda_sources

RECORD = cuda_sources.ROOT / ".ci" / "kernels_checked.txt"
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
    modules = tuple(f"tests/test_{name}.py" for name in TESTS)
    return cuda_sources.digest_of(FOLDERS, (*FILES, *modules), PINS)


if __name__ == "__main__":
    if sys.argv[1:] == ["--record"]:
        RECORD.write_text(f"{digest()}\n")
    elif not (RECORD.is_file() and RECORD.read_text().strip() == digest()):
        sys.exit(1)
