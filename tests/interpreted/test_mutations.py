"""Kernels broken on purpose, some of the table `triton_table`: the checks must catch each of them.

`python tests/pymutants/pymutants.py --language triton` breaks them in every way that the table has,
and lets the tests of `conformance` look.
"""

from unittest import mock

import pytest
import torch

from cases import make_case
from checks import check
from swapping import broken
from tcur_kernels.operators.contract import CoreGradDense, CurLinear, MaterializeOut
from tcur_kernels.operators.triton import blocks, core_grad_dense, cur_linear, materialize
from triton_mutants import row


def run_materialize(n3, n1=18, n2=35, enough=1):
    """By default as few programs as there can be, so that one walks over several tiles."""
    case = make_case(n3, n1, n2, 3)

    def run(weights, lateral_hat, horizontal_hat, core, scale, out_dtype):
        out = torch.empty(n3, n1, n2, dtype=out_dtype)
        given = MaterializeOut(weights, lateral_hat, horizontal_hat, core, scale, out)
        materialize.run(given, "ieee")
        return out

    args = ([case.weight], *case.packed, case.core, 0.5, torch.float32)
    with mock.patch.object(materialize, "ENOUGH", enough):
        check("materialize", *args, run=run)


def test_programs_that_walk_share_the_tiles():
    """Two programs for four tiles, one below the other."""
    run_materialize(18, n1=50, n2=5, enough=2)


def run_core_grad_dense(n3):
    case = make_case(n3, 18, 35, 3)
    args = (torch.randn_like(case.weight), *case.packed)
    run = core_grad_dense.run
    check("core_grad_dense", *args, run=lambda *given: run(CoreGradDense(*given), "ieee"))


def run_blocks(n3):
    """Diagonal blocks on their own: z and p are at hand."""
    case = make_case(n3, 18, 35, 3)
    x, grad_y, lateral_hat = torch.randn(300, 35), torch.randn(300, 18), case.packed[0]
    z = x @ case.packed[1].T

    def run(z, grad_y, lateral_hat, horizontal_hat, n3, first, slices):
        p = grad_y @ lateral_hat
        return blocks.core_gradient(p, z, n3, 3, first, slices, "cpu", "3xtf32")

    check("core_grad_tokens", z, grad_y, lateral_hat, None, n3, n3 - 1, 1, run=run)

    def run_packed(packed, scale):
        total = blocks._sum_of_partials(packed, "cpu")
        return blocks.core_of_partials(total[None], scale, "cpu", "3xtf32")

    check("core_of_packed", torch.randn(17, n3, 3, 3), 0.7, run=run_packed)


def run_cur_linear(n3, transposed=False):
    case = make_case(n3, 18, 35, 3)
    x = torch.randn(40, 18 if transposed else 35)
    args = (x, None, None, *case.packed, case.core, n3 - 1, 1, 0.5, transposed)
    check("cur_linear", *args, run=lambda *given: cur_linear.run(CurLinear(*given), "ieee"))


#: Module, function, what it becomes, and of tubes of how many slices.
QUICK = [
    ("materialize", "_direct_kernel", "k = (p + 1) // 2\n", "k = p // 2\n", 3),
    ("materialize", "_direct_kernel", "imag, -cos, cos)[None", "imag, cos, cos)[None", 3),
    (
        "materialize",
        "_dense_kernel",
        "n3 + l[:, None], mask",
        "n3 + (n3 - 1 - l)[:, None], mask",
        12,
    ),
    ("materialize", "_dense_kernel", "imag[:, None], 1.0, -1.0", "imag[:, None], 1.0, 1.0", 12),
    (
        "materialize",
        "_folded_tile",
        "tl.reshape(even - odd, [",
        "tl.reshape(even + odd * 1.0, [",
        18,
    ),
    ("materialize", "_folded_tile", "dot(left * sign[None", "dot(left * (sign * sign)[None", 18),
    ("mix", "_mix_kernel", "u_im -= tl.sum", "u_im += tl.sum", 18),
    ("materialize", "_finish", "(i < n1 - i0)[:, None] &", "(i < 16 - i0)[:, None] &", 18),
    ("materialize", "_folded_tile", "MIDDLE else half", "n3 else half", 18),
    ("materialize", "_folded_tile", "tl.program_id(1) == 0, n3, 0)", "n3 < 0, n3, 0)", 64),
    ("materialize", "_folded_tile", "paired = (l > 0)", "paired = (l > 1)", 18),
    ("materialize", "run", "[(col_blocks * tiles,", "[(col_blocks * tiles - 1,", 12),
    ("materialize", "_folded_kernel", "first * walk + walk, dis", "first * walk + 1, dis", 18),
    (
        "core_grad_dense",
        "_direct_kernel",
        "other_sin = tl.where(imag, sin, -sin)",
        "other_sin = sin",
        3,
    ),
    ("core_grad_dense", "_folded_kernel", "near - far, [", "near + far, [", 18),
    ("core_grad_dense", "_folded_kernel", "dot(-g_im, r_im", "dot(g_im, r_im", 18),
    ("core_grad_dense", "_folded_kernel", "mask = (l <= half)", "mask = (l < half)", 18),
    ("blocks", "diagonal_blocks_kernel", "(k * (slice_index + s)) % n3", "(k * s) % n3", 5),
    ("blocks", "diagonal_blocks_kernel", "tl.trans(-l_im), r_im", "tl.trans(l_im), r_im", 5),
    (
        "blocks",
        "diagonal_blocks_kernel",
        "tl.minimum(start + SPAN, rows)",
        "tl.minimum(start + 32, rows)",
        5,
    ),
    ("blocks", "sum_of_partials_kernel", "range(0, blocks, ROWS)", "range(0, ROWS, ROWS)", 5),
    ("blocks", "core_of_partials_kernel", "imag[None, :], -sin, cos", "imag[None, :], sin, cos", 5),
    ("cur_linear", "_turn_kernel", "(k * (l + n3 - m)) % n3", "(k * (n3 - m)) % n3", 5),
    ("cur_linear", "_apply_kernel", "dot(-z_im, b, m_re", "dot(z_im, b, m_re", 5),
    ("cur_linear", "_apply_kernel", "inside = within < tokens", "inside = within < tokens - 1", 5),
]
RUN = {
    "materialize": run_materialize,
    "mix": run_materialize,
    "core_grad_dense": run_core_grad_dense,
    "blocks": run_blocks,
    "cur_linear": run_cur_linear,
}


@pytest.mark.parametrize(("module", "function", "old", "new", "n3"), QUICK)
def test_a_broken_kernel_is_caught(tmp_path, module, function, old, new, n3):
    mutant = row(module, function, old, new)
    with (
        broken(mutant.path, mutant.text, tmp_path / f"{module}.py"),
        pytest.raises(AssertionError, match="exceeds the bound"),
    ):
        RUN[module](n3)


@pytest.mark.parametrize(("module", "n3"), sorted({(m[0], m[4]) for m in QUICK}))
def test_the_whole_kernel_passes_the_same_check(module, n3):
    RUN[module](n3)


#: A mask that is missing reads or writes beside the tensors, which `memory` sees.
UNMASKED = [
    ("blocks", "sum_of_partials_kernel", "axis=0), mask=e < size", "axis=0)", 5),
    (
        "core_grad_dense",
        "_folded_kernel",
        "(i < n1)[:, None] & (j < n2)[None, :]",
        "(i < n1)[:, None]",
        18,
    ),
]


@pytest.mark.parametrize(("module", "function", "old", "new", "n3"), UNMASKED)
def test_a_missing_mask_is_seen(tmp_path, module, function, old, new, n3):
    mutant = row(module, function, old, new)
    with (
        broken(mutant.path, mutant.text, tmp_path / f"{module}.py"),
        pytest.raises(Exception, match="beside every tensor of the launch"),
    ):
        RUN[module](n3)
