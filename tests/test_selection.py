"""Selection rules: what each scores, in float64 from the full spectrum; draws; what they bound."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tcur_kernels as tcur
from tcur_kernels import decompose
from tcur_kernels.decompose import Deim, HeldSlices, Leverage
from tcur_kernels.decompose.rules import shared_pivots, squared_norms
from tcur_kernels.decompose.singular import leading_subspaces
from tcur_kernels.decompose.slices import bin_weights, half_spectrum
from tolerance import assert_equal_in_float64, relative_error

KINDS = ("random", "decaying", "noisy", "deficient", "spiky")
SIZES = {"n3": st.integers(1, 9), "n1": st.integers(3, 14), "n2": st.integers(3, 14)}
SEEDS = st.integers(0, 2**32 - 1)
SCORED = ("norm", "norm2", "leverage", "inverse")


def tensor(kind, n3, n1, n2, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    m = min(n1, n2)
    if kind == "decaying":
        left, right = normal(n3, n1, m), normal(n3, m, n2)
        return tcur.t_product(left * 0.3 ** torch.arange(m, dtype=torch.float64), right)
    if kind in ("noisy", "deficient"):
        exact = tcur.t_product(normal(n3, n1, 2), normal(n3, 2, n2))
        return exact + (1e-3 * normal(n3, n1, n2) if kind == "noisy" else 0)
    return normal(n3, n1, n2) ** (5 if kind == "spiky" else 1)


def full_spectrum(a):
    """All n3 bins: the half spectrum and its weights are not used."""
    return torch.fft.fft(a.double(), dim=0)


def top(scores, rank):
    return scores.topk(rank).indices.sort().values


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), **SIZES, seed=SEEDS)
def test_parseval(kind, n3, n1, n2, seed):
    """n3 ‖A(:, j, :)‖² = Σ ‖Â_k(:, j)‖², over all bins and over the weighted half spectrum."""
    a = tensor(kind, n3, n1, n2, seed)
    rows, columns = squared_norms(HeldSlices("a", list(a)))
    full = full_spectrum(a).abs().square()
    half = bin_weights(n3)[:, None, None] * half_spectrum(a).abs().square()
    for spectrum in (full, half):
        assert relative_error(spectrum.sum((0, 1)), n3 * columns) < 1e-13
        assert relative_error(spectrum.sum((0, 2)), n3 * rows) < 1e-13


def test_weights_of_odd_lengths():
    assert [bin_weights(n).tolist() for n in (1, 2, 3, 4, 5)] == [
        [1],
        [1, 1],
        [1, 2],
        [1, 2, 1],
        [1, 2, 2],
    ]


def test_the_half_spectrum_is_weighted():
    """One column lives in bin 0, one in a pair of bins: unweighted, the wrong one would win."""
    for n3 in (7, 8):
        a = torch.zeros(n3, 3, 2, dtype=torch.float64)
        a[:, 0, 0] = 1.5 / n3  # |bin 0| = 1.5, counted once
        wave = torch.cos(2 * torch.pi * torch.arange(n3) / n3)
        a[:, 0, 1] = 2 * wave / n3  # |bins 1 and n3 - 1| = 1, counted as 2
        assert tcur.tensor_cur(a, 1).columns.tolist() == [1]


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), **SIZES, rank=st.integers(1, 3), seed=SEEDS)
def test_what_each_rule_takes(kind, n3, n1, n2, rank, seed):
    """Against the definitions, in all n3 frequencies and with the singular vectors of each."""
    a = tensor(kind, n3, n1, n2, seed)
    a_hat = full_spectrum(a)

    columns = top(torch.linalg.norm(a_hat, dim=1).sum(0), rank)
    rows = top(torch.linalg.norm(a_hat[:, :, columns], dim=2).sum(0), rank)
    d = tcur.tensor_cur(a, rank, "norm")
    assert (d.rows.tolist(), d.columns.tolist()) == (rows.tolist(), columns.tolist())

    row_squares, column_squares = a.square().sum((0, 2)), a.square().sum((0, 1))
    d = tcur.tensor_cur(a, rank, "norm2")
    assert d.rows.tolist() == top(row_squares, rank).tolist()
    assert d.columns.tolist() == top(column_squares, rank).tolist()
    d = tcur.tensor_cur(a, rank, "inverse", "zero")
    assert d.rows.tolist() == top(-row_squares, rank).tolist()
    assert d.columns.tolist() == top(-column_squares, rank).tolist()

    rank = min(rank, 2)  # "deficient" has no third singular vector
    u, _, vh = torch.linalg.svd(a_hat, full_matrices=False)
    d = tcur.tensor_cur(a, rank, "leverage")
    assert d.rows.tolist() == top(u[:, :, :rank].abs().square().sum((0, 2)), rank).tolist()
    assert d.columns.tolist() == top(vh[:, :rank].abs().square().sum((0, 1)), rank).tolist()


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), **SIZES, rank=st.integers(1, 3), seed=SEEDS)
def test_the_bound_of_deim(kind, n3, n1, n2, rank, seed):
    """‖Â_k − Ĉ_k Û_k R̂_k‖ ≤ (η_p + η_q) σ_{r+1}, per frequency; for given indices too."""
    a = tensor(kind, n3, n1, n2, seed)
    a_hat = half_spectrum(a)
    u, s, vh = torch.linalg.svd(a_hat, full_matrices=False)
    for selection in ("deim", "leverage", "norm"):
        d = tcur.tensor_cur(a, rank, selection, "projection")
        rest = torch.linalg.matrix_norm(a_hat - half_spectrum(d.reconstruct()), ord=2)
        # The smallest singular values of V̂(J, :) and Û(I, :); a singular one bounds nothing.
        least_v = torch.linalg.svdvals(vh[:, :rank][:, :, d.columns])[:, -1]
        least_u = torch.linalg.svdvals(u[:, d.rows, :rank])[:, -1]
        eta = 1 / least_v.clamp_min(1e-300) + 1 / least_u.clamp_min(1e-300)
        following = s[:, rank] if rank < min(n1, n2) else torch.zeros(len(s))
        # Where σ_{r+1} is zero, what is left is the rounding of the two pseudo-inverses: each loses
        # as many digits as its matrix has condition.
        sides = (d.lateral, d.horizontal)
        conditions = [torch.linalg.cond(half_spectrum(side)) for side in sides]
        rounding = 1e-14 * s.max() * (1e3 + conditions[0] * conditions[1])
        assert bool((rest <= eta * following + rounding).all())


def test_deim_serves_every_frequency_better_than_one_stacked_qr():
    """The worst η over the frequencies, against Q-DEIM of all frequencies stacked into one."""
    from scipy.linalg import qr

    def eta(vectors, pivots):
        return float(1 / torch.linalg.svdvals(vectors[:, pivots])[:, -1].min())

    ours, stacked = [], []
    for seed in range(20):
        spaces = leading_subspaces(HeldSlices("a", list(tensor("random", 8, 30, 30, seed))), 5)
        weighted = spaces.right.mT * bin_weights(8).sqrt()[:, None, None]
        order = torch.from_numpy(qr(weighted.flatten(0, 1).numpy(), pivoting=True)[2]).long()
        ours.append(eta(spaces.right, shared_pivots(spaces.right, 5)))
        stacked.append(eta(spaces.right, order[:5]))
    assert sorted(ours)[10] < 0.5 * sorted(stacked)[10]
    assert max(ours) < 0.5 * max(stacked)


def test_deim_where_no_index_set_serves_every_frequency():
    """Bin 0 lives on columns 0 and 1, bin 1 on 2 and 3: with two columns one of them is lost."""
    a_hat = torch.zeros(2, 6, 6, dtype=torch.complex128)
    a_hat[0, 0, 0] = a_hat[0, 1, 1] = 2
    a_hat[1, 2, 2] = a_hat[1, 3, 3] = 1
    a = torch.fft.irfft(a_hat, n=2, dim=0)
    d = tcur.tensor_cur(a, 2, "deim", "projection")
    assert d.columns.unique().numel() == 2
    assert 0.4 < d.relative_error(a) < 0.95
    assert tcur.tensor_cur(a, 4, "deim", "projection").relative_error(a) < 1e-14


@pytest.mark.parametrize("n3", [1, 4, 5])
def test_the_range_finder_finds_the_exact_subspaces(n3):
    a = HeldSlices("a", list(tensor("decaying", n3, 40, 30, 1)))
    exact = leading_subspaces(a, 4, "exact")
    errors = []
    for power_iterations in (0, 2):
        found = leading_subspaces(a, 4, "randomized", 4, power_iterations)
        assert found.left.shape == exact.left.shape
        errors.append(
            max(
                relative_error(abs(p @ p.mH), abs(q @ q.mH))
                for p, q in ((found.left, exact.left), (found.right, exact.right))
            )
        )
        assert relative_error(found.values, exact.values) < 10.0 ** (-3 - 2 * power_iterations)
    assert errors[1] < 1e-6 < errors[0] < 0.1
    # A sketch as wide as the slices has everything.
    whole = leading_subspaces(a, 4, "randomized", 40)
    assert relative_error(whole.values, exact.values) < 1e-12


@pytest.mark.parametrize("rule", [Leverage, Deim])
def test_randomised_rules_are_reproducible_and_right(rule):
    a = tensor("decaying", 6, 60, 50, 2)
    exact = tcur.tensor_cur(a, 5, rule("exact"), "projection")
    found = tcur.tensor_cur(a, 5, rule("randomized", power_iterations=2), "projection")
    again = tcur.tensor_cur(a, 5, rule("randomized", power_iterations=2), "projection")
    assert torch.equal(found.columns, exact.columns)
    assert torch.equal(found.rows, exact.rows)
    assert torch.equal(found.core, again.core)


def test_auto_is_exact_for_what_is_small(monkeypatch):
    from tcur_kernels.decompose import singular

    a = HeldSlices("a", list(tensor("random", 3, 9, 8, 0)))
    exact = leading_subspaces(a, 2)
    assert torch.equal(exact.values, leading_subspaces(a, 2, "exact").values)
    monkeypatch.setattr(singular, "_EXACT_WORK", 0)
    randomised = leading_subspaces(a, 2, oversample=1)
    assert torch.equal(randomised.values, leading_subspaces(a, 2, "randomized", 1).values)
    assert not torch.equal(randomised.values, exact.values)
    with pytest.raises(ValueError, match="method: expected auto, exact or randomized, got 'fast'"):
        leading_subspaces(a, 2, "fast")


@pytest.mark.parametrize("selection", [*SCORED, "uniform"])
def test_draws(selection):
    """Reproducible by generator, without duplicates, in proportion to the scores."""
    a = tensor("random", 3, 9, 12, 0)
    a[:, :, 3] *= 4
    a[:, 2] *= 3

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return tcur.tensor_cur(a, 4, selection, "zero", generator=generator)

    first, again = draw(1), draw(1)
    assert torch.equal(first.rows, again.rows)
    assert torch.equal(first.columns, again.columns)
    counts = torch.zeros(12)
    for seed in range(300):
        d = draw(seed)
        assert d.columns.unique().numel() == d.rows.unique().numel() == 4
        counts[d.columns] += 1
    mean = 300 * 4 / 12
    deviation = math.sqrt(300 * (4 / 12) * (8 / 12))
    if selection == "uniform":
        assert abs(counts - mean).max() < 4 * deviation
    elif selection == "inverse":
        assert counts[3] < mean - 4 * deviation
    else:
        assert counts[3] > mean + 4 * deviation


def test_one_draw_follows_the_probabilities():
    """Columns with squared norms 1, 2, 3, 4 of 10; χ² with three degrees of freedom, p = 1e-4."""
    a = torch.zeros(2, 4, 4, dtype=torch.float64)
    a[0] = torch.diag(torch.arange(1.0, 5, dtype=torch.float64).sqrt())
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(1000):
        counts[tcur.tensor_cur(a, 1, "norm2", "zero", generator=generator).columns] += 1
    expected = torch.tensor([100.0, 200, 300, 400])
    assert float(((counts - expected).square() / expected).sum()) < 21.1


@pytest.mark.parametrize("selection", [*SCORED, "deim"])
@pytest.mark.parametrize("draws", [False, True])
def test_zero_and_constant_tensors(selection, draws):
    """No score decides: the first slices win, and a draw takes any; never a duplicate, no NaN."""
    if selection == "deim" and draws:
        with pytest.raises(ValueError, match="generator: expected None, selection 'deim'"):
            tcur.tensor_cur(torch.ones(3, 5, 4), 2, selection, generator=torch.Generator())
        return
    for a in (torch.zeros(3, 5, 4), torch.ones(3, 5, 4), torch.full((1, 5, 4), -2.0)):
        for core in decompose.CORES:
            generator = torch.Generator().manual_seed(0) if draws else None
            d = tcur.tensor_cur(a, 2, selection, core, generator=generator)
            assert d.rows.unique().numel() == d.columns.unique().numel() == 2
            if not draws:
                assert (d.rows.tolist(), d.columns.tolist()) == ([0, 1], [0, 1])
            if core != "zero":  # computed in float64, rounded once
                exact = tcur.tensor_cur(a.double(), 2, (d.rows, d.columns), core)
                assert exact.relative_error(a.double()) < 1e-12
                assert torch.equal(d.core, exact.core.float())


def test_a_draw_takes_zero_slices_last():
    a = torch.zeros(2, 5, 5, dtype=torch.float64)
    a[:, 3, 4] = 1
    d = tcur.tensor_cur(a, 2, "norm2", generator=torch.Generator().manual_seed(0))
    assert (d.rows.tolist(), d.columns.tolist()) == ([0, 3], [0, 4])


def test_a_rule_of_ones_own():
    a = torch.randn(3, 6, 5)

    def last(stack, rank, generator):
        assert (stack.n3, stack.n1, stack.n2, generator) == (3, 6, 5, None)
        total = sum(block.double().sum() for _, _, block in stack.blocks("total"))
        assert_equal_in_float64(total, a.double().sum())
        return [5, 4], torch.tensor([4, 3])

    d = tcur.tensor_cur(a, 2, last)
    assert (d.rows.tolist(), d.columns.tolist()) == ([4, 5], [3, 4])
    assert torch.equal(d.lateral, a[:, :, 3:])
    for wrong, message in (
        (lambda *_: [0], "selection: expected a rule or a pair"),
        (lambda *_: ([0, 9], [0, 1]), "rows: expected 0 to n1 - 1 = 5"),
        (lambda *_: ([0, 1], [0, 0]), "columns: expected distinct"),
    ):
        with pytest.raises(ValueError, match=message):
            tcur.tensor_cur(a, 2, wrong)


@pytest.mark.parametrize("selection", list(decompose.RULES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_rule_in_every_dtype(selection, dtype):
    a = tensor("random", 4, 12, 10, 3).to(dtype)
    d = tcur.tensor_cur(a, 4, selection, "projection")
    of_core = torch.promote_types(dtype, torch.float32)
    assert (d.lateral.dtype, d.core.dtype, d.horizontal.dtype) == (dtype, of_core, dtype)
    exact = tcur.tensor_cur(a.double(), 4, (d.rows, d.columns), "projection")
    if selection != "uniform":
        same = tcur.tensor_cur(a.double(), 4, selection)
        assert torch.equal(same.columns, d.columns)
    assert torch.equal(d.core, exact.core.to(of_core))  # computed in float64, rounded once


@pytest.mark.parametrize(
    "rule",
    [*decompose.RULES.values(), decompose.Leverage("randomized"), decompose.Deim("randomized")],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rule_chooses_of_long_axes_in_16_bits_what_it_chooses_of_the_same_numbers(rule, dtype):
    """With 1 / eps numbers on an axis, no singular value passed for more than rounding."""
    if rule == decompose.RULES["uniform"]:
        return  # it looks at no numbers
    a = tensor("decaying", 3, 300, 260, 5).to(dtype)
    for rank in (2, 4):
        found, same = (tcur.tensor_cur(each, rank, rule) for each in (a, a.double()))
        assert torch.equal(found.columns, same.columns)
        assert torch.equal(found.rows, same.rows)
