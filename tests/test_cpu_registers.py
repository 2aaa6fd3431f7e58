"""The inner loops of the CPU kernels keep their vectors in registers: read in the machine code.

A vector that is written to the stack and read back in every turn of a loop costs more than the
arithmetic beside it. No value shows it. Straight-line code of long transforms has more values than
there are registers; `benchmarks.cpu_count` counts what it puts on the stack.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.cpu_count import listing
from benchmarks.sass.launches import package_build
from tcur_kernels.operators import native

pytestmark = pytest.mark.skipif(
    shutil.which("objdump") is None or platform.machine() != "x86_64",
    reason="no objdump, or not x86-64",
)
#: Source -> its functions, where they are not inlined into another, whose inner loops multiply.
SOURCES = {
    "materialize": "product_planes|complex_bin|real_bin|lateral_core_products",
    "core_grad_dense": "adjoint_planes|adjoint_bin",
    "tokens": "bin_gradients?|bin_products|token_products|sum_turned|apply_core",
    "transforms": r"inverse_dft|forward_dft|dft_\w+",
}


@pytest.fixture(scope="module")
def functions():
    return listing.read(native.cpu_library())


def spilled(function):
    """Instructions of the inner arithmetic loops that move a vector to or from the stack."""
    registers = function.stack_registers()
    return [
        one
        for body in function.arithmetic_loops()
        for one in body
        if one.is_vector and one.memory is not None and one.memory.base in registers
    ]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_vectors_of_inner_loops_stay_in_registers(functions, isa, source):
    if isa not in native.compiled_isas():
        pytest.skip(f"the library has no {isa}")
    pattern = re.compile(rf"tcur::{isa}::({SOURCES[source]})[<(]")
    ours = [one for one in functions if pattern.search(one.name.partition("(")[0] + "(")]
    most = [sum(i.is_fma for i in body) for one in ours for body in one.arithmetic_loops()]
    assert max(most) >= 8  # the loops were found: not renamed, not stripped
    found = {one.name: [f"{i.address:x}" for i in spilled(one)] for one in ours if spilled(one)}
    assert not found


@pytest.mark.parametrize("accumulators", [8, 20])
def test_a_loop_with_too_many_sums_is_found(accumulators, tmp_path):
    """16 registers: eight sums are no reason to use the stack, 20 are."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "sums.cpp"
    numbers = range(accumulators)
    source.write_text(
        "typedef float Vec __attribute__((vector_size(32)));\n"
        '__attribute__((target("avx2,fma")))\n'
        "void sums(const float* a, const Vec* x, long n, Vec* out) {\n"
        + "".join(f"Vec s{i} = out[{i}];\n" for i in numbers)
        + f"for (long k = 0; k < n; ++k, a += {accumulators}) {{\n"
        + "".join(f"s{i} += a[{i}] * x[k];\n" for i in numbers)
        + "}\n"
        + "".join(f"out[{i}] = s{i};\n" for i in numbers)
        + "}\n"
    )
    # The package's own flags, but for what they say about torch.
    flags = [one for one in package_flags() if not one.startswith("-D")]
    command = [compiler, *flags, "-c", str(source), "-o", str(tmp_path / "sums.o")]
    subprocess.run(command, check=True)
    (function,) = listing.read(tmp_path / "sums.o")
    (body,) = function.arithmetic_loops()
    assert sum(one.is_fma for one in body) >= accumulators
    assert bool(spilled(function)) == (accumulators > 16)


def package_flags():
    """Options of the compiler in setup.py."""
    root = os.getcwd()
    os.chdir(Path(__file__).parent.parent)  # setup.py lists sources relative to itself
    try:
        return package_build().cpu_extension().extra_compile_args
    finally:
        os.chdir(root)
