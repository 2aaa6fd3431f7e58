"""The CUDA kernels' own source, built for the host: operators on tokens, of one core or many.

What every backend is asked is in `conformance`; here are sizes that only these kernels tell apart.
"""

import pytest
import torch

import cuda_host
from cases import make_case
from cuda_host import DTYPES, operator, shifted
from tcur_kernels.operators import contract, reference
from tolerance import PROMISE, assert_close, relative_error

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module", autouse=True)
def host():
    return cuda_host.load()


def plain(name):
    return contract.operator(name, "reference")


def projected(n3, rank, slices, dtype):
    """z and p of more tokens than blocks take at a time, and no multiple; by factors of ones."""
    q = n3 * rank
    one = torch.eye(q, dtype=dtype)
    return torch.randn(333, q).to(dtype), torch.randn(333, slices * q).to(dtype), one


@pytest.mark.parametrize("n3", [1, 2, 12, 48])
@pytest.mark.parametrize("rank", [1, 3, 8, 34])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_read_by_vectors_or_one_by_one(n3, rank, dtype):
    """The same bits; their values are tested in `conformance`."""
    slices, rank = min(n3, 2), min(rank, 400 // n3)
    z, p, one = projected(n3, rank, slices, dtype)
    args = (None, n3, n3 - slices, slices)
    actual = operator("core_grad_tokens")(z, p, one, *args)
    assert torch.equal(operator("core_grad_tokens")(shifted(z), p, one, *args), actual)


@pytest.mark.parametrize("n3", [1, 2, 12, 48])
@pytest.mark.parametrize("rank", [1, 3, 8, 34])
def test_projected_tokens_in_place_of_tokens(n3, rank):
    slices, rank = min(n3, 2), min(rank, 400 // n3)
    x, _, one = projected(n3, rank, slices, torch.bfloat16)
    core, how = torch.randn(n3, rank, rank), (n3 - slices, slices, 0.5, False)
    y = operator("cur_linear")(x, None, None, one, one, core, *how)
    for given in (x, shifted(x)):
        other = torch.zeros_like(x)  # z is taken in its place
        assert torch.equal(
            operator("cur_linear")(other, None, None, one, one, core, *how, given), y
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
def test_projected_tokens_of_another_dtype(dtype, factors):
    z, p, one = projected(12, 8, 1, factors)
    z = z.to(dtype)
    args = (None, 12, 3, 1)
    exact = plain("core_grad_tokens")(z.double(), p.double(), one.double(), *args)
    same = plain("core_grad_tokens")(z.float(), p.float(), one.float(), *args)
    assert_close(operator("core_grad_tokens")(z, p, one, *args), same, exact)
    core, how = torch.randn(12, 8, 8), (3, 1, 0.5, False)
    y = operator("cur_linear")(torch.zeros(333, 96), None, None, one, one, core, *how, z)
    exact = plain("cur_linear")(z.double(), None, None, *2 * [one.double()], core.double(), *how)
    if factors == torch.float32:
        assert_close(y, plain("cur_linear")(z.float(), None, None, one, one, core, *how), exact)
    assert relative_error(y, exact) <= PROMISE["ieee" if factors == torch.float32 else "bf16"]


@pytest.mark.parametrize(
    ("n3", "rank", "cores", "rows", "length"),
    [
        (48, 8, 70, 90, 1),  # a block transforms a whole core
        (4, 1, 300, 1100, 1),  # three turns of the sort, three rows for each of its threads
        (2, 2, 5000, 40, 3),
        (3, 2, 1, 700, 2),  # one core has all rows
        (12, 3, 9, 20, 70),
        (8, 1, 3, 32, 900),  # five parts of a row, which 8 groups of threads share
    ],
)
def test_many_cores(n3, rank, cores, rows, length):
    case = make_case(n3, 9, 10, rank)
    core, ids = torch.randn(cores, n3, rank, rank), torch.randint(0, cores, (rows,))
    ids[: rows // 4] = cores - 1
    x, grad_y = torch.randn(rows, length, 10), torch.randn(rows, length, 9)
    wide = [t.double() for t in case.packed]
    args = (n3, n3 - 1, 1, ids, cores)
    actual = operator("core_grad_tokens")(x, grad_y, *case.packed, *args)
    same = plain("core_grad_tokens")(x, grad_y, *case.packed, *args)
    exact = plain("core_grad_tokens")(x.double(), grad_y.double(), *wide, *args)
    assert_close(actual, same, exact)
    how = (n3 - 1, 1, 0.5, False, None, False, ids)
    y = operator("cur_linear")(x, None, None, *case.packed, core, *how)
    same = plain("cur_linear")(x, None, None, *case.packed, core, *how)
    exact = plain("cur_linear")(x.double(), None, None, *wide, core.double(), *how)
    assert_close(y, same, exact)


@pytest.mark.parametrize("n3", [600, 1100, 2048])
def test_tokens_of_long_tubes(n3):
    case = make_case(n3, 2, 3, 2)
    x, grad_y = torch.randn(9, 3), torch.randn(9, 4)
    args = (n3, n3 - 2, 2)
    exact = reference.core_grad_tokens(x.double(), grad_y.double(), *case.double().spectra, *args)
    same = reference.core_grad_tokens(x, grad_y, *case.spectra, *args)
    actual = operator("core_grad_tokens")(x, grad_y, *case.packed, *args)
    assert_close(actual, same, exact)
