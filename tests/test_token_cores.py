"""A core per token: every row of a batch goes by a core of its own, in every language."""

import functools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import tcur_kernels as tcur
from cases import N3, make_case
from plain import product
from tcur_kernels import _cpu
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


@LANGUAGES
@pytest.mark.parametrize("n3", N3)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("slices", [1, 3])
def test_values_are_those_of_each_adapter_alone(language, n3, transposed, slices):
    slices = min(slices, n3)
    first = n3 - slices
    case = make_case(n3, 10, 9, 3)
    cores, ids = make_cores(case), torch.tensor(IDS["mixed"])
    x = torch.randn(6, 7, slices * 10 if transposed else 9)
    weight = case.weight[first:].reshape(slices * 10, 9)
    bias = None if transposed else torch.randn(slices * 10)
    op = contract.operator("cur_linear", language)
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


@LANGUAGES
@pytest.mark.parametrize("n3", N3)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("row_length", [1, 5, 300])
def test_each_core_gets_the_gradient_of_its_own_tokens(language, n3, ids, row_length):
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
    op = contract.operator("core_grad_tokens", language)
    grad = op(x, grad_y, *case.packed, *args, ids, ADAPTERS)
    assert grad.is_contiguous()
    assert_close(grad, same, exact)
    unused = [a for a in range(ADAPTERS) if a not in ids]
    assert not grad[unused].any()
    lateral_hat, horizontal_hat = case.packed
    z = x @ horizontal_hat.T
    of_z = op(z, grad_y, lateral_hat, None, *args, ids, ADAPTERS)
    plain = contract.operator("core_grad_tokens", "reference")
    assert_close(of_z, plain(z, grad_y, lateral_hat, None, *args, ids, ADAPTERS), exact)


@LANGUAGES
@pytest.mark.parametrize("n3", [1, 2, 5])
def test_derivatives(language, n3):
    case = make_case(n3, 3, 4, 2, torch.float64)
    first, slices = (0, 1) if n3 == 1 else (n3 - 2, 2)
    cores = make_cores(case, 3).requires_grad_()
    ids = torch.tensor([2, 0, 2])
    weight = case.weight[first:].reshape(slices * 3, 4)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn(3, 2, slices * 3, dtype=torch.float64, requires_grad=True)
    op = contract.operator("cur_linear", language)
    how = (first, slices, 0.5)

    def linear(x, cores):
        return op(x, weight, None, *case.packed, cores, *how, False, None, False, ids)

    def transposed(x, cores):
        return op(x, None, None, *case.packed, cores, *how, True, None, False, ids)

    for function, inputs in ((linear, (x, cores)), (transposed, (grad_y, cores))):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@LANGUAGES
def test_opcheck(language):
    case = make_case(5, 6, 9, 2)
    cores, ids = make_cores(case).requires_grad_(), torch.tensor(IDS["mixed"])
    x, grad_y = torch.randn(6, 3, 9), torch.randn(6, 3, 12)
    weight = case.weight[2:4].reshape(12, 9)

    def check(name, *args):
        torch.library.opcheck(contract.operator(name, language), args)

    x, grad_y = x.requires_grad_(), grad_y.requires_grad_()
    check("core_grad_tokens", x, grad_y, *case.packed, 5, 2, 2, ids, ADAPTERS)
    how = (2, 2, 0.5)
    z = (x.detach() @ case.packed[1].T).detach()
    for y_z in (None, z):
        check("cur_linear", x, weight, None, *case.packed, cores, *how, False, y_z, False, ids)
    check("cur_linear", grad_y, weight, None, *case.packed, cores, *how, True, None, False, ids)


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


@pytest.mark.parametrize("isa", _cpu.compiled_isas())
def test_every_instruction_set(isa):
    if isa not in _cpu.runnable_isas():
        pytest.skip(f"this processor has no {isa}")
    case = make_case(12, 11, 40, 5)
    cores, ids = make_cores(case, 40), torch.randint(40, (64,))
    x, grad_y = torch.randn(64, 9, 40), torch.randn(64, 9, 11)
    how = (7, 1, 0.5, False, None, False)

    def results(language):
        linear, grad = (contract.operator(n, language) for n in ("cur_linear", "core_grad_tokens"))
        y = linear(x, None, None, *case.packed, cores, *how, ids)
        return y, grad(x, grad_y, *case.packed, 12, 7, 1, ids, 40)

    spectra = case.double().spectra
    exact = (
        reference.slice_update(x.double(), *spectra, cores.double(), 7, 1, 0.5, ids),
        reference.core_grad_tokens(x.double(), grad_y.double(), *spectra, 12, 7, 1, ids, 40),
    )
    before = _cpu.chosen_isa()
    _cpu.use_isa(isa)
    try:
        for y, same, wanted in zip(results(""), results("reference"), exact, strict=True):
            assert_close(y, same, wanted)
    finally:
        _cpu.use_isa(before)


def test_gradients_do_not_depend_on_the_number_of_threads():
    ids, z = torch.randint(40, (64,)), torch.randn(64, 300, 12 * 5)
    # Small integers: the product dy Ĉ, which is torch's, has no rounding to differ in.
    grad_y = torch.randint(-3, 4, (64, 300, 11)).float()
    lateral_hat = torch.randint(-3, 4, (11, 12 * 5)).float()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            grad = torch.ops.tcur.core_grad_tokens
            results.append(grad(z, grad_y, lateral_hat, None, 12, 7, 1, ids, 40))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@LANGUAGES
def test_operators_refuse_what_has_one_core(language):
    case = make_case(4, 6, 9, 2)
    cores, ids = make_cores(case), torch.tensor([0, 1])
    linear, grad = (contract.operator(n, language) for n in ("cur_linear", "core_grad_tokens"))
    x = torch.randn(2, 9)
    with pytest.raises(RuntimeError, match="adapter_ids goes by the factors, without a dense"):
        linear(x, case.weight[0], None, *case.packed, cores, 0, 1, 1.0, False, None, True, ids)
    with pytest.raises(RuntimeError, match=r"adapter_ids goes .*without a dense gradient"):
        grad(torch.randn(6, 9), None, *case.packed, 4, 0, 1, ids, 5)
    with pytest.raises(RuntimeError, match="adapter_ids goes without packed gradients"):
        grad(x, torch.randn(2, 6), *case.packed, 4, 0, 1, ids, 5, True)


def test_compiled_operators_check_their_ids():
    """Called directly, past the Python layer, they refuse instead of reading out of bounds."""
    case = make_case(4, 6, 9, 2)
    cores, x = make_cores(case), torch.ones(4, 9)

    def linear(cores, ids):
        how = (0, 1, 1.0, False, None, False)
        torch.ops.tcur.cur_linear(x, None, None, *case.packed, cores, *how, ids)

    def grad(ids, adapters):
        y = torch.ones(4, 6)
        torch.ops.tcur.core_grad_tokens(x, y, *case.packed, 4, 0, 1, ids, adapters)

    for message, call in {
        r"core must be \[n3": lambda: linear(cores[0], torch.tensor([0])),
        "core has an unexpected shape": lambda: linear(cores[..., :1], torch.tensor([0])),
        r"adapter_ids must be int64 \[rows\]": lambda: linear(cores, torch.tensor([0.5])),
        "adapter_ids must have one entry": lambda: linear(cores, torch.tensor([0, 1, 2])),
        "adapter_ids out of range": lambda: linear(cores, torch.tensor([0, 5])),
        "out of range": lambda: grad(torch.tensor([-1]), 5),
        "adapters must not be negative": lambda: grad(torch.tensor([0]), -1),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


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
