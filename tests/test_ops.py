"""Every operator in every language: values, gradients, contracts, edges."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import oracle
from cases import N3, counts_of, make_case, side_by_side, slices_of
from plain import product
from tcur_kernels.operators import contract, reference
from tolerance import (
    PROMISE,
    assert_close,
    assert_composition_close,
    assert_equal_in_float64,
    relative_error,
)

LANGUAGES = pytest.mark.parametrize(
    "language", contract.LANGUAGES, ids=lambda name: name or "compiled"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: (n1, n2, rank): one number; fewer rows than a tile and a ragged edge; one full tile; several.
SHAPES = ((1, 1, 1), (3, 5, 3), (4, 64, 1), (13, 150, 8), (9, 515, 2))


def materialize(language, case, scale=0.5, out_dtype=None, layers=False):
    weights = [w.clone() for w in case.weight] if layers else [case.weight]
    op = contract.operator("materialize", language)
    return op(weights, *case.packed, case.core, scale, out_dtype or case.weight.dtype)


@LANGUAGES
@pytest.mark.parametrize("n3", N3)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_materialize_update(language, n3, shape):
    """The update alone: fp32 against the definition, within the bound and the promise."""
    case = make_case(n3, *shape)
    exact = oracle.cur_product(case.lateral, case.core, case.horizontal)
    update = contract.operator("materialize", language)(
        [], *case.packed, case.core, 1.0, torch.float32
    )
    assert update.is_contiguous()
    assert_close(update, reference.cur_product(case.spectra[0], case.core, case.spectra[1]), exact)
    assert relative_error(update, exact) <= PROMISE["ieee"]


@LANGUAGES
@pytest.mark.parametrize("layers", [False, True], ids=["stack", "layers"])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_materialize_dtypes(language, layers, weight_dtype, out_dtype):
    wide = torch.float64 if torch.float64 in (weight_dtype, out_dtype) else torch.float32
    case = make_case(12, 6, 70, 3, wide, weight_dtype)
    double = case.double()
    exact = oracle.w_eff(double.weight, double.lateral, double.core, double.horizontal, 0.5)
    torch_same = reference.materialize(case.weight, *case.spectra, case.core, 0.5).to(out_dtype)
    w_eff = materialize(language, case, out_dtype=out_dtype, layers=layers)
    assert w_eff.dtype == out_dtype
    assert_close(w_eff, torch_same, exact)


@LANGUAGES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_core_gives_the_weights_back(language, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    case = make_case(7, 5, 37, 3, wide, dtype)
    case.core.zero_()
    assert torch.equal(materialize(language, case), case.weight)


@LANGUAGES
def test_special_values_pass_through(language):
    case = make_case(4, 3, 20, 2, torch.float32, torch.float32)
    case.core.zero_()
    case.weight[0, 0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    case.weight[1, 0, 0] = 1e-40  # a denormal
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w_eff = materialize(language, case, out_dtype=dtype)
        expected = case.weight.to(dtype)
        assert torch.equal(torch.isnan(w_eff), torch.isnan(expected))
        assert torch.equal(torch.nan_to_num(w_eff), torch.nan_to_num(expected))


@LANGUAGES
def test_materialize_into_a_buffer(language):
    case = make_case(5, 6, 40, 2)
    out = torch.full((5, 6, 40), float("nan"))
    op = contract.operator("materialize_out", language)
    assert op([case.weight], *case.packed, case.core, 0.5, out=out) is None
    assert torch.equal(out, materialize(language, case))


def materialize_beside(language, case, counts, out_dtype):
    """W_eff from matrices of slices side by side, as slices."""
    n3, n1, n2 = case.weight.shape
    out = torch.full((n3 * n1 * n2,), float("nan"), dtype=out_dtype)
    weights = side_by_side(case.weight, counts)
    op = contract.operator("materialize_out", language)
    assert op(weights, *case.packed, case.core, 0.5, out=out) is None
    return slices_of(out, counts, n1, n2)


#: Edges of every kind; rows that are written past the caches, aligned for that and not.
BESIDE = [
    *[(n3, n1, n2, counts_of(n3)) for n3 in N3[1:] for n1, n2 in ((1, 1), (3, 5), (13, 150))],
    (6, 130, 1408, [3, 1, 2]),
    (6, 130, 1400, [2, 3, 1]),
    (12, 5, 70, [12]),
]


@LANGUAGES
@pytest.mark.parametrize(("n3", "n1", "n2", "counts"), BESIDE, ids=str)
def test_materialize_side_by_side(language, n3, n1, n2, counts):
    case = make_case(n3, n1, n2, 1)
    double = case.double()
    exact = oracle.w_eff(double.weight, double.lateral, double.core, double.horizontal, 0.5)
    torch_same = reference.materialize(case.weight, *case.spectra, case.core, 0.5)
    w_eff = materialize_beside(language, case, counts, torch.float32)
    assert_close(w_eff, torch_same, exact)
    assert torch.equal(w_eff, materialize(language, case))


@LANGUAGES
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_materialize_side_by_side_dtypes(language, weight_dtype, out_dtype):
    wide = torch.float64 if torch.float64 in (weight_dtype, out_dtype) else torch.float32
    case = make_case(12, 6, 70, 3, wide, weight_dtype)
    double = case.double()
    exact = oracle.w_eff(double.weight, double.lateral, double.core, double.horizontal, 0.5)
    torch_same = reference.materialize(case.weight, *case.spectra, case.core, 0.5).to(out_dtype)
    w_eff = materialize_beside(language, case, [3, 1, 2, 3, 3], out_dtype)
    assert_close(w_eff, torch_same, exact)


@LANGUAGES
def test_side_by_side_of_any_strides(language):
    case = make_case(4, 5, 6, 2)
    weights = [w.T.contiguous().T for w in side_by_side(case.weight, [3, 1])]
    out = torch.empty(120)
    contract.operator("materialize_out", language)(weights, *case.packed, case.core, 0.5, out=out)
    assert torch.equal(slices_of(out, [3, 1], 5, 6), materialize(language, case))


@LANGUAGES
def test_side_by_side_goes_into_a_flat_buffer(language):
    """Nothing else is written, or read out of bounds; there is no derivative by that way."""
    case = make_case(4, 5, 6, 2)
    weights, packed = side_by_side(case.weight, [3, 1]), case.packed
    write, make = (contract.operator(name, language) for name in ("materialize_out", "materialize"))
    for out in (torch.empty(4, 5, 6), torch.empty(119), torch.empty(240)[::2]):
        before = out.fill_(7).clone()
        if out.is_contiguous() or language != "reference":
            with pytest.raises(RuntimeError, match="tcur: out "):
                write(weights, *packed, case.core, 0.5, out=out)
            assert torch.equal(out, before)
    flat, last = torch.empty(120), torch.empty(5, 9)
    for given in (weights[:1], [*weights, case.weight[0]], [weights[0], last], [last, weights[1]]):
        with pytest.raises(RuntimeError):
            write(given, *packed, case.core, 0.5, out=flat)
    with pytest.raises(RuntimeError):
        make(weights, *packed, case.core, 0.5, torch.float32)
    with pytest.raises(RuntimeError):
        write(list(case.weight), *packed, case.core, 0.5, out=flat)


@LANGUAGES
@pytest.mark.parametrize("n3", N3)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_core_grad_dense(language, n3, shape):
    case = make_case(n3, *shape)
    grad = torch.randn_like(case.weight)
    exact = reference.core_grad_dense(grad.double(), *case.double().spectra)
    torch_same = reference.core_grad_dense(grad, *case.spectra)
    actual = contract.operator("core_grad_dense", language)(grad, *case.packed)
    assert actual.is_contiguous()
    assert_close(actual, torch_same, exact)


@LANGUAGES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_grad_dense_dtypes(language, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    case = make_case(12, 6, 70, 3, wide)
    grad = torch.randn(12, 6, 70).to(dtype)
    exact = reference.core_grad_dense(grad.double(), *case.double().spectra)
    torch_same = reference.core_grad_dense(grad.to(wide), *case.spectra)
    actual = contract.operator("core_grad_dense", language)(grad, *case.packed)
    assert actual.dtype == wide
    assert_close(actual, torch_same, exact)


@LANGUAGES
@pytest.mark.parametrize("n3", N3)
@pytest.mark.parametrize(("tokens", "slices"), [((1,), 1), ((3, 5), 3), ((600,), 2), ((0,), 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_core_grad_tokens(language, n3, tokens, slices, packed):
    slices = min(slices, n3)
    first = (n3 - slices) // 2
    case = make_case(n3, 6, 9, 3)
    x, grad_y = torch.randn(*tokens, 9), torch.randn(*tokens, slices * 6)
    args = (n3, first, slices, None, 1, packed)
    exact = reference.core_grad_tokens(x.double(), grad_y.double(), *case.double().spectra, *args)
    torch_same = reference.core_grad_tokens(x, grad_y, *case.spectra, *args)
    actual = contract.operator("core_grad_tokens", language)(x, grad_y, *case.packed, *args)
    assert actual.is_contiguous()
    assert_close(actual, torch_same, exact)


@LANGUAGES
@pytest.mark.parametrize("n3", N3)
@pytest.mark.parametrize("count", [0, 1, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_core_of_packed(language, n3, count, dtype):
    packed = torch.randn(count, n3, 3, 3, dtype=dtype)
    actual = contract.operator("core_of_packed", language)(packed, 0.7)
    assert actual.is_contiguous()
    assert actual.dtype == dtype
    same = reference.core_of_packed(packed, 0.7)
    assert_close(actual, same, reference.core_of_packed(packed.double(), 0.7))
    wide = packed.double().mT.contiguous().mT[:, :, ::2]  # strided
    strided = contract.operator("core_of_packed", language)(wide[..., ::2], 0.7)
    exact = reference.core_of_packed(packed.double()[:, :, ::2, ::2].contiguous(), 0.7)
    assert_equal_in_float64(strided, exact)


@LANGUAGES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n3", [1, 5, 12])
def test_packed_gradients_end_as_the_gradient_does(language, dtype, n3):
    """Of all slices, added up and transformed once: the sum of the gradients."""
    case = make_case(n3, 6, 9, 3, torch.promote_types(dtype, torch.float32))
    hats = [hat.to(dtype) for hat in case.packed]  # bf16: projections in that precision
    op = contract.operator("core_grad_tokens", language)
    tokens = [[torch.randn(2, 20, n).to(dtype) for n in (9, 6)] for _ in range(n3)]
    packed = [op(*each, *hats, n3, i, 1, None, 1, True) for i, each in enumerate(tokens)]
    actual = contract.operator("core_of_packed", language)(torch.stack(packed), 0.7)
    assert actual.dtype == torch.promote_types(dtype, torch.float32)

    def summed(wide, spectra):
        each = [reference.core_grad_tokens(*wide(t), *spectra, n3, i) for i, t in enumerate(tokens)]
        return 0.7 * torch.stack(each).sum(0)

    exact = summed(lambda t: [each.double() for each in t], case.double().spectra)
    if dtype == torch.bfloat16:
        assert relative_error(actual, exact) <= PROMISE["bf16"]
    else:
        assert_composition_close(actual, lambda: summed(lambda t: t, case.spectra), exact)


@LANGUAGES
def test_packed_gradients_have_no_derivative_and_say_so(language):
    case = make_case(5, 6, 9, 2)
    x, packed = torch.randn(7, 9, requires_grad=True), torch.randn(3, 5, 2, 2, requires_grad=True)
    op = contract.operator("core_grad_tokens", language)
    part = op(x, torch.randn(7, 6), *case.packed, 5, 1, 1, None, 1, True)
    core = contract.operator("core_of_packed", language)(packed, 0.7)
    for result in (part, core):
        with pytest.raises(RuntimeError, match="packed gradients cannot be differentiated"):
            result.sum().backward()


@LANGUAGES
@pytest.mark.parametrize("n3", [1, 2, 7, 12])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_core_grad_tokens_of_projected_tokens_and_of_a_dense_gradient(language, n3, rank):
    case = make_case(n3, 10, 9, rank)
    x, grad_y = torch.randn(70, 9), torch.randn(70, 10)
    args = (n3, n3 - 1, 1)
    exact = reference.core_grad_tokens(x.double(), grad_y.double(), *case.double().spectra, *args)
    lateral_hat, horizontal_hat = case.packed
    op = contract.operator("core_grad_tokens", language)
    ways = (
        op(x @ horizontal_hat.T, grad_y, lateral_hat, None, *args),
        op(grad_y.T @ x, None, lateral_hat, horizontal_hat, *args),
    )
    # A composition, with the product that comes first. One number may have no error by chance.
    spectra = case.spectra
    for actual in ways:
        assert_composition_close(
            actual, lambda: reference.core_grad_tokens(x, grad_y, *spectra, *args), exact
        )


@LANGUAGES
@pytest.mark.parametrize("way", ["z", "dense"])
@pytest.mark.parametrize("name", ["cur_linear", "w_eff_linear"])
@pytest.mark.parametrize("slices", [1, 3])
def test_every_way_to_the_gradient_of_the_core(language, way, name, slices):
    """Values, first and second derivatives agree with those by way of x, in float64."""
    case = make_case(5, 4, 6, 2, torch.float64)
    op = contract.operator(name, language)
    packed, horizontal_hat = case.packed, case.packed[1]
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    core = case.core.requires_grad_()
    weight = torch.randn(4 * slices, 6, dtype=torch.float64)
    seed = torch.randn(2, 7, 4 * slices, dtype=torch.float64)

    def results(z, dense):
        args = (core, 1, slices, 0.5, False, z, dense)
        y = op(x, weight, None, *packed, *args)
        first = torch.autograd.grad(y.sin(), (x, core), seed, create_graph=True)
        second = torch.autograd.grad(first[1].square().sum(), (x, core), materialize_grads=True)
        return y, *first, *second

    z = x @ horizontal_hat.T if way == "z" else None
    assert_equal_in_float64(results(z, way == "dense"), results(None, False))


@LANGUAGES
@pytest.mark.parametrize("n3", [1, 12, 47])
def test_bf16_projections_keep_their_promise(language, n3):
    case = make_case(n3, 40, 50, 8)
    x, grad_y = torch.randn(300, 50), torch.randn(300, 40)
    packed = case.factors.packed("bf16")
    double = case.double()
    op = contract.operator("cur_linear", language)
    y = op(x, None, None, *packed, case.core, n3 - 1, 1, 0.5, False)
    exact = reference.slice_update(x.double(), *double.spectra, double.core, n3 - 1, 1, 0.5)
    assert y.dtype == torch.float32
    assert relative_error(y, exact) <= PROMISE["bf16"]
    grad = contract.operator("core_grad_tokens", language)(x, grad_y, *packed, n3, n3 - 1, 1)
    exact = reference.core_grad_tokens(x.double(), grad_y.double(), *double.spectra, n3, n3 - 1)
    assert grad.dtype == torch.float32
    assert relative_error(grad, exact) <= PROMISE["bf16"]


@LANGUAGES
@pytest.mark.parametrize("n3", N3)
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("slices", [1, 3])
def test_cur_linear(language, n3, rank, transposed, slices):
    slices = min(slices, n3)
    first = n3 - slices
    case = make_case(n3, 10, 9, rank)
    double = case.double()
    w_eff = oracle.w_eff(double.weight, double.lateral, double.core, double.horizontal, 0.5)
    w_eff = w_eff[first:].reshape(slices * 10, 9)
    weight = case.weight[first:].reshape(slices * 10, 9)
    x = torch.randn(2, 70, slices * 10 if transposed else 9)
    bias = None if transposed else torch.randn(slices * 10)
    op = contract.operator("cur_linear", language)
    y = op(x, weight, bias, *case.packed, case.core, first, slices, 0.5, transposed)
    if transposed:
        exact = x.double() @ w_eff
        update = reference.slice_update_transposed(x, *case.spectra, case.core, first, slices, 0.5)
        torch_same = x @ weight + update
    else:
        exact = F.linear(x.double(), w_eff, bias.double())
        torch_same = reference.cur_linear(
            x, weight, bias, *case.spectra, case.core, first, slices, 0.5
        )
    assert y.is_contiguous()
    assert_close(y, torch_same, exact)
    alone = op(x, None, None, *case.packed, case.core, first, slices, 0.5, transposed)
    update_exact = exact - (
        x.double() @ weight.double()
        if transposed
        else F.linear(x.double(), weight.double(), bias.double())
    )
    args = (*case.spectra, case.core, first, slices, 0.5)
    same = reference.slice_update_transposed if transposed else reference.slice_update
    assert_close(alone, same(x, *args), update_exact)


@LANGUAGES
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (1,)], ids=str)
def test_cur_linear_of_one_token_and_of_none(language, transposed, leading):
    case = make_case(4, 6, 9, 2)
    core = case.core.requires_grad_()
    x = torch.randn(*leading, 6 if transposed else 9, requires_grad=True)
    op = contract.operator("cur_linear", language)
    y = op(x, case.weight[1], None, *case.packed, core, 1, 1, 0.5, transposed)
    assert y.shape == (*leading, 9 if transposed else 6)
    grad_x, grad_core = torch.autograd.grad(y.sum(), (x, core))
    assert grad_x.shape == x.shape
    assert (grad_core.abs().max() == 0) == (x.numel() == 0)


@LANGUAGES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_cur_linear_dtypes(language, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    case = make_case(12, 6, 20, 3, wide, dtype)
    double = case.double()
    x = torch.randn(40, 20).to(dtype)
    w_eff = oracle.w_eff(double.weight, double.lateral, double.core, double.horizontal, 0.5)
    exact = F.linear(x.double(), w_eff[3])
    op = contract.operator("cur_linear", language)
    y = op(x, case.weight[3], None, *case.packed, case.core, 3, 1, 0.5, False)
    assert y.dtype == dtype
    torch_same = reference.cur_linear(x, case.weight[3], None, *case.spectra, case.core, 3, 1, 0.5)
    assert_close(y, torch_same, exact)


@LANGUAGES
def test_a_linear_map_by_w_eff_is_the_plain_one(language):
    case = make_case(4, 6, 9, 2)
    x, bias = torch.randn(5, 9), torch.randn(6)
    op = contract.operator("w_eff_linear", language)
    y = op(x, case.weight[1], bias, *case.packed, case.core, 1, 1, 0.5, False)
    assert torch.equal(y, F.linear(x, case.weight[1], bias))


@LANGUAGES
@pytest.mark.parametrize("n3", [1, 2, 5])
def test_derivatives(language, n3):
    """First and second derivatives: the operators are closed under differentiation."""
    case = make_case(n3, 3, 4, 2, torch.float64)
    core = case.core.clone().requires_grad_()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    first, slices = (0, 1) if n3 == 1 else (n3 - 2, 2)
    weight = case.weight[first:].reshape(slices * 3, 4)

    def w_eff(core):
        op = contract.operator("materialize", language)
        return op([case.weight], *case.packed, core, 0.5, torch.float64)

    def linear(x, core):
        op = contract.operator("cur_linear", language)
        return op(x, weight, None, *case.packed, core, first, slices, 0.5, False)

    def transposed(x, core):
        op = contract.operator("cur_linear", language)
        return op(x, None, None, *case.packed, core, first, slices, 0.5, True)

    grad_y = torch.randn(3, slices * 3, dtype=torch.float64, requires_grad=True)
    for function, inputs in ((w_eff, (core,)), (linear, (x, core)), (transposed, (grad_y, core))):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@LANGUAGES
@pytest.mark.parametrize("dense", [False, True], ids=["contiguous", "permuted"])
def test_opcheck(language, dense):
    """Schema, fake, autograd registration and traced behaviour, as torch itself checks them."""
    case = make_case(5, 6, 9, 2)

    def lay_out(tensor):  # the same values with permuted strides
        return tensor.mT.contiguous().mT if dense else tensor

    lateral_hat, horizontal_hat = (lay_out(t) for t in case.packed)
    core = lay_out(case.core).requires_grad_()
    weights = [lay_out(w) for w in case.weight]
    x, grad_y = lay_out(torch.randn(7, 9)), lay_out(torch.randn(7, 12))
    factors = (lateral_hat, horizontal_hat)

    def check(name, *args, **kwargs):
        torch.library.opcheck(contract.operator(name, language), args, kwargs)

    check("materialize", weights, *factors, core, 0.5, torch.float32)
    check("materialize", [], *factors, core, 0.5, torch.bfloat16)
    out = torch.zeros(5, 6, 9)
    check("materialize_out", weights, *factors, core.detach(), 0.5, out=out)
    beside = [lay_out(w) for w in side_by_side(case.weight, [3, 2])]
    check("materialize_out", beside, *factors, core.detach(), 0.5, out=torch.zeros(270))
    grad = lay_out(torch.randn(5, 6, 9)).requires_grad_()
    check("core_grad_dense", grad, *factors)
    check("core_grad_tokens", x.requires_grad_(), grad_y.requires_grad_(), *factors, 5, 2, 2)
    weight = torch.cat(weights[2:4])
    for name in ("cur_linear", "w_eff_linear"):
        check(name, x, weight, None, *factors, core, 2, 2, 0.5, False)
    check("cur_linear", x, weight, torch.randn(12), *factors, core, 2, 2, 0.5, False)
    check("cur_linear", grad_y, weight, None, *factors, core, 2, 2, 0.5, True)
    z = torch.randn(7, factors[0].shape[1])
    check("w_eff_linear", x, weight, None, *factors, core, 2, 2, 0.5, False, z)
    check("core_grad_tokens", z, grad_y, factors[0], None, 5, 2, 2)
    check("core_grad_tokens", torch.randn(6, 9), None, *factors, 5, 2, 1)
    tokens = (x.detach(), grad_y.detach())  # packed there is no derivative
    check("core_grad_tokens", *tokens, *factors, 5, 2, 2, None, 1, True)
    check("core_of_packed", lay_out(torch.randn(3, 5, 2, 2)), 0.7)


@LANGUAGES
def test_inputs_may_be_strided(language):
    case = make_case(6, 8, 20, 2)
    wide = torch.randn(6, 8, 40)
    case.weight = wide[:, :, ::2]
    strided = materialize(language, case)
    case.weight = case.weight.contiguous()
    assert torch.equal(strided, materialize(language, case))
    x, grad_y = torch.randn(20, 7).T, torch.randn(7, 1).expand(7, 8)
    exact = reference.core_grad_tokens(x.double(), grad_y.double(), *case.double().spectra, 6, 1)
    same = reference.core_grad_tokens(x, grad_y, *case.spectra, 6, 1)
    op = contract.operator("core_grad_tokens", language)
    assert_close(op(x, grad_y, *case.packed, 6, 1, 1), same, exact)
    args = (case.core, 1, 1, 0.5)
    exact = reference.cur_linear(
        x.double(),
        case.weight[1].double(),
        None,
        *case.double().spectra,
        case.core.double(),
        1,
        1,
        0.5,
    )
    same = reference.cur_linear(x, case.weight[1], None, *case.spectra, *args)
    op = contract.operator("cur_linear", language)
    assert_close(op(x, case.weight[1], None, *case.packed, *args, False), same, exact)


@LANGUAGES
def test_fullgraph_with_two_shapes_and_one_compilation(language):
    case = make_case(5, 6, 9, 2)
    core, packed = case.core.requires_grad_(), case.packed

    def step(x, core):
        linear = contract.operator("cur_linear", language)
        y = linear(x, case.weight[1], None, *packed, core, 1, 1, 0.5, False)
        w = contract.operator("materialize", language)(
            [case.weight], *packed, core, 0.5, torch.float32
        )
        return y.square().sum() + w.square().sum()

    def plain(x, case):
        x, core = (t.detach().to(case.core.dtype).requires_grad_() for t in (x, case.core))
        w = case.weight + 0.5 * product(case.lateral, core, case.horizontal)
        loss = (x @ w[1].T).square().sum() + w.square().sum()
        return torch.autograd.grad(loss, (x, core))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (7, 11):
            x = torch.randn(tokens, 9, requires_grad=True)
            exact = plain(x, case.double())
            for function in (step, compiled):
                actual = torch.autograd.grad(function(x, core), (x, core))
                assert_composition_close(actual, lambda x=x: plain(x, case), exact)


@LANGUAGES
def test_autocast_does_not_reach_inside(language):
    case = make_case(5, 6, 9, 2)
    core = case.core.requires_grad_()
    x = torch.randn(7, 9)
    op = contract.operator("cur_linear", language)
    args = (case.weight[1], None, *case.packed, core, 1, 1, 0.5, False)
    expected = op(x, *args)
    (expected_grad,) = torch.autograd.grad(expected.sum(), core)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(x, *args)
        (grad,) = torch.autograd.grad(y.sum(), core)
    assert torch.equal(y, expected)
    assert torch.equal(grad, expected_grad)


def test_compiled_operators_check_their_shapes():
    """Called directly, past the Python layer, they refuse instead of reading out of bounds."""
    case = make_case(4, 6, 9, 2)
    lateral_hat, horizontal_hat = case.packed
    calls = {
        "core": lambda: torch.ops.tcur.materialize(
            [], lateral_hat, horizontal_hat, case.core[:, :1], 1.0, torch.float32
        ),
        "weights": lambda: torch.ops.tcur.materialize(
            [case.weight[:, :3]], lateral_hat, horizontal_hat, case.core, 1.0, torch.float32
        ),
        "must be": lambda: torch.ops.tcur.core_grad_dense(
            case.weight, lateral_hat, horizontal_hat[:3]
        ),
        "slice_index": lambda: torch.ops.tcur.core_grad_tokens(
            torch.ones(2, 9), torch.ones(2, 6), lateral_hat, horizontal_hat, 4, 4, 1
        ),
        "without packed gradients": lambda: torch.ops.tcur.core_grad_tokens(
            torch.ones(2, 9), torch.ones(2, 6), lateral_hat, horizontal_hat, 4, 0, 1,
            torch.zeros(2, dtype=torch.int64), 1, True,
        ),
        "packed must be .m": lambda: torch.ops.tcur.core_of_packed(torch.ones(2, 4, 2, 3), 1.0),
        "packed must be fp32": lambda: torch.ops.tcur.core_of_packed(
            torch.ones(2, 4, 2, 2).bfloat16(), 1.0
        ),
        "same tokens": lambda: torch.ops.tcur.core_grad_tokens(
            torch.ones(2, 9), torch.ones(3, 6), lateral_hat, horizontal_hat, 4, 0, 1
        ),
        "x has": lambda: torch.ops.tcur.cur_linear(
            torch.ones(2, 8), None, None, lateral_hat, horizontal_hat, case.core,
            0, 1, 1.0, False,
        ),
    }  # fmt: skip
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=message):
            call()
