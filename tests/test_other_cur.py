"""Matrix CUR, mode-wise CUR beside Tucker, and error against rank."""

import sys

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tucker

import tcur_kernels as tcur
from models import Tiny
from tcur_kernels.adapters.curves import model_curves, plot_curves
from tcur_kernels.adapters.plan import make_plan
from tcur_kernels.decompose import HeldSlices, error_curve
from tolerance import relative_error

SEEDS = st.integers(0, 2**32 - 1)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def of_multilinear_rank(shape, ranks, seed):
    a = normal(*ranks, seed=seed)
    for axis, (size, rank) in enumerate(zip(shape, ranks, strict=True)):
        a = torch.tensordot(normal(size, rank, seed=seed + axis + 1), a, ([1], [axis]))
        a = a.movedim(0, axis)
    return a


def unfoldings(a):
    return [a.movedim(axis, 0).flatten(1) for axis in range(3)]


def test_matrix_cur_by_the_book():
    a = normal(20, 15)
    u, _, vh = torch.linalg.svd(a, full_matrices=False)
    d = tcur.matrix_cur(a, 4)
    columns = vh[:4].square().sum(0).topk(4).indices.sort().values
    rows = u[:, :4].square().sum(1).topk(4).indices.sort().values
    assert torch.equal(d.columns, columns)
    assert torch.equal(d.rows, rows)
    core = torch.linalg.pinv(a[:, columns]) @ a @ torch.linalg.pinv(a[rows])
    assert relative_error(d.core, core) < 1e-12
    expected = a[:, columns] @ core @ a[rows]
    assert relative_error(d.reconstruct(), expected) < 1e-12
    assert d.relative_error(a) == pytest.approx(relative_error(expected, a))
    drawn = tcur.matrix_cur(a, 4, generator=torch.Generator().manual_seed(3), core="zero")
    assert drawn.relative_error(a) == 1
    assert (drawn.lateral.shape, drawn.core.shape) == ((20, 4), (4, 4))
    low = normal(20, 3) @ normal(3, 15, seed=1)
    assert tcur.matrix_cur(low, 3).relative_error(low) < 1e-12
    with pytest.raises(ValueError, match=r"a: expected \[n1, n2\], got \[2, 3, 4\]"):
        tcur.matrix_cur(torch.ones(2, 3, 4), 1)
    with pytest.raises(TypeError, match=r"a: expected a torch\.Tensor, got list"):
        tcur.matrix_cur([[1.0]], 1)
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"a: expected a dense tensor, got layout torch\.sparse"),
    ):
        tcur.matrix_cur(torch.ones(3, 4).to_sparse(), 1)
    with pytest.raises(ValueError, match="rank: expected 1 to"):
        tcur.matrix_cur(a, 16)


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    extra=st.integers(0, 1),
    seed=st.integers(0, 10**6),
    draws=st.booleans(),
)
def test_modewise_cur_is_exact_where_its_fibres_span(ranks, extra, seed, draws):
    a = of_multilinear_rank((5, 6, 7), ranks, seed)
    generator = torch.Generator().manual_seed(seed) if draws else None
    d = tcur.modewise_cur(a, [rank + extra for rank in ranks], generator)
    spans = all(
        int(torch.linalg.matrix_rank(c, rtol=1e-8)) == int(torch.linalg.matrix_rank(m, rtol=1e-8))
        for c, m in zip(d.factors, unfoldings(a), strict=True)
    )
    error = d.relative_error(a)
    if spans:
        assert error < 1e-5
    else:
        assert error > 1e-9


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7)),
    seed=SEEDS,
    draws=st.booleans(),
)
def test_modewise_cur_takes_fibres_and_is_bounded_by_its_projections(ranks, seed, draws):
    a = normal(5, 6, 7, seed=seed)
    generator = torch.Generator().manual_seed(seed) if draws else None
    d = tcur.modewise_cur(a, ranks, generator)
    bound = 0.0
    for factor, chosen, unfolded in zip(d.factors, d.fibres, unfoldings(a), strict=True):
        assert torch.equal(factor, unfolded[:, chosen])
        assert chosen.unique().numel() == len(chosen)
        projected = factor @ torch.linalg.pinv(factor) @ unfolded
        bound += float((unfolded - projected).square().sum())
    error = d.relative_error(a) * float(a.norm())
    assert error**2 <= bound * (1 + 1e-9) + 1e-18
    # The core is the best one for these fibres: the rest is orthogonal to what they can make.
    rest, core = a - d.reconstruct(), torch.randn_like(d.core)
    other = type(d)(core, d.factors, d.fibres).reconstruct()
    assert abs(float((rest * other).sum())) < 1e-9 * float(a.norm() * other.norm())


def test_tucker_bounds_modewise_cur_from_below():
    a = of_multilinear_rank((6, 12, 10), (4, 6, 5), 0) + 1e-2 * normal(6, 12, 10, seed=9)
    ranks = (4, 6, 5)
    core, factors = tucker(np.asarray(a), list(ranks), n_iter_max=200, tol=1e-12)
    best = relative_error(torch.from_numpy(tensorly.tucker_to_tensor((core, factors))), a)
    d = tcur.modewise_cur(a, ranks)
    assert best <= d.relative_error(a) < 0.1
    assert d.count() == core.size + sum(factor.size for factor in factors)
    product = tensorly.tucker_to_tensor((np.asarray(d.core), [np.asarray(f) for f in d.factors]))
    assert relative_error(d.reconstruct(), torch.from_numpy(product)) < 1e-11


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ranks": (1, 2)}, ValueError, r"ranks: expected three, one per axis of a, got \[1, 2\]"),
        ({"ranks": (1, 2, 6)}, ValueError, "ranks: expected 1 to 5 for axis 2, got 6"),
        ({"ranks": (0, 2, 2)}, ValueError, "ranks: expected 1 to 3 for axis 0, got 0"),
        ({"ranks": (1, 2.0, 2)}, TypeError, "ranks: expected ints, got float"),
        ({"a": torch.ones(3, 4)}, ValueError, r"a: expected \[n3, n1, n2\]"),
        ({"a": torch.full((3, 4, 5), torch.nan)}, ValueError, "a: expected finite"),
    ],
)
def test_modewise_cur_refuses(change, error, message):
    with pytest.raises(error, match=message):
        tcur.modewise_cur(**{"a": torch.randn(3, 4, 5), "ranks": (2, 2, 2), **change})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(7, 9, 16), (3, 40, 50)])
def test_modewise_cur_of_16_bits_is_as_good_as_the_numbers(dtype, sizes):
    """4 r eps is 1 and more from rank 32 on in bf16, and left a core of zeros."""
    a = normal(*sizes, seed=1).to(dtype)
    d = tcur.modewise_cur(a, sizes)
    eps = torch.finfo(dtype).eps
    assert (d.core.dtype, d.reconstruct().dtype) == (torch.float32, dtype)
    assert d.relative_error(a) < 3 * eps
    low = of_multilinear_rank((9, 140, 150), (2, 3, 4), 7).to(dtype)
    found, same = (tcur.modewise_cur(each, (2, 3, 4)) for each in (low, low.double()))
    assert all(map(torch.equal, found.fibres, same.fibres))
    assert tcur.modewise_cur(low, (8, 40, 40)).relative_error(low) < 3 * eps


def test_modewise_cur_of_zero_and_equal_numbers():
    for a in (torch.zeros(3, 4, 5), torch.ones(3, 4, 5)):
        d = tcur.modewise_cur(a, (2, 2, 2))
        assert d.relative_error(a) < 1e-6
        assert all(chosen.tolist() == [0, 1] for chosen in d.fibres)


def test_error_curve():
    a = tcur.t_product(normal(5, 12, 6), normal(5, 6, 10, seed=1))
    ranks = (1, 3, 6, 8)
    curve = error_curve(HeldSlices("a", list(a)), ranks, ("norm", "deim"))
    assert list(curve) == ["best", "norm", "deim"]
    u, s, v = tcur.t_svd(a)
    for index, rank in enumerate(ranks):
        kept = tcur.t_product(
            tcur.t_product(u[:, :, :rank], s[:, :rank, :rank]), tcur.t_transpose(v[:, :, :rank])
        )
        assert curve["best"][index] == pytest.approx(relative_error(kept, a), abs=1e-7)
        d = tcur.tensor_cur(a, rank, "deim", "projection")
        assert curve["deim"][index] == d.relative_error(a)
        assert curve["best"][index] <= curve["norm"][index] + 1e-7
    assert error_curve(HeldSlices("a", [torch.zeros(3, 4)]), (1, 2))["best"] == [0, 0]
    with pytest.raises(ValueError, match="ranks: expected 1 to min"):
        error_curve(HeldSlices("a", list(a)), (11,))


def test_curves_of_a_model(tmp_path, monkeypatch):
    model = Tiny()
    plan = make_plan(model, None, 1)
    curves = model_curves(model, plan, ranks=(4, 1, 100), selections=("norm2",))
    assert [curve.stack.name for curve in curves] == ["8x8", "32x8", "8x32"]
    assert all(curve.ranks == (1, 4) for curve in curves)
    lines = str(curves[0]).splitlines()
    assert lines[0] == "stack 8x8: 12 slices of 8 x 8, relative errors"
    assert lines[1].split() == ["rank", "core", "best", "norm2"]
    assert lines[2].split()[:2] == ["1", "12"]
    picture = tmp_path / "curves.png"
    plot_curves(curves, picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"selections: expected some of norm, .* got 'best'"):
        model_curves(model, plan, selections=("best",))
    with pytest.raises(ValueError, match="ranks: expected one of 1 to 8 for 8x8"):
        model_curves(model, plan, ranks=(100,))
    with pytest.raises(ValueError, match="weights: expected the files of the model, got None"):
        model_curves(model.to("meta"), plan)

    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
            plot_curves(curves, picture)

    from matplotlib.figure import Figure

    def fail(self, path, **_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    before = picture.read_bytes()
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(KeyboardInterrupt):
        plot_curves(curves, picture)
    assert picture.read_bytes() == before
    assert list(tmp_path.iterdir()) == [picture]
