"""Values of the Triton kernels against float64, in Triton's interpreter."""

import pytest
import torch

from cases import counts_of, make_case, side_by_side, slices_of
from checks import check, check_promise
from tcur_kernels.operators import contract

#: One length for each form and each parity; 66 makes two parts of a long tube.
N3 = (1, 2, 3, 12, 47, 48)
MATRIX = pytest.mark.matrix
N3_RANKS = [
    *[(n3, 3) for n3 in N3],
    *[(n3, rank) for n3 in (2, 12) for rank in (1, 8)],
    (5, 17),
    (66, 3),
    *[pytest.param(n3, rank, marks=MATRIX) for n3 in (1, 3, 47, 48) for rank in (1, 8)],
    *[pytest.param(n3, rank, marks=MATRIX) for n3 in (4, 5, 16, 17, 64, 65, 130) for rank in (3,)],
]
HALVES = (torch.bfloat16, torch.float16)
FORMS = (3, 12, 17)  # direct, dense, folded


@pytest.mark.parametrize(("n3", "rank"), N3_RANKS)
def test_materialize(n3, rank):
    case = make_case(n3, 18, 35, rank)
    check("materialize", [case.weight], *case.packed, case.core, 0.5, torch.float32)


@pytest.mark.parametrize("n3", FORMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("weights", ["none", "stack", "layers"])
def test_materialize_dtypes(n3, dtype, weights):
    case = make_case(n3, 5, 20, 3, weight_dtype=dtype)
    given = {"none": [], "stack": [case.weight], "layers": [w.clone() for w in case.weight]}
    for out_dtype in (dtype, torch.float32):
        check("materialize", given[weights], *case.packed, case.core, 0.5, out_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n3", FORMS)
def test_materialize_of_layers_at_odd_addresses(n3, dtype):
    case = make_case(n3, 16, 32, 3, weight_dtype=dtype)
    numbers = torch.empty(n3, 16 * 32 + 1, dtype=dtype)
    for row, weight in zip(numbers, case.weight, strict=True):
        row[1:] = weight.flatten()
    layers = [row[1:].view(16, 32) for row in numbers]
    assert len({layer.data_ptr() % 16 for layer in layers}) > 1
    check("materialize", layers, *case.packed, case.core, 0.5, torch.float32)


def check_side_by_side(case, matrices, counts, out_dtype=torch.float32):
    n3, n1, n2 = case.weight.shape

    def run(weights, *args):
        *args, out_dtype = args
        out = torch.full((n3 * n1 * n2,), float("nan"), dtype=out_dtype)
        contract.operator("materialize_out", "triton")(matrices, *args, out=out)
        return slices_of(out, counts, n1, n2).contiguous()

    check("materialize", [case.weight], *case.packed, case.core, 0.5, out_dtype, run=run)


@pytest.mark.parametrize("n3", [2, 3, 12, 17, 47, 48, 66])
@pytest.mark.parametrize(("n1", "n2"), [(18, 35), (3, 16)])
def test_materialize_side_by_side(n3, n1, n2):
    case, counts = make_case(n3, n1, n2, 3), counts_of(n3)
    check_side_by_side(case, side_by_side(case.weight, counts), counts)


@pytest.mark.parametrize("n3", FORMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_materialize_side_by_side_dtypes(n3, dtype):
    case, counts = make_case(n3, 5, 20, 3, weight_dtype=dtype), counts_of(n3)
    matrices = side_by_side(case.weight, counts)
    for out_dtype in (dtype, torch.float32):
        check_side_by_side(case, matrices, counts, out_dtype)
    strided = [matrix.T.contiguous().T for matrix in matrices]
    check_side_by_side(case, strided, counts)


@pytest.mark.parametrize(("n3", "rank"), N3_RANKS)
def test_core_grad_dense(n3, rank):
    case = make_case(n3, 18, 35, rank)
    check("core_grad_dense", torch.randn_like(case.weight), *case.packed)


@pytest.mark.parametrize("n3", [3, 17])
def test_core_grad_dense_of_several_spans(n3):
    case = make_case(n3, 3, 530, 2)
    check("core_grad_dense", torch.randn_like(case.weight), *case.packed)


def test_core_grad_dense_of_more_ranks_than_a_product_takes():
    case = make_case(12, 36, 40, 34)
    check("core_grad_dense", torch.randn_like(case.weight), *case.packed)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_core_grad_dense_dtypes(dtype):
    case = make_case(5, 6, 20, 3)
    check("core_grad_dense", torch.randn_like(case.weight).to(dtype), *case.packed)


TOKENS_N3_RANKS = [
    *[(n3, 3) for n3 in N3],
    (4, 1),
    (4, 8),
    (4, 17),
    *[pytest.param(n3, rank, marks=MATRIX) for n3 in N3 for rank in (1, 8)],
]


@pytest.mark.parametrize(("n3", "rank"), TOKENS_N3_RANKS)
def test_core_grad_tokens(n3, rank):
    slices = min(2, n3)
    case = make_case(n3, 20, 19, rank)
    x, grad_y = torch.randn(2, 35, 19), torch.randn(2, 35, slices * 20)
    check("core_grad_tokens", x, grad_y, *case.packed, n3, n3 - slices, slices)
    check("core_grad_tokens", x, grad_y, *case.packed, n3, n3 - slices, slices, None, 1, True)


@pytest.mark.parametrize(("n3", "rank"), TOKENS_N3_RANKS)
@pytest.mark.parametrize("count", [0, 1, 48])
def test_core_of_packed(n3, rank, count):
    check("core_of_packed", torch.randn(count, n3, rank, rank), 0.7)


@pytest.mark.parametrize(("tokens", "slices"), [(0, 1), (1, 3), (600, 2)])
def test_core_grad_tokens_of_none_one_and_several_blocks(tokens, slices):
    case = make_case(3, 6, 9, 2)
    x, grad_y = torch.randn(tokens, 9), torch.randn(tokens, slices * 6)
    for packed in (False, True):
        check("core_grad_tokens", x, grad_y, *case.packed, 3, 0, slices, None, 1, packed)


def test_core_grad_tokens_of_projected_tokens_and_of_a_dense_gradient():
    case = make_case(5, 10, 9, 3)
    lateral_hat, horizontal_hat = case.packed
    x, grad_y = torch.randn(70, 9), torch.randn(70, 10)
    check("core_grad_tokens", x @ horizontal_hat.T, grad_y, lateral_hat, None, 5, 4, 1)
    check("core_grad_tokens", grad_y.T @ x, None, *case.packed, 5, 4, 1)


@pytest.mark.parametrize(("n3", "rank"), TOKENS_N3_RANKS)
@pytest.mark.parametrize("transposed", [False, True])
def test_cur_linear(n3, rank, transposed):
    slices = min(2, n3) if transposed or n3 < 47 else 1
    first = n3 - slices
    case = make_case(n3, 20, 19, rank)
    weight = case.weight[first:].reshape(slices * 20, 19)
    x = torch.randn(2, 20, slices * 20 if transposed else 19)
    bias = None if transposed else torch.randn(slices * 20)
    args = (*case.packed, case.core, first, slices, 0.5, transposed)
    check("cur_linear", x, weight, bias, *args)


@pytest.mark.parametrize("transposed", [False, True])
def test_cur_linear_without_a_weight(transposed):
    case = make_case(3, 20, 19, 3)
    x = torch.randn(2, 50, 20 if transposed else 19)
    args = (*case.packed, case.core, 2, 1, 0.5, transposed)
    check("cur_linear", x, None, None, *args)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (1,)], ids=str)
def test_cur_linear_of_one_token_and_of_none(leading):
    case = make_case(4, 6, 9, 2)
    args = (*case.packed, case.core, 1, 1, 0.5)
    check("cur_linear", torch.randn(*leading, 9), case.weight[1], None, *args, False)
    check("cur_linear", torch.randn(*leading, 6), case.weight[1], None, *args, True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cur_linear_dtypes(dtype):
    case = make_case(5, 6, 20, 3, weight_dtype=dtype)
    x = torch.randn(40, 20).to(dtype)
    check("cur_linear", x, case.weight[3], None, *case.packed, case.core, 3, 1, 0.5, False)


def test_cur_linear_of_projected_tokens_and_with_w_eff():
    case = make_case(5, 6, 20, 3)
    x = torch.randn(40, 20)
    args = (x, case.weight[3], torch.randn(6), *case.packed, case.core, 3, 1, 0.5)
    check("cur_linear", *args, False, x @ case.packed[1].T)
    check("w_eff_linear", *args, False)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("slices", [1, 2])
def test_a_core_per_token(transposed, slices):
    case = make_case(5, 6, 9, 3)
    cores, ids = torch.randn(4, 5, 3, 3), torch.tensor([2, 0, 2, 3, 3])
    x, grad_y = torch.randn(5, 40, 9), torch.randn(5, 40, slices * 6)
    weight = case.weight[1 : 1 + slices].reshape(slices * 6, 9)
    tokens = grad_y if transposed else x
    how = (*case.packed, cores, 1, slices, 0.5, transposed, None, False, ids)
    check("cur_linear", tokens, weight, None, *how)
    check("core_grad_tokens", x, grad_y, *case.packed, 5, 1, slices, ids, 4)


def test_no_rows_and_ids_of_no_core():
    case = make_case(5, 6, 9, 3)
    cores, none = torch.randn(4, 5, 3, 3), torch.empty(0, dtype=torch.int64)
    args = (*case.packed, cores, 1, 1, 0.5, False, None, False)
    check("cur_linear", torch.randn(0, 7, 9), case.weight[1], None, *args, none)
    x, grad_y = torch.randn(0, 7, 9), torch.randn(0, 7, 6)
    check("core_grad_tokens", x, grad_y, *case.packed, 5, 1, 1, none, 4)
    # Never read out of bounds: an id that no core has gives NaN in its own rows.
    op = torch.ops.tcur.cur_linear_triton
    y = op(torch.randn(3, 7, 9), case.weight[1], None, *args, torch.tensor([0, 4, -1]))
    assert torch.isfinite(y[0]).all()
    assert y[1:].isnan().all()


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize(
    "n3", [1, 12, 17, *[pytest.param(n3, marks=MATRIX) for n3 in (2, 3, 47, 48)]]
)
def test_precisions_keep_their_promise(precision, n3):
    case = make_case(n3, 24, 34, 8)
    x, grad_y = torch.randn(100, 34), torch.randn(100, 24)
    factors, where = case.factors, (n3 - 1, 1)
    check_promise("materialize", precision, factors, [[]], case.core, 1.0, torch.float32)
    check_promise("core_grad_dense", precision, factors, [torch.randn_like(case.weight)])
    check_promise("core_grad_tokens", precision, factors, [x, grad_y], n3, *where)
    linear = [x, None, None]
    check_promise("cur_linear", precision, factors, linear, case.core, *where, 0.5, False)
