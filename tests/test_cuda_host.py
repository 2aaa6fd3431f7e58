"""The CUDA kernels' own source, built for the host: their sizes, and the order of threads.

What every backend is asked is in `conformance`, operators on tokens in `test_cuda_host_tokens.py`.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cuda_host
import oracle
from cases import counts_of, make_case, side_by_side, slices_of
from cuda_host import operator, shifted
from tcur_kernels.operators import cost, reference
from tolerance import PROMISE, assert_close, relative_error

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module", autouse=True)
def host():
    return cuda_host.load()


def check_both_transforms(case):
    """`materialize` and `core_grad_dense` against float64."""
    double = case.double()
    exact = reference.materialize(double.weight, *double.spectra, double.core, 0.5)
    same = reference.materialize(case.weight, *case.spectra, case.core, 0.5)
    args = (*case.packed, case.core, 0.5, torch.float32)
    assert_close(operator("materialize")([case.weight], *args), same, exact)
    exact = reference.core_grad_dense(double.weight, *double.spectra)
    same = reference.core_grad_dense(case.weight, *case.spectra)
    assert_close(operator("core_grad_dense")(case.weight, *case.packed), same, exact)


@pytest.mark.parametrize(
    ("n3", "n1", "n2", "rank"),
    [
        (1, 1030, 1030, 1),
        (96, 17, 20, 9),
        (96, 9, 20, 3),
        (128, 9, 20, 9),
        # By the matrix: 16, 32, 64 and 128 lines, and then two and three launches of them.
        (17, 9, 70, 2),
        (47, 17, 40, 9),
        (127, 9, 20, 3),
        (251, 9, 10, 2),
        (256, 9, 9, 2),
        (600, 3, 5, 1),
    ],
)
def test_every_size_of_a_tile(n3, n1, n2, rank):
    """From wide tiles of few slices to narrow ones of as many as there may be."""
    check_both_transforms(make_case(n3, n1, n2, rank))


@pytest.mark.parametrize("n3", [5, 12])
def test_blocks_that_take_several_tiles(n3):
    """More tiles than there are to be blocks, so that each adds up over a few."""
    check_both_transforms(make_case(n3, 1700, 264, 1))


@pytest.mark.parametrize("n3", [n3 for n3 in range(1, 148) if cost.has_codelets(n3)] + [146, 147])
def test_every_length_of_two_factors(n3):
    """Each outer codelet with each inner one, both directions; and the lengths behind them."""
    check_both_transforms(make_case(n3, 3, 7, 1))


@pytest.mark.parametrize("n3", [n3 for n3 in range(1, 145) if cost.has_tubes(n3)])
def test_every_length_with_kernels_of_its_own(n3):
    """Tiles that are not full; ranks that are no whole quads, one beyond what one launch takes."""
    check_both_transforms(make_case(n3, 9, 36, 9 if n3 % 3 == 0 else 3))


@pytest.mark.parametrize("rank", [1, 4, 5, 12, 32, 33])
@pytest.mark.parametrize("n3", [5, 12, 48, 64])
def test_every_rank_with_kernels_of_its_own(n3, rank):
    """Up to 32, and the first one for tensor cores."""
    check_both_transforms(make_case(n3, 33, 68, rank))


@pytest.mark.parametrize(
    "n3", [12, 48, 128, 144, 257, pytest.param(2048, marks=pytest.mark.matrix)]
)
def test_devices_with_little_shared_memory(n3):
    """As of compute capability 8.6: what needs more goes by the kernels for any length.

    No length that CUDA takes is refused there. Operators on tokens do the same as elsewhere.
    """
    case = make_case(n3, 17, 68, 8) if n3 < 200 else make_case(n3, 3, 4, 1)
    adapters = 20 if n3 < 200 else 1
    host = cuda_host.load()
    elsewhere = cuda_host.on_tokens(case, adapters)
    host.tcur_host_shared(99 * 1024)
    try:
        check_both_transforms(case)
        for ours, wanted in zip(cuda_host.on_tokens(case, adapters), elsewhere, strict=True):
            assert torch.isfinite(ours).all()
            assert torch.equal(ours, wanted)
    finally:
        host.tcur_host_shared(227 * 1024)


@pytest.mark.parametrize("n3", [1, 12, 47])
@pytest.mark.parametrize("rank", [3, 9, 33])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_rounded_operands_keep_their_promise(n3, rank, precision):
    """And where tensor cores multiply they are rounded: the error is not that of fp32."""
    case = make_case(n3, 34, 36, rank)
    packed = case.packed
    if precision == "bf16":
        packed = tuple(factor.bfloat16() for factor in packed)
    core = case.core.clone().requires_grad_()
    product = operator("materialize", precision)([], *packed, core, 1.0, torch.float32)
    product.backward(case.weight)
    out = torch.empty_like(product)
    operator("materialize_out", precision)([], *packed, case.core, 1.0, out=out)
    assert torch.equal(out, product)
    double = case.double()
    exact = oracle.cur_product(case.lateral, case.core, case.horizontal)
    exact_grad = reference.core_grad_dense(double.weight, *double.spectra)
    for actual, expected in ((product, exact), (core.grad, exact_grad)):
        error = relative_error(actual, expected)
        assert error <= PROMISE[precision]
        by_registers = cost.has_tubes(n3) and rank <= 32 and precision == "tf32"
        assert (error > PROMISE["ieee"]) != by_registers


def check_side_by_side(case, out_dtype=torch.float32, given=None):
    """W_eff from matrices of several slices: within the bound, and the bits of single slices."""
    n3, n1, n2 = case.weight.shape
    counts, double = counts_of(n3), case.double()
    exact = oracle.w_eff(double.weight, double.lateral, double.core, double.horizontal, 0.5)
    torch_same = reference.materialize(case.weight, *case.spectra, case.core, 0.5).to(out_dtype)
    out = torch.full((case.weight.numel(),), float("nan"), dtype=out_dtype)
    matrices = given or side_by_side(case.weight, counts)
    operator("materialize_out")(matrices, *case.packed, case.core, 0.5, out=out)
    w_eff = slices_of(out, counts, n1, n2)
    assert_close(w_eff, torch_same, exact)
    if given is None:  # else by another kernel, where addresses ask for it
        args = (*case.packed, case.core, 0.5, out_dtype)
        assert torch.equal(w_eff, operator("materialize")([case.weight], *args))


@pytest.mark.parametrize(
    ("n3", "n1", "n2", "rank"),
    [
        # By kernels of their own: each width of a thread, one row, edges of tiles.
        *[(n3, 9, 36, 3) for n3 in (2, 5, 12, 16, 48, 64, 144)],
        (12, 1, 4, 1),
        (48, 33, 68, 9),
        # By codelets: rows that are no multiple of four, a length or rank without such a kernel.
        *[(n3, 9, 37, 3) for n3 in (2, 5, 12, 48, 144)],
        (18, 9, 36, 3),
        (12, 33, 68, 33),
        # By the matrix, in one launch and in several.
        *[(n3, 9, n2, 2) for n3 in (17, 47, 146) for n2 in (20, 21)],
        (256, 5, 8, 2),
        (257, 5, 9, 2),
    ],
)
def test_side_by_side(n3, n1, n2, rank):
    check_side_by_side(make_case(n3, n1, n2, rank))


@pytest.mark.parametrize("n3", [12, 17], ids=["codelet", "matrix"])
def test_side_by_side_at_odd_addresses(n3):
    case = make_case(n3, 9, 36, 3)
    matrices = side_by_side(case.weight, counts_of(n3))
    check_side_by_side(case, given=[shifted(matrices[0]), *matrices[1:]])


#: What takes long; `.ci/cuda_checks.py` has them, too, where sources have changed.
LARGE = [s for s in cuda_host.ORDERED if s[0] * s[1] > 10_000 or s[0] > 200]


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(s, marks=pytest.mark.matrix if s in LARGE else ()) for s in cuda_host.ORDERED],
    ids=str,
)
def test_the_order_of_threads_makes_no_difference(host, sizes, monkeypatch):
    monkeypatch.setattr(cuda_host, "ORDERED", (sizes,))
    assert cuda_host.orders_agree(host)


def test_a_missing_barrier_is_found(tmp_path):
    """The kernel of the products without the barrier between writing and reading its sums."""
    shutil.copytree(cuda_host.SOURCES, tmp_path / "csrc")
    source = tmp_path / "csrc" / "cuda" / "products.cu"
    text = source.read_text()
    assert text.count("  __syncthreads();\n") == 1
    source.write_text(text.replace("  __syncthreads();\n", ""))
    library = cuda_host.build(tmp_path / "build", tmp_path / "csrc")
    program = [sys.executable, str(Path(cuda_host.__file__)), str(library)]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert result.stdout == "differ\n", result.stderr
