"""The CUDA kernels' own source, built for the host: operators on tokens, of one core or many."""

import pytest
import torch

import cuda_host
from cases import N3, make_case
from cuda_host import DTYPES, operator, shifted
from tcur_kernels.operators import contract, reference
from tolerance import PROMISE, assert_close, assert_composition_close, relative_error


@pytest.fixture(scope="module", autouse=True)
def host():
    return cuda_host.load()


def plain(name):
    return contract.operator(name, "reference")


@pytest.mark.parametrize("n3", N3)
@pytest.mark.parametrize(("tokens", "slices"), [((1,), 1), ((3, 5), 3), ((600,), 2), ((0,), 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_core_grad_tokens(n3, tokens, slices, packed):
    slices = min(slices, n3)
    case = make_case(n3, 6, 9, 3)
    x, grad_y = torch.randn(*tokens, 9), torch.randn(*tokens, slices * 6)
    args = (n3, (n3 - slices) // 2, slices, None, 1, packed)
    exact = reference.core_grad_tokens(x.double(), grad_y.double(), *case.double().spectra, *args)
    same = reference.core_grad_tokens(x, grad_y, *case.spectra, *args)
    actual = operator("core_grad_tokens")(x, grad_y, *case.packed, *args)
    assert actual.is_contiguous()
    assert_close(actual, same, exact)


@pytest.mark.parametrize("n3", [*N3, 127, 600])
@pytest.mark.parametrize("count", [0, 1, 48])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_core_of_packed(n3, count, rank):
    packed = torch.randn(count, n3, rank, rank)
    exact = reference.core_of_packed(packed.double(), 0.7)
    same = reference.core_of_packed(packed, 0.7)
    for precision in ("ieee", "tf32"):
        actual = operator("core_of_packed", precision)(packed, 0.7)
        assert actual.is_contiguous()
        assert_close(actual, same, exact)
    assert_close(operator("core_of_packed")(shifted(packed), 0.7), same, exact)


@pytest.mark.parametrize("n3", [1, 12])
@pytest.mark.parametrize("rank", [1, 8, 34])
def test_core_grad_of_projected_tokens_and_of_a_dense_gradient(n3, rank):
    case = make_case(n3, 40, 36, rank)
    x, grad_y = torch.randn(70, 36), torch.randn(70, 40)
    args = (n3, n3 - 1, 1)
    exact = reference.core_grad_tokens(x.double(), grad_y.double(), *case.double().spectra, *args)
    lateral_hat, horizontal_hat = case.packed
    ways = (
        operator("core_grad_tokens")(x @ horizontal_hat.T, grad_y, lateral_hat, None, *args),
        operator("core_grad_tokens")(grad_y.T @ x, None, lateral_hat, horizontal_hat, *args),
    )
    # A composition, with the product that comes first. One number may have no error by chance.
    spectra = case.spectra
    for actual in ways:
        assert_composition_close(
            actual, lambda: reference.core_grad_tokens(x, grad_y, *spectra, *args), exact
        )


@pytest.mark.parametrize("n3", N3)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("slices", [1, 3])
def test_cur_linear(n3, transposed, slices):
    slices = min(slices, n3)
    case = make_case(n3, 10, 9, 3)
    double = case.double()
    weight = case.weight[n3 - slices :].reshape(slices * 10, 9)
    x = torch.randn(2, 35, slices * 10 if transposed else 9)
    bias = None if transposed else torch.randn(slices * 10)
    how = (n3 - slices, slices, 0.5, transposed)
    for w, b in ((weight, bias), (None, None)):
        y = operator("cur_linear")(x, w, b, *case.packed, case.core, *how)
        same = plain("cur_linear")(x, w, b, *case.packed, case.core, *how)
        wide = [None if t is None else t.double() for t in (x, w, b)]
        exact = plain("cur_linear")(*wide, *double.packed, double.core, *how)
        assert y.is_contiguous()
        assert_close(y, same, exact)


@pytest.mark.parametrize("n3", [1, 12, 47])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_cur_linear_dtypes_and_precisions(n3, dtype, precision):
    case = make_case(n3, 40, 50, 8, torch.float32, dtype)
    x, grad_y = torch.randn(70, 50).to(dtype), torch.randn(70, 40).to(dtype)
    packed, double = case.factors.packed(precision), case.double()
    weight, how = case.weight[-1], (n3 - 1, 1, 0.5, False)
    y = operator("cur_linear")(x, weight, None, *packed, case.core, *how)
    same = plain("cur_linear")(x, weight, None, *packed, case.core, *how)
    exact = plain("cur_linear")(
        x.double(), weight.double(), None, *double.packed, double.core, *how
    )
    assert y.dtype == dtype
    if precision == "ieee":
        assert_close(y, same, exact)
    alone = operator("cur_linear")(x.float(), None, None, *packed, case.core, *how)
    exact = plain("cur_linear")(x.double(), None, None, *double.packed, double.core, *how)
    assert relative_error(alone, exact) <= PROMISE[precision]
    args = (n3, n3 - 1, 1)
    grad = operator("core_grad_tokens")(x, grad_y, *packed, *args)
    exact = reference.core_grad_tokens(x.double(), grad_y.double(), *double.spectra, *args)
    assert grad.dtype == torch.float32
    if precision == "ieee":
        assert_close(grad, plain("core_grad_tokens")(x, grad_y, *packed, *args), exact)
    assert relative_error(grad, exact) <= PROMISE[precision]


@pytest.mark.parametrize(("cores", "ids"), [(3, [2, 0, 2, 1]), (7, [5, 6, 0, 5])])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_core_per_row_of_tokens(cores, ids, transposed):
    """Fewer cores than rows and more; spectra are made of the smaller number."""
    case = make_case(12, 10, 9, 3)
    core, ids = torch.randn(cores, 12, 3, 3), torch.tensor(ids)
    x, grad_y = torch.randn(4, 5, 9), torch.randn(4, 5, 20)
    tokens = grad_y if transposed else x
    how = (4, 2, 0.5, transposed, None, False, ids)
    y = operator("cur_linear")(tokens, None, None, *case.packed, core, *how)
    same = plain("cur_linear")(tokens, None, None, *case.packed, core, *how)
    wide = [t.double() for t in case.packed]
    exact = plain("cur_linear")(tokens.double(), None, None, *wide, core.double(), *how)
    assert_close(y, same, exact)
    args = (12, 4, 2, ids, cores)
    actual = operator("core_grad_tokens")(x, grad_y, *case.packed, *args)
    same = plain("core_grad_tokens")(x, grad_y, *case.packed, *args)
    exact = plain("core_grad_tokens")(x.double(), grad_y.double(), *wide, *args)
    assert_close(actual, same, exact)


def projected(n3, rank, slices, dtype):
    """z and p of more tokens than blocks take at a time, and no multiple; by factors of ones."""
    q = n3 * rank
    one = torch.eye(q, dtype=dtype)
    return torch.randn(333, q).to(dtype), torch.randn(333, slices * q).to(dtype), one


@pytest.mark.parametrize("n3", [1, 2, 12, 48])
@pytest.mark.parametrize("rank", [1, 3, 8, 34])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_core_grad_of_every_rank_and_alignment(n3, rank, dtype):
    """Read by vectors or one by one; products of bf16 are exact, so the bound is that of fp32."""
    slices, rank = min(n3, 2), min(rank, 400 // n3)
    z, p, one = projected(n3, rank, slices, dtype)
    args = (None, n3, n3 - slices, slices)
    exact = plain("core_grad_tokens")(z.double(), p.double(), one.double(), *args)
    same = plain("core_grad_tokens")(z.float(), p.float(), one.float(), *args)
    actual = operator("core_grad_tokens")(z, p, one, *args)
    assert_close(actual, same, exact)
    assert torch.equal(operator("core_grad_tokens")(shifted(z), p, one, *args), actual)


@pytest.mark.parametrize("n3", [1, 2, 12, 48])
@pytest.mark.parametrize("rank", [1, 3, 8, 34])
@pytest.mark.parametrize("transposed", [False, True])
def test_cur_linear_of_every_rank_and_alignment(n3, rank, transposed):
    slices, rank = min(n3, 2), min(rank, 400 // n3)
    z, p, one = projected(n3, rank, slices, torch.float32)
    core = torch.randn(n3, rank, rank)
    x, how = p if transposed else z, (n3 - slices, slices, 0.5, transposed)
    y = operator("cur_linear")(x, None, None, one, one, core, *how)
    exact = plain("cur_linear")(x.double(), None, None, *2 * [one.double()], core.double(), *how)
    assert_close(y, plain("cur_linear")(x, None, None, one, one, core, *how), exact)
    x, narrow = x.bfloat16(), one.bfloat16()
    exact = plain("cur_linear")(x.double(), None, None, *2 * [one.double()], core.double(), *how)
    y = operator("cur_linear")(x, None, None, narrow, narrow, core, *how)
    assert relative_error(y, exact) <= PROMISE["bf16"]
    if not transposed:
        for given in (x, shifted(x)):
            other = torch.zeros_like(x)  # z is taken in its place
            again = operator("cur_linear")(other, None, None, narrow, narrow, core, *how, given)
            assert torch.equal(again, y)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_the_update_is_added_to_any_number_of_outputs(dtype, precision):
    """Outputs of no multiple of four numbers, of another dtype than the factors or the same."""
    case = make_case(4, 37, 40, 3, torch.float32, dtype)
    packed, x = case.factors.packed(precision), torch.randn(71, 40).to(dtype)
    how = (2, 1, 0.5, False)
    y = operator("cur_linear")(x, case.weight[2], None, *packed, case.core, *how)
    wide = [t.double() for t in (x, case.weight[2], *case.packed, case.core)]
    exact = plain("cur_linear")(*wide[:2], None, *wide[2:], *how)
    if precision == "ieee":
        same = plain("cur_linear")(x, case.weight[2], None, *packed, case.core, *how)
        assert_close(y, same, exact)
    else:
        assert relative_error(y, exact) <= PROMISE[precision]


def test_long_sums_over_tokens():
    """Several parts for every group of threads that adds them up, and several tokens a thread."""
    case = make_case(12, 8, 8, 8)
    x, grad_y = torch.randn(5000, 8), torch.randn(5000, 8)
    for packed in (False, True):
        args, wide = (12, 5, 1, None, 1, packed), case.double().spectra
        exact = reference.core_grad_tokens(x.double(), grad_y.double(), *wide, *args)
        same = reference.core_grad_tokens(x, grad_y, *case.spectra, *args)
        assert_close(operator("core_grad_tokens")(x, grad_y, *case.packed, *args), same, exact)


@pytest.mark.parametrize(
    ("n3", "rank", "cores", "rows", "length"),
    [
        (48, 8, 70, 90, 1),  # a block transforms a whole core
        (4, 1, 300, 1100, 1),  # three turns of the sort, three rows for each of its threads
        (2, 2, 5000, 40, 3),
        (3, 2, 1, 700, 2),  # one core has all rows
        (12, 3, 9, 20, 70),
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


def test_rows_of_no_core_count_for_none():
    case = make_case(5, 6, 7, 2)
    x, grad_y = torch.randn(4, 3, 7), torch.randn(4, 3, 6)
    args = (*case.packed, 5, 1, 1)
    ids = torch.tensor([0, 7, -1, 2])
    actual = operator("core_grad_tokens")(x, grad_y, *args, ids, 7)
    kept = torch.tensor([0, 3])
    same = plain("core_grad_tokens")(x[kept], grad_y[kept], *args, ids[kept], 7)
    wide = [t.double() for t in (x[kept], grad_y[kept], *case.packed)]
    assert_close(actual, same, plain("core_grad_tokens")(*wide, *args[2:], ids[kept], 7))
    assert torch.equal(actual[1], torch.zeros_like(actual[1]))


@pytest.mark.parametrize("cores", [2, 5])
def test_an_id_out_of_range_gives_nan_and_reads_nothing(cores):
    case = make_case(4, 6, 7, 2)
    core, ids = torch.randn(cores, 4, 2, 2), torch.tensor([0, cores, -1])
    how = (1, 1, 1.0, False, None, False, ids)
    y = operator("cur_linear")(torch.randn(3, 2, 7), None, None, *case.packed, core, *how)
    assert torch.isfinite(y[0]).all()
    assert torch.isnan(y[1:]).all()
