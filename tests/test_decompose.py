"""Tensor CUR: exact recovery, optimality of the projection core, the paper's selection rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import tcur_kernels as tcur
from tcur_kernels import decompose
from tolerance import relative_error

CORES = pytest.mark.parametrize("core", ["intersection", "projection"])


def low_rank(n3, n1, n2, tubal_rank, generator=None, dtype=torch.float64):
    left = torch.randn(n3, n1, tubal_rank, dtype=torch.float64, generator=generator)
    right = torch.randn(n3, tubal_rank, n2, dtype=torch.float64, generator=generator)
    return tcur.t_product(left, right).to(dtype)


@CORES
@pytest.mark.parametrize("n3", [1, 2, 5, 8, 12])
@pytest.mark.parametrize(("tubal_rank", "rank"), [(1, 1), (1, 4), (3, 8), (5, 8), (5, 7)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_exact_recovery(core, n3, tubal_rank, rank, dtype, limit):
    a = low_rank(n3, 40, 30, tubal_rank, dtype=dtype)
    d = tcur.tensor_cur(a, rank, core=core)
    assert d.relative_error(a) < limit
    assert d.core.dtype == dtype
    product = oracle.cur_product(d.lateral, d.core, d.horizontal)
    assert relative_error(d.reconstruct(), product) < limit


@CORES
@pytest.mark.parametrize("n3", [1, 4, 7])
def test_exact_recovery_with_as_many_slices_as_the_tubal_rank(core, n3):
    """With r equal to the tubal rank the intersection is inverted: its condition sets the error."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        a = low_rank(n3, 40, 30, 5, generator)
        d = tcur.tensor_cur(a, 5, core=core)
        meeting = torch.fft.rfft(a[:, d.rows][:, :, d.columns], dim=0)
        condition = float(torch.linalg.cond(meeting).max())
        assert d.relative_error(a) < 1e-10
        single = tcur.tensor_cur(a.float(), 5, core=core)
        # ‖C U‖ and ‖U R‖ are at most the condition number, and so is the loss of digits; a
        # condition beyond 1e4 leaves fewer than fp32 can promise.
        if condition < 1e4:
            eps = torch.finfo(torch.float32).eps
            assert single.relative_error(a.float()) < max(1e-5, 2 * condition * eps)


@CORES
def test_too_few_slices_do_not_recover(core):
    a = low_rank(6, 20, 20, 5)
    assert tcur.tensor_cur(a, 4, core=core).relative_error(a) > 1e-2


@settings(max_examples=40, deadline=None)
@given(
    n3=st.integers(1, 9),
    rank=st.integers(1, 6),
    noise=st.sampled_from([0.0, 1e-3, 1.0]),
    selection=st.sampled_from(["norm", "uniform"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_projection_is_never_worse_than_intersection(n3, rank, noise, selection, seed):
    generator = torch.Generator().manual_seed(seed)
    a = low_rank(n3, 12, 10, 4, generator)
    a = a + noise * torch.randn(a.shape, dtype=a.dtype, generator=generator)
    errors = {}
    for core in ("intersection", "projection"):
        draw = torch.Generator().manual_seed(seed) if selection == "uniform" else None
        d = tcur.tensor_cur(a, rank, selection, core, generator=draw)
        errors[core] = d.relative_error(a)
    # Both exact: what is left is rounding, and either may be the smaller.
    assert errors["projection"] <= errors["intersection"] + 1e-8


def test_norm_rule_is_the_papers():
    """Against a literal reading: full FFT, 2-norms summed over all frequencies, rows within C."""
    for n3 in (1, 2, 5, 6):
        a = torch.randn(n3, 9, 11, dtype=torch.float64)
        a_hat = torch.fft.fft(a, dim=0)
        column_scores = sum(torch.linalg.norm(a_hat[k], dim=0) for k in range(n3))
        columns = column_scores.topk(4).indices.sort().values
        row_scores = sum(torch.linalg.norm(a_hat[k][:, columns], dim=1) for k in range(n3))
        rows = row_scores.topk(4).indices.sort().values
        d = tcur.tensor_cur(a, 4)
        assert torch.equal(d.columns, columns)
        assert torch.equal(d.rows, rows)


def test_given_indices_and_ties():
    a = torch.randn(3, 6, 5)
    d = tcur.tensor_cur(a, 2, selection=([4, 1], torch.tensor([3, 0])))
    assert d.rows.tolist() == [1, 4]
    assert d.columns.tolist() == [0, 3]
    assert torch.equal(d.lateral, a[:, :, [0, 3]])
    assert torch.equal(d.horizontal, a[:, [1, 4]])
    ties = tcur.tensor_cur(torch.ones(3, 6, 5), 2)
    assert (ties.rows.tolist(), ties.columns.tolist()) == ([0, 1], [0, 1])


def test_zero_core_and_zero_tensor():
    a = torch.randn(3, 6, 5)
    d = tcur.tensor_cur(a, 2, core="zero")
    assert torch.equal(d.core, torch.zeros(3, 2, 2))
    assert d.relative_error(a) == 1
    zero = torch.zeros(3, 6, 5)
    for core in decompose.CORES:
        assert tcur.tensor_cur(zero, 2, core=core).relative_error(zero) == 0


def test_uniform_is_reproducible_by_generator():
    a = torch.randn(3, 50, 40)
    draws = [
        tcur.tensor_cur(a, 5, "uniform", generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0].rows, draws[1].rows)
    assert torch.equal(draws[0].columns, draws[1].columns)
    assert not torch.equal(draws[0].rows, draws[2].rows)
    assert draws[0].rows.unique().numel() == 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.ones(3, 4)}, ValueError, r"a: expected \[n3, n1, n2\].*got \[3, 4\]"),
        ({"a": torch.ones(3, 4, 5).int()}, TypeError, "a: expected a floating dtype"),
        ({"a": "weights"}, TypeError, "a: expected a torch.Tensor, got str"),
        ({"a": torch.full((3, 4, 5), torch.nan)}, ValueError, "a: expected finite"),
        ({"a": torch.full((3, 4, 5), torch.inf)}, ValueError, "a: expected finite"),
        ({"rank": 0}, ValueError, r"rank: expected 1 to min\(n1, n2\) = 4 .* got 0"),
        ({"rank": 5}, ValueError, r"rank: expected 1 to min\(n1, n2\) = 4 .* got 5"),
        ({"rank": 2.0}, TypeError, "rank: expected an int, got float"),
        (
            {"selection": "best"},
            ValueError,
            "selection: expected one of norm, .*uniform, a rule.*'best'",
        ),
        ({"selection": 3}, ValueError, "selection: expected a rule or a pair"),
        ({"selection": ([0, 1], [0, 5])}, ValueError, "columns: expected 0 to n2 - 1 = 4"),
        ({"selection": ([-1, 1], [0, 1])}, ValueError, "rows: expected 0 to n1 - 1 = 3"),
        ({"selection": ([1, 1], [0, 1])}, ValueError, "rows: expected distinct"),
        ({"selection": ([1], [0, 1])}, ValueError, "rows: expected 2 indices"),
        ({"selection": ([0.5, 1.0], [0, 1])}, TypeError, "rows: expected integers"),
        ({"core": "best"}, ValueError, "core: expected one of intersection, projection, zero"),
        (
            {"selection": ([0, 1], [0, 1]), "generator": torch.Generator()},
            ValueError,
            "generator: expected None, the indices are given",
        ),
        ({"rank": True}, TypeError, "rank: expected an int, got bool"),
        ({"a": torch.ones(0, 4, 5)}, ValueError, "no empty axis"),
        ({"a": torch.ones(3, 4, 5, device="meta")}, ValueError, "a: expected numbers, got none"),
        ({"max_workspace": 100}, ValueError, "max_workspace: expected at least 1,200 bytes"),
        ({"max_workspace": 1e9}, TypeError, "max_workspace: expected a number of bytes, got float"),
    ],
)
def test_tensor_cur_refuses(change, error, message):
    arguments = {"a": torch.randn(3, 4, 5), "rank": 2, **change}
    with pytest.raises(error, match=message):
        tcur.tensor_cur(**arguments)


def test_relative_error_refuses_another_shape():
    d = tcur.tensor_cur(torch.randn(3, 4, 5), 2)
    with pytest.raises(ValueError, match=r"a: expected shape \[3, 4, 5\], got \[3, 5, 4\]"):
        d.relative_error(torch.randn(3, 5, 4))
