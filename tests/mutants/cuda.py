"""Mutants of the kernels for GPUs, built for the host by `cuda_host`.

Barriers that are missing are not here: `.ci/cuda_checks.py` leaves out each of them in turn. Nor is
what the host cannot tell: what is prefetched, banks of shared memory, addresses that are not
aligned, and numbers written behind a tensor, for which the same program has a sanitizer. What these
kernels share with those for CPUs is in `cpu`.
"""

from .cuda_kernels import (
    ADD,
    APPLY,
    CODELETS,
    CORE,
    MATRIX,
    MIX,
    ORDER,
    PACKED,
    PREPARE,
    PRODUCTS,
    PROJECT,
    PROJECT_MATRIX,
    PROJECT_TUBES,
    SPECTRUM,
    TUBES,
)
from .cuda_shared import DFT, DFT_MATRIX, FRAGMENTS, GRID, IN_REGISTERS, LANES, TILE

TESTS = ("conformance", "test_cuda_host.py", "test_cuda_host_tokens.py")
SELECTED = "cudahost or test_cuda_host"
#: As in .ci/cuda_checks.py: kernels of their own for three lengths only.
FLAGS = ("-O1", "-DTCUR_LENGTHS=5,12,48")

#: Files below csrc/cuda without arithmetic of a kernel, and why.
NO_KERNEL = {
    "cuda/architectures.cu": "a name",
    "cuda/core_grad_dense.h": "declarations",
    "cuda/launch.h": "launches; without them nothing runs",
    "cuda/operators.h": "checks of arguments; calls with wrong arguments are fuzzed",
    "cuda/prepare.h": "declarations",
    "cuda/products.h": "declarations",
    "cuda/row_order.h": "declarations",
    **{f"cuda/core_grad_dense_tubes_{part}.cu": "an instantiation" for part in range(4)},
    **{f"cuda/materialize_tubes_{part}.cu": "an instantiation" for part in range(4)},
}

#: By the functions that are launched, and below them what several share.
KERNELS = {
    "mix_kernel": MIX,
    "materialize_kernel": CODELETS,
    "materialize_matrix_kernel": MATRIX,
    "materialize_tubes_kernel": TUBES,
    "prepare_kernel": PREPARE,
    "project_kernel": PROJECT,
    "project_matrix_kernel": PROJECT_MATRIX,
    "project_tubes_kernel": PROJECT_TUBES,
    "apply_kernel": APPLY,
    "add_kernel": ADD,
    "products_kernel": PRODUCTS,
    "spectrum_kernel": SPECTRUM,
    "core_kernel": CORE,
    "packed_kernel": PACKED,
    "order_kernel": ORDER,
    "tile.h": TILE,
    "lanes.h": LANES,
    "token_grid.h": GRID,
    "fragments.h": FRAGMENTS,
    "dft.h": DFT,
    "dft_matrix.h": DFT_MATRIX,
    "tubes_in_registers.h": IN_REGISTERS,
}

#: Which tests come first: those that use the kernel.
CHECKS = {
    "mix_kernel": "materialize",
    "materialize_kernel": "materialize",
    "materialize_matrix_kernel": "materialize|every_size_of_a_tile",
    "materialize_tubes_kernel": "materialize|kernels_of_its_own|side_by_side",
    "prepare_kernel": "materialize|kernels_of_its_own",
    "project_kernel": "core_grad_dense",
    "project_matrix_kernel": "core_grad_dense|every_size_of_a_tile",
    "project_tubes_kernel": "core_grad_dense|kernels_of_its_own",
    "apply_kernel": "cur_linear",
    "add_kernel": "cur_linear",
    "products_kernel": "core_grad_tokens",
    "spectrum_kernel": "cur_linear|materialize",
    "core_kernel": "core_of_packed|core_grad",
    "packed_kernel": "packed",
    "order_kernel": "ids|many_cores",
    "tile.h": "materialize|core_grad_dense",
    "lanes.h": "materialize|core_grad_dense",
    "token_grid.h": "core_grad_tokens|cur_linear",
    "fragments.h": "materialize|core_grad_dense",
    "dft.h": "materialize|core_grad_dense",
    "dft_matrix.h": "every_size_of_a_tile|materialize|core_grad_dense",
    "tubes_in_registers.h": "kernels_of_its_own|materialize|cur_linear|core_grad",
}
