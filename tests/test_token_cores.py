"""A core per token: every row of a batch goes by a core of its own.

`conformance` compares every language with the reference, here the reference is shown to be right:
each row is as if its core were the only one. And the public function says what it refuses.
"""

import functools

import pytest
import torch

import tcur_kernels as tcur
from cases import N3, make_case
from plain import product
from tcur_kernels.operators import contract, reference
from tolerance import assert_close, assert_composition_close

LANGUAGES = pytest.mark.parametrize(
    "language", contract.LANGUAGES, ids=lambda name: name or "compiled"
)

#: Adapters used once, often, out of order and not at all; rows of one token and of many.
IDS = {"mixed": [3, 0, 3, 1, 0, 3], "one": [2], "same": [1, 1, 1, 1], "falling": [4, 3, 2, 1, 0]}
ADAPTERS = 5


def make_cores(case, adapters=ADAPTERS):
    return torch.randn(adapters, *case.core.shape, dtype=case.core.dtype)


def row_by_row(function, ids, *tokens):
    """``function(core index, rows...)`` of each row alone, put together again."""
    parts = [function(int(i), *(t[b : b + 1] for t in tokens)) for b, i in enumerate(ids)]
    return torch.cat(parts)


@pytest.mark.parametrize("n3", N3)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("slices", [1, 3])
def test_values_are_those_of_each_adapter_alone(n3, transposed, slices):
    slices = min(slices, n3)
    first = n3 - slices
    case = make_case(n3, 10, 9, 3)
    cores, ids = make_cores(case), torch.tensor(IDS["mixed"])
    x = torch.randn(6, 7, slices * 10 if transposed else 9)
    weight = case.weight[first:].reshape(slices * 10, 9)
    bias = None if transposed else torch.randn(slices * 10)
    op = contract.operator("cur_linear", "reference")
    how = (first, slices, 0.5, transposed, None, False)
    y = op(x, weight, bias, *case.packed, cores, *how, ids)
    assert y.is_contiguous()

    apply = reference.slice_update_transposed if transposed else reference.slice_update

    def alone(dtype):
        spectra = [s.to(torch.promote_types(dtype, torch.complex64)) for s in case.spectra]
        if dtype == torch.float64:
            spectra = case.double().spectra
        update = row_by_row(
            lambda i, row: apply(row.to(dtype), *spectra, cores[i].to(dtype), first, slices, 0.5),
            ids,
            x,
        )
        wide = x.to(dtype) @ (weight if transposed else weight.T).to(dtype)
        return update + wide + (0 if bias is None else bias.to(dtype))

    same, exact = alone(torch.float32), alone(torch.float64)
    assert_close(y, same, exact)
    one_by_one = row_by_row(
        lambda i, row: op(row, weight, bias, *case.packed, cores[i], *how), ids, x
    )
    assert_close(one_by_one, same, exact)


@pytest.mark.parametrize("n3", N3)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("row_length", [1, 5, 300])
def test_each_core_gets_the_gradient_of_its_own_tokens(n3, ids, row_length):
    slices = min(2, n3)
    case = make_case(n3, 6, 9, 3)
    ids = torch.tensor(ids)
    x = torch.randn(len(ids), row_length, 9)
    grad_y = torch.randn(len(ids), row_length, slices * 6)
    args = (n3, n3 - slices, slices)

    def alone(x, grad_y, spectra):
        total = torch.zeros(ADAPTERS, *case.core.shape, dtype=x.dtype)
        for adapter in range(ADAPTERS):
            own = ids == adapter
            total[adapter] = reference.core_grad_tokens(x[own], grad_y[own], *spectra, *args)
        return total

    exact = alone(x.double(), grad_y.double(), case.double().spectra)
    same = alone(x, grad_y, case.spectra)
    op = contract.operator("core_grad_tokens", "reference")
    grad = op(x, grad_y, *case.packed, *args, ids, ADAPTERS)
    assert grad.is_contiguous()
    assert_close(grad, same, exact)
    unused = [a for a in range(ADAPTERS) if a not in ids]
    assert not grad[unused].any()


@LANGUAGES
@pytest.mark.parametrize("leading", [(0, 4), (0,), (3, 0)], ids=str)
def test_no_tokens(language, leading):
    case = make_case(4, 6, 9, 2)
    cores, ids = make_cores(case).requires_grad_(), torch.zeros(leading[0], dtype=torch.int64)
    x = torch.randn(*leading, 9)
    y = tcur.cur_linear(
        x, case.weight[1], None, case.factors, cores, 1, adapter_ids=ids,
        backend="reference" if language else "auto",
    )  # fmt: skip
    assert y.shape == (*leading, 6)
    y.sum().backward()
    assert cores.grad.shape == cores.shape
    assert not cores.grad.any()


@LANGUAGES
def test_fullgraph_with_other_sizes_and_one_compilation(language):
    case = make_case(5, 6, 9, 2)
    backend = "reference" if language else "cpu"
    factors = case.factors

    def step(x, cores, ids):
        linear = tcur.cur_linear
        y = linear(x, case.weight[1], None, factors, cores, 1, 0.5, backend, adapter_ids=ids)
        return y.square().sum()

    def plain(x, cores, ids, dtype):
        x, cores = (t.detach().to(dtype, copy=True).requires_grad_() for t in (x, cores))
        weight, *factors = (t.to(dtype) for t in (case.weight[1], case.lateral, case.horizontal))
        w_eff = [weight + 0.5 * product(factors[0], core, factors[1])[1] for core in cores]
        y = x @ torch.stack(w_eff)[ids].mT
        return torch.autograd.grad(y.square().sum(), (x, cores))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, adapters in ((4, 3), (6, 5)):
            x = torch.randn(rows, 7, 9, requires_grad=True)
            cores = make_cores(case, adapters).requires_grad_()
            ids = torch.randint(adapters, (rows,))
            given = x, cores, ids
            exact = plain(*given, torch.float64)
            for function in (step, compiled):
                actual = torch.autograd.grad(function(*given), (x, cores))
                same = functools.partial(plain, *given, torch.float32)
                assert_composition_close(actual, same, exact)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"adapter_ids": [0]}, TypeError, r"adapter_ids: expected a torch.Tensor, got list"),
        ({"adapter_ids": torch.tensor([0.0])}, TypeError, r"adapter_ids: expected .*int64"),
        ({"adapter_ids": torch.tensor(0)}, ValueError, r"adapter_ids: expected \[B\], got \[\]"),
        ({"adapter_ids": torch.tensor([0, 1, 1])}, ValueError, "expected as many as x .* got 3"),
        ({"adapter_ids": torch.tensor([], dtype=torch.int64)}, ValueError, "rows, got 0"),
        ({"adapter_ids": torch.tensor([0, 5])}, ValueError, "0 to 4 for 5 cores, got 0 to 5"),
        ({"core": torch.ones(4, 2, 2)}, ValueError, r"core: expected \[adapters, 4, 2, 2\], got"),
        ({"dense_grad": True}, ValueError, "adapter_ids: expected None with effective or dense"),
        ({"effective": torch.ones(6, 9)}, ValueError, "adapter_ids: expected None with effective"),
        ({"factors": None}, TypeError, "factors: expected CURFactors, got NoneType"),
    ],
)  # fmt: skip
def test_cur_linear_refuses(change, error, message):
    case = make_case(4, 6, 9, 2)
    arguments = {
        "x": torch.ones(2, 2, 9),
        "weight": case.weight[0],
        "bias": None,
        "factors": case.factors,
        "core": make_cores(case),
        "slice_index": 0,
        "adapter_ids": torch.tensor([0, 1]),
        **change,
    }
    with pytest.raises(error, match=message):
        tcur.cur_linear(**arguments)
