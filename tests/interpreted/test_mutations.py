"""Kernels broken on purpose: the checks of the other files must catch each of them.

A mutant is the source of a kernel with one thing changed, loaded beside the real one.
"""

import importlib.util
import linecache
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import tcur_kernels.operators.triton
from cases import make_case
from checks import check
from tcur_kernels.operators.contract import CoreGradDense, CurLinear, MaterializeOut
from tcur_kernels.operators.triton import materialize

SOURCE = Path(tcur_kernels.operators.triton.__file__).parent


def mutant(tmp_path, module, old, new):
    text = (SOURCE / f"{module}.py").read_text()
    assert text.count(old) == 1, f"{old!r} is found {text.count(old)} times in {module}"
    path = tmp_path / f"{module}_mutant.py"
    path.write_text(text.replace(old, new))
    linecache.checkcache(str(path))
    name = f"tcur_kernels.operators.triton.{module}_mutant"
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    try:
        spec.loader.exec_module(loaded)
    finally:
        del sys.modules[name]
    return loaded


def run_materialize(module, n3):
    """As few programs as there can be, so that one walks over several tiles."""
    case = make_case(n3, 18, 35, 3)

    def run(weights, lateral_hat, horizontal_hat, core, scale, out_dtype):
        out = torch.empty(n3, 18, 35, dtype=out_dtype)
        module.run(MaterializeOut(weights, lateral_hat, horizontal_hat, core, scale, out), "ieee")
        return out

    args = ([case.weight], *case.packed, case.core, 0.5, torch.float32)
    with mock.patch.object(module, "ENOUGH", 1):
        check("materialize", *args, run=run)


def run_mix(module, n3):
    with mock.patch.object(materialize, "mixed", module.mixed):
        run_materialize(materialize, n3)


def run_core_grad_dense(module, n3):
    case = make_case(n3, 18, 35, 3)
    args = (torch.randn_like(case.weight), *case.packed)
    check("core_grad_dense", *args, run=lambda *given: module.run(CoreGradDense(*given), "ieee"))


def run_blocks(module, n3):
    """Diagonal blocks on their own: z and p are at hand."""
    case = make_case(n3, 18, 35, 3)
    x, grad_y, lateral_hat = torch.randn(300, 35), torch.randn(300, 18), case.packed[0]
    z = x @ case.packed[1].T

    def run(z, grad_y, lateral_hat, horizontal_hat, n3, first, slices):
        p = grad_y @ lateral_hat
        return module.core_gradient(p, z, n3, 3, first, slices, "cpu", "3xtf32")

    check("core_grad_tokens", z, grad_y, lateral_hat, None, n3, n3 - 1, 1, run=run)

    def run_packed(packed, scale):
        total = module._sum_of_partials(packed, "cpu")
        return module.core_of_partials(total[None], scale, "cpu", "3xtf32")

    check("core_of_packed", torch.randn(17, n3, 3, 3), 0.7, run=run_packed)


def run_cur_linear(module, n3, transposed=False):
    case = make_case(n3, 18, 35, 3)
    x = torch.randn(40, 18 if transposed else 35)
    args = (x, None, None, *case.packed, case.core, n3 - 1, 1, 0.5, transposed)
    check("cur_linear", *args, run=lambda *given: module.run(CurLinear(*given), "ieee"))


PHASE, CONJUGATE, TILE = "a wrong phase", "a missing conjugate", "an unwritten tile"
MUTATIONS = [
    # materialize: the form for few slices, the dense one, the folded one
    (PHASE, "materialize", "k = (p + 1) // 2\n        imag", "k = p // 2\n        imag", 3),
    (CONJUGATE, "materialize", "imag, -cos, cos)[None", "imag, cos, cos)[None", 3),
    (PHASE, "materialize", "n3 + l[:, None], mask", "n3 + (n3 - 1 - l)[:, None], mask", 12),
    (CONJUGATE, "materialize", "| imag[:, None], 1.0, -1.0", "| imag[:, None], 1.0, 1.0", 12),
    (PHASE, "materialize", "tl.reshape(even - odd, [", "tl.reshape(even + odd, [", 18),
    (CONJUGATE, "materialize", "dot(left * sign[None", "dot(left * (sign * sign)[None", 18),
    (CONJUGATE, "mix", "u_im -= tl.sum", "u_im += tl.sum", 18),
    (TILE, "materialize", "(i < n1 - i0)[:, None] &", "(i < 16 - i0)[:, None] &", 18),
    (TILE, "materialize", "MIDDLE else half", "n3 else half", 18),
    (TILE, "materialize", "tl.program_id(1) == 0, n3, 0)", "n3 < 0, n3, 0)", 64),
    (TILE, "materialize", "paired = (l > 0)", "paired = (l > 1)", 18),
    (TILE, "materialize", "[(col_blocks * tiles,", "[(col_blocks * tiles - 1,", 12),
    (TILE, "materialize", "first * walk + walk, dis", "first * walk + 1, dis", 18),
    # core_grad_dense
    (PHASE, "core_grad_dense", "other_sin = tl.where(imag, sin, -sin)", "other_sin = sin", 3),
    (PHASE, "core_grad_dense", "near - far, [", "near + far, [", 18),
    (CONJUGATE, "core_grad_dense", "dot(-g_im, r_im", "dot(g_im, r_im", 18),
    (TILE, "core_grad_dense", "mask = (l <= half)", "mask = (l < half)", 18),
    # blocks
    (PHASE, "blocks", "(k * (slice_index + s)) % n3", "(k * s) % n3", 5),
    (CONJUGATE, "blocks", "tl.trans(-l_im), r_im", "tl.trans(l_im), r_im", 5),
    (TILE, "blocks", "tl.minimum(start + SPAN, rows)", "tl.minimum(start + 32, rows)", 5),
    (TILE, "blocks", "range(0, blocks, ROWS)", "range(0, ROWS, ROWS)", 5),
    (CONJUGATE, "blocks", "imag[None, :], -sin, cos", "imag[None, :], sin, cos", 5),
    # cur_linear
    (PHASE, "cur_linear", "(k * (l + n3 - m)) % n3", "(k * (n3 - m)) % n3", 5),
    (CONJUGATE, "cur_linear", "dot(-z_im, b, m_re", "dot(z_im, b, m_re", 5),
    (TILE, "cur_linear", "inside = within < tokens", "inside = within < tokens - 1", 5),
]  # fmt: skip
RUN = {
    "materialize": run_materialize,
    "mix": run_mix,
    "core_grad_dense": run_core_grad_dense,
    "blocks": run_blocks,
    "cur_linear": run_cur_linear,
}


@pytest.mark.parametrize(("what", "module", "old", "new", "n3"), MUTATIONS)
def test_a_broken_kernel_is_caught(tmp_path, what, module, old, new, n3):
    with pytest.raises(AssertionError, match="exceeds the bound"):
        RUN[module](mutant(tmp_path, module, old, new), n3)


@pytest.mark.parametrize(("module", "n3"), sorted({(m[1], m[4]) for m in MUTATIONS}))
def test_the_whole_kernel_passes_the_same_check(module, n3):
    RUN[module](getattr(tcur_kernels.operators.triton, module), n3)
