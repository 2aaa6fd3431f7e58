"""Mutants of the kernels for CPUs and of what they share with those for GPUs.

Left out is what no test can see. Beyond the last row and column of a tile kernels compute numbers
that nobody reads. Sizes of tiles, prefetches and writes past the caches change no number. What
waits for AVX-512 alone is not compiled here.
"""

from .common import CODELETS, PLACES, TOKEN_PRODUCTS, TUBES
from .cpu_slices import DENSE, MATERIALIZE, TRANSFORMS, W_EFF_TILES
from .cpu_tokens import CONVERT, CORES_OF_TOKENS, FACTORS, GRADIENTS, HOST, LINEAR, PACKED, TOKENS

#: Tests that `make test` runs on these kernels, and which of their items are on them.
TESTS = (
    "conformance",
    "test_isa.py",
    "test_caches.py",
    "test_token_kernels.py",
    "test_token_cores.py",
    "test_w_eff.py",
    "test_functional.py",
)
SELECTED = "not reference and not cudahost"

#: Files below csrc/cpu and csrc/common without a kernel, and why.
NO_KERNEL = {
    "common/arguments.h": "lists of arguments",
    "common/check.h": "what is refused; calls with wrong arguments are fuzzed",
    "common/dtypes.h": "names of dtypes",
    "common/elements.h": "names of dtypes",
    "common/glibc.cpp": "a variable of the C library",
    "common/host_device.h": "words of the languages",
    "common/integers.h": "four lines, which every kernel uses",
    "common/token_rows.h": "a struct",
    "cpu/caches.cpp": "the size of a cache, which changes no number",
    "cpu/caches.h": "declarations",
    "cpu/compiled_kernels.h": "declarations",
    "cpu/facts.cpp": "facts about the library",
    "cpu/isa.cpp": "the choice of an instruction set",
    "cpu/isa.h": "declarations",
    "cpu/kernel_table.h": "a table of functions",
    "cpu/kernels.h": "declarations",
    "cpu/plans.h": "declarations",
    "cpu/simd.h": "words of the languages",
}

KERNELS = {
    "tiles of W_eff": W_EFF_TILES,
    "materialize": MATERIALIZE,
    "transforms": TRANSFORMS,
    "core_grad_dense": DENSE,
    "cores on tokens": TOKENS,
    "cur_linear": LINEAR,
    "core_grad_tokens": GRADIENTS,
    "cores of tokens": CORES_OF_TOKENS,
    "two factors": FACTORS,
    "conversions": CONVERT,
    "core_of_packed": PACKED,
    "host": HOST,
    "codelets": CODELETS,
    "tubes": TUBES,
    "slice places": PLACES,
    "token products": TOKEN_PRODUCTS,
}

#: The functions that are compiled for every instruction set, and whose mutants break them.
FUNCTIONS = {
    "inverse_dft": "transforms",
    "forward_dft": "transforms",
    "materialize": "materialize",
    "core_grad_dense": "core_grad_dense",
    "transform_core": "cores on tokens",
    "apply_core": "cores on tokens",
    "core_products": "core_grad_tokens",
    "add_update": "cores on tokens",
}

#: Which tests come first: those that use the kernel.
CHECKS = {
    "tiles of W_eff": "materialize",
    "materialize": "materialize",
    "transforms": r"test_isa|tables|(materialize|core_grad_dense)-(17|47|94)\b",
    "core_grad_dense": "core_grad_dense",
    "cores on tokens": "cur_linear",
    "cur_linear": "cur_linear",
    "core_grad_tokens": "core_grad_tokens",
    "cores of tokens": "ids|test_token_cores",
    "two factors": "test_isa|materialize-(12|48)|core_grad_dense-(12|48)",
    "conversions": "test_isa|materialize",
    "core_of_packed": "core_of_packed",
    "codelets": "test_isa|materialize|core_grad_dense",
    "tubes": "test_isa|materialize|core_grad_dense|core_grad_tokens",
    "slice places": "materialize",
    "token products": "cur_linear|core_grad_tokens",
}
