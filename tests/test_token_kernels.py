"""The CPU kernels of tokens: rows of one token, each by a core of its own; tables that are kept.

Other numbers of tokens and other backends are compared in `conformance`.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cases import make_case
from tcur_kernels.operators import contract, native, reference
from tolerance import assert_close

ADAPTERS = 4
IDS = torch.tensor([2, 0, 3, 0, 2])  # adapter 1 has no rows
#: Ranks below a vector, of one vector and beyond; lengths without pairs, even, odd and prime.
SIZES = [*itertools.product((1, 2, 3, 48, 127), (1, 3, 8, 33)), (47, 16), (64, 17), (12, 4)]


def stacked(case, dtype=torch.float32):
    return torch.randn(ADAPTERS, *case.core.shape, dtype=dtype)


@pytest.mark.parametrize(("n3", "rank"), SIZES)
@pytest.mark.parametrize("transposed", [False, True])
def test_one_token_a_row(isa, n3, rank, transposed):
    slices = min(2, n3)
    first = n3 - slices
    case = make_case(n3, 34, 35, rank)
    cores, x = stacked(case), torch.randn(len(IDS), 1, slices * 34 if transposed else 35)
    how = (first, slices, 0.5, transposed, None, False, IDS)
    y = torch.ops.tcur.cur_linear(x, None, None, *case.packed, cores, *how)
    apply = reference.slice_update_transposed if transposed else reference.slice_update

    def alone(case, cores, x):
        rows = [
            apply(row[None], *case.spectra, cores[i], first, slices, 0.5)
            for i, row in zip(IDS, x, strict=True)
        ]
        return torch.cat(rows)

    assert_close(y, alone(case, cores, x), alone(case.double(), cores.double(), x.double()))


@pytest.mark.parametrize(("n3", "rank"), SIZES)
def test_gradients_of_one_token_a_row(isa, n3, rank):
    slices = min(3, n3)
    case = make_case(n3, 34, 35, rank)
    x, grad_y = torch.randn(len(IDS), 1, 35), torch.randn(len(IDS), 1, slices * 34)
    how = (n3, n3 - slices, slices)
    grad = torch.ops.tcur.core_grad_tokens(x, grad_y, *case.packed, *how, IDS, ADAPTERS)

    def alone(case, x, grad_y):
        own = [torch.eq(IDS, adapter) for adapter in range(ADAPTERS)]
        grads = [
            reference.core_grad_tokens(x[rows], grad_y[rows], *case.spectra, *how) for rows in own
        ]
        return torch.stack(grads)

    exact = alone(case.double(), x.double(), grad_y.double())
    assert_close(grad, alone(case, x, grad_y), exact)
    assert not grad[1].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_zero_cores_change_no_bit(isa, dtype, transposed):
    """Of any dtype of tokens, for ranks that do and do not fill vectors."""
    for n3, rank in ((7, 3), (12, 8), (3, 33)):
        wide = torch.promote_types(dtype, torch.float32)
        case = make_case(n3, 34, 34, rank, wide, weight_dtype=dtype)
        x = torch.randn(len(IDS), 1, 34).to(dtype)
        weight = case.weight[1]
        y = torch.ops.tcur.cur_linear(
            x, weight, None, *case.packed, stacked(case, wide).zero_(), 1, 1, 0.5, transposed,
            None, False, IDS,
        )  # fmt: skip
        assert torch.equal(y, x @ weight if transposed else torch.nn.functional.linear(x, weight))


def test_rows_of_a_batch_do_not_depend_on_their_neighbours(isa):
    """Kernels work on several tokens at a time: which ones depends on the number of threads."""
    case = make_case(12, 6, 7, 5)
    x = torch.randn(37, 7)
    z = x @ case.packed[1].T
    # In place of the last product, whose sums are torch's: y is what the kernel makes.
    lateral_hat = torch.eye(z.shape[1])

    def run(x, z):
        how = (3, 2, 0.5, False, z, False, None)
        return torch.ops.tcur.cur_linear(
            x, None, None, lateral_hat, case.packed[1], case.core, *how
        )

    every = run(x, z)
    for first, last in ((0, 1), (1, 17), (17, 20), (20, 37)):
        assert torch.equal(run(x[first:last], z[first:last]), every[first:last])


def step(case, dtype):
    """A call of every operator that takes a table."""
    x, grad_y = torch.randn(3, 1, 5, dtype=dtype), torch.randn(3, 1, 4, dtype=dtype)
    n3 = case.core.shape[0]
    ids = torch.tensor([0, 2, 1])
    cores = stacked(case, dtype)
    torch.ops.tcur.cur_linear(
        x, None, None, *case.packed, cores, 1, 1, 0.5, False, None, False, ids
    )
    torch.ops.tcur.core_grad_tokens(x, grad_y, *case.packed, n3, 1, 1, ids, ADAPTERS)
    contract.operator("core_of_packed")(torch.randn(2, *case.core.shape, dtype=dtype), 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tables_are_made_once(dtype):
    case = make_case(46, 4, 5, 2, dtype)
    step(case, dtype)
    before = native.plans_made()
    for _ in range(3):
        step(case, dtype)
    assert native.plans_made() == before


def test_the_table_unused_for_longest_is_dropped():
    """And not the one made first: a model that is used beside others keeps its tables."""
    used = make_case(46, 4, 5, 2)
    step(used, torch.float32)
    for n3 in range(100, 120):
        step(make_case(n3, 4, 5, 2), torch.float32)
        before = native.plans_made()
        step(used, torch.float32)
        assert native.plans_made() == before


def test_tables_of_many_lengths():
    """More lengths than are kept, by several threads: results stay right."""
    cases = [make_case(n3, 3, 4, 2) for n3 in range(20, 60)]

    def error(case):
        x = torch.ones(1, 4)
        how = (1, 1, 1.0, False, None, False, None)
        y = torch.ops.tcur.cur_linear(x, None, None, *case.packed, case.core, *how)
        exact = case.double()
        same = reference.slice_update(x, *case.spectra, case.core, 1, 1, 1.0)
        wanted = reference.slice_update(x.double(), *exact.spectra, exact.core, 1, 1, 1.0)
        assert_close(y, same, wanted)

    before = native.plans_made()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(error, cases * 2))
    assert native.plans_made() > before
