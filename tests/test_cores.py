"""Cores: when they are exact, what they minimise, what they interpolate; ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import tcur_kernels as tcur
from tcur_kernels.decompose.slices import bin_weights, half_spectrum
from tcur_kernels.operators.reference import from_half_spectrum
from tolerance import relative_error

SEEDS = st.integers(0, 2**32 - 1)
RULES = st.sampled_from(["norm", "norm2", "leverage", "deim", "inverse", "uniform"])


def of_multirank(ranks, n3, n1, n2, seed):
    """A real tensor whose bin k has rank ranks[k], with singular values between 1 and 2."""
    generator = torch.Generator().manual_seed(seed)
    a_hat = torch.zeros(n3 // 2 + 1, n1, n2, dtype=torch.complex128)
    for k, rank in enumerate(ranks):
        is_real = k == 0 or 2 * k == n3
        dtype = torch.float64 if is_real else torch.complex128
        left = torch.linalg.qr(torch.randn(n1, n1, dtype=dtype, generator=generator)).Q[:, :rank]
        right = torch.linalg.qr(torch.randn(n2, n2, dtype=dtype, generator=generator)).Q[:rank]
        values = 1 + torch.rand(rank, dtype=torch.float64, generator=generator)
        a_hat[k] = left * values @ right
    return from_half_spectrum(a_hat, n3)


def norm_of_bins(values, n3):
    """Frobenius norm of a tensor from the norms of its bins, by Parseval."""
    return float((bin_weights(n3) * values.square()).sum().div(n3).sqrt())


@settings(max_examples=80, deadline=None)
@given(data=st.data(), n3=st.integers(1, 6), rank=st.integers(1, 4), seed=SEEDS)
def test_exact_if_and_only_if_the_intersection_has_every_rank(data, n3, rank, seed):
    """rank Â_k(I, J) = rank Â_k for all k ⇔ C * U * R = A, for both cores."""
    n1, n2 = 8, 7
    ranks = data.draw(st.lists(st.integers(0, 4), min_size=n3 // 2 + 1, max_size=n3 // 2 + 1))
    a = of_multirank(ranks, n3, n1, n2, seed)
    if data.draw(st.booleans()):  # slices that are there twice: intersections lose rank
        a[:, :, 1], a[:, 2] = a[:, :, 0], a[:, 0]
    norm = float(a.norm())
    if norm == 0:
        return
    a_hat = half_spectrum(a)
    values = torch.linalg.svdvals(a_hat)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(n1, generator=generator)[:rank]
    columns = torch.randperm(n2, generator=generator)[:rank]
    if data.draw(st.booleans()):
        rows[0], columns[0] = 0, 0
        if rank > 1:
            rows[1], columns[1] = 2, 1
    if rows.unique().numel() < rank or columns.unique().numel() < rank:
        return
    met = torch.linalg.svdvals(a_hat[:, rows][:, :, columns])
    of_a = (values > 1e-9).sum(1)
    of_meeting = (met > 1e-9).sum(1)
    conditioning = 2 / float(met[met > 1e-9].min()) if bool((met > 1e-9).any()) else 1.0
    for core in ("intersection", "projection"):
        error = tcur.tensor_cur(a, rank, (rows, columns), core).relative_error(a)
        if torch.equal(of_a, of_meeting):
            assert error < 1e-13 * conditioning**2
        else:
            # In a bin that fell short, C * U * R has too small a rank: Eckart and Young.
            lost = [
                values[k, of_meeting[k] : of_a[k]].norm() if of_meeting[k] < of_a[k] else 0.0
                for k in range(len(values))
            ]
            least = norm_of_bins(torch.tensor(lost, dtype=torch.float64), n3)
            if core == "intersection":
                assert error * norm > 0.999 * least
            assert error > 1e-9


@settings(max_examples=60, deadline=None)
@given(n3=st.integers(1, 7), rank=st.integers(1, 5), selection=RULES, seed=SEEDS)
def test_the_intersection_core_meets_the_chosen_slices(n3, rank, selection, seed):
    """Interpolation: C * U * R = A on the chosen rows and columns, if their meeting is regular."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n3, 9, 8, dtype=torch.float64, generator=generator)
    draws = generator if selection == "uniform" else None
    d = tcur.tensor_cur(a, rank, selection, "intersection", draws)
    product = oracle.cur_product(d.lateral, d.core, d.horizontal)
    condition = float(torch.linalg.cond(half_spectrum(a[:, d.rows][:, :, d.columns])).max())
    limit = 1e-14 * condition * max(1.0, float(product.norm() / a.norm()))
    assert relative_error(product[:, d.rows], d.horizontal) < limit
    assert relative_error(product[:, :, d.columns], d.lateral) < limit


@settings(max_examples=60, deadline=None)
@given(n3=st.integers(1, 7), rank=st.integers(1, 5), selection=RULES, seed=SEEDS)
def test_the_projection_core_is_the_best_one(n3, rank, selection, seed):
    """Its error is orthogonal to all C * X * R: no other core is better, and Pythagoras holds."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n3, 9, 8, dtype=torch.float64, generator=generator)
    draws = generator if selection == "uniform" else None
    d = tcur.tensor_cur(a, rank, selection, "projection", draws)
    rest = a - d.reconstruct()
    other = torch.randn(d.core.shape, dtype=torch.float64, generator=generator)
    change = oracle.cur_product(d.lateral, other, d.horizontal)
    scale = float(a.norm() * change.norm())
    assert abs(float((rest * change).sum())) < 1e-11 * scale
    assert float((rest - 0.1 * change).norm()) >= float(rest.norm()) * (1 - 1e-12)


@pytest.mark.parametrize("core", ["intersection", "projection"])
def test_the_best_tubal_approximation_bounds_every_error_from_below(core):
    for seed in range(5):
        a = torch.randn(
            5, 12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        values = torch.linalg.svdvals(half_spectrum(a))
        for rank in (1, 4, 8):
            least = norm_of_bins(values[:, rank:].norm(dim=1), 5) / float(a.norm())
            for selection in ("norm", "norm2", "leverage", "deim"):
                assert tcur.tensor_cur(a, rank, selection, core).relative_error(a) >= least


def test_the_projection_core_by_its_definition():
    a = torch.randn(6, 9, 8, dtype=torch.float64)
    d = tcur.tensor_cur(a, 3, "norm2", "projection")
    u = oracle.t_product(oracle.t_product(tcur.t_pinv(d.lateral), a), tcur.t_pinv(d.horizontal))
    assert relative_error(d.core, u) < 1e-12


@pytest.mark.parametrize("core", ["intersection", "projection"])
def test_singular_intersections_answer_without_a_warning(core):
    """Columns 0 and 1 are equal, and so are rows; filterwarnings = error makes a warning fail."""
    a = tcur.t_product(
        torch.randn(4, 8, 2, dtype=torch.float64), torch.randn(4, 2, 8, dtype=torch.float64)
    )
    a[:, :, 1], a[:, 1] = a[:, :, 0].clone(), a[:, 0].clone()
    a[:, :, 1] = a[:, :, 0]
    d = tcur.tensor_cur(a, 4, ([0, 1, 2, 3], [0, 1, 2, 3]), core)
    assert torch.isfinite(d.core).all()
    assert d.relative_error(a) < 1e-12
    single = tcur.tensor_cur(a.float(), 4, ([0, 1, 2, 3], [0, 1, 2, 3]), core)
    assert single.relative_error(a.float()) < 1e-4


@pytest.mark.parametrize("core", ["intersection", "projection"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n1", "n2", "rank", "tubal_rank"), [(70, 70, 70, 70), (80, 70, 66, 40)])
def test_a_core_of_16_bits_is_as_good_as_the_numbers(core, dtype, n1, n2, rank, tubal_rank):
    """4 r eps is 1 and more from rank 32 on in bf16, and left a core of zeros."""
    generator = torch.Generator().manual_seed(rank)
    sizes = ((3, n1, tubal_rank), (3, tubal_rank, n2))
    a = tcur.t_product(*(torch.randn(*size, generator=generator) for size in sizes)).to(dtype)
    d = tcur.tensor_cur(a, rank, "norm2", core)
    eps = torch.finfo(dtype).eps
    assert d.core.dtype == torch.float32
    assert d.relative_error(a) < 2 * eps
    assert d.reconstruct().dtype == dtype
    assert relative_error(d.reconstruct(), a.double()) < 3 * eps
    matrix = (torch.randn(90, 40, generator=generator) @ torch.randn(40, 80)).to(dtype)
    m = tcur.matrix_cur(matrix, rank, "norm2", core)
    assert (m.core.dtype, m.reconstruct().dtype) == (torch.float32, dtype)
    assert relative_error(m.reconstruct(), matrix.double()) < 3 * eps
    factors = tcur.CURFactors(d.lateral, d.horizontal)  # takes the core as it is
    assert relative_error(tcur.cur_product(factors, d.core), a.double()) < 3 * eps


def test_rcond_decides_what_counts_as_zero():
    """Singular values 1 and 1e-3 in every bin: rcond above the second drops it."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64, generator=generator)).Q
    a = torch.zeros(3, 6, 6, dtype=torch.float64)
    a[0] = left * torch.tensor([1.0, 1e-3], dtype=torch.float64) @ right.T
    ranks = [
        tcur.multirank(tcur.tensor_cur(a, 2, "norm2", rcond=rcond).core).tolist()
        for rcond in (None, 1e-9, 0.1)
    ]
    assert ranks == [[2, 2, 2], [2, 2, 2], [1, 1, 1]]
    for rcond in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"rcond: expected a number in \[0, 1\), got"):
            tcur.tensor_cur(a, 2, rcond=rcond)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n3=st.integers(1, 9), seed=SEEDS)
def test_multirank_and_tubal_rank(data, n3, seed):
    ranks = data.draw(st.lists(st.integers(0, 5), min_size=n3 // 2 + 1, max_size=n3 // 2 + 1))
    a = of_multirank(ranks, n3, 7, 5, seed)
    found = tcur.multirank(a)
    assert found.tolist() == [ranks[min(k, n3 - k)] for k in range(n3)]
    assert tcur.tubal_rank(a) == max(ranks)
    # The rank of the block-circulant matrix is the sum of the multirank.
    assert int(torch.linalg.matrix_rank(oracle.bcirc(a), rtol=1e-9)) == int(found.sum())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n3=st.integers(1, 6), n1=st.integers(1, 6), n2=st.integers(1, 6), seed=SEEDS)
def test_penrose_equations_at_every_multirank(data, n3, n1, n2, seed):
    most = st.integers(0, min(n1, n2))
    ranks = data.draw(st.lists(most, min_size=n3 // 2 + 1, max_size=n3 // 2 + 1))
    a = of_multirank(ranks, n3, n1, n2, seed)
    p = tcur.t_pinv(a)
    ap, pa = oracle.t_product(a, p), oracle.t_product(p, a)
    for left, right in (
        (oracle.t_product(ap, a), a),
        (oracle.t_product(pa, p), p),
        (oracle.t_transpose(ap), ap),
        (oracle.t_transpose(pa), pa),
    ):
        assert float((left - right).norm()) < 1e-12
