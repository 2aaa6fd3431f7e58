"""What holds for the operators of every language, for Triton's in its interpreter."""

import pytest
import torch

import oracle
import tcur_kernels as tcur
from cases import make_case, side_by_side
from checks import check, in_float64
from tcur_kernels.operators import contract
from tolerance import PROMISE, assert_composition_close, relative_error


def derivatives(function, args, places):
    """The value's first derivatives by some arguments, and second ones through all of them."""
    args = list(args)
    for place in places:
        args[place] = args[place].detach().requires_grad_()
    wanted = [args[place] for place in places]
    value = function(*args)
    first = torch.autograd.grad(value.square().sum(), wanted, create_graph=True)
    length = sum(d.square().sum() for d in first)
    return first + torch.autograd.grad(length, wanted, materialize_grads=True)


def check_derivatives(name, places, *args):
    actual = derivatives(contract.operator(name, "triton"), args, places)
    plain = contract.plain(name)  # which torch's own autograd differentiates
    exact = derivatives(plain, in_float64(args), places)
    assert_composition_close(actual, lambda: derivatives(plain, args, places), exact)


def test_derivatives_of_w_eff():
    case = make_case(5, 3, 4, 2)
    args = ([case.weight], *case.packed, case.core, 0.5, torch.float32)
    check_derivatives("materialize", [3], *args)
    check_derivatives("core_grad_dense", [0], case.weight, *case.packed)


@pytest.mark.parametrize("ids", [None, torch.tensor([1, 1, 0])], ids=["one", "per_token"])
@pytest.mark.parametrize("transposed", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_derivatives_of_a_layer(ids, transposed):
    case = make_case(5, 3, 4, 2)
    core = case.core if ids is None else torch.randn(2, 5, 2, 2)
    x, grad_y = torch.randn(3, 2, 4), torch.randn(3, 2, 6)
    weight = case.weight[1:3].reshape(6, 4)
    args = (grad_y if transposed else x, weight, None, *case.packed, core, 1, 2, 0.5)
    check_derivatives("cur_linear", [0, 5], *args, transposed, None, False, ids)
    adapters = (None, 1) if ids is None else (ids, 2)
    check_derivatives("core_grad_tokens", [0, 1], x, grad_y, *case.packed, 5, 1, 2, *adapters)


@pytest.mark.parametrize("way", ["z", "dense"])
def test_every_way_to_the_gradient_of_the_core(way):
    case = make_case(4, 5, 6, 2)
    x = torch.randn(7, 6)
    z = x @ case.packed[1].T if way == "z" else None
    args = (x, case.weight[1], None, *case.packed, case.core, 1, 1, 0.5, False)
    check_derivatives("cur_linear", [5], *args, z, way == "dense")


@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted):
    """Schema, fake, autograd registration and traced behaviour, as torch itself checks them."""
    case = make_case(3, 4, 5, 2)

    def lay_out(tensor):  # the same values with permuted strides
        return tensor.mT.contiguous().mT if permuted else tensor

    def check_op(name, *args, **kwargs):
        torch.library.opcheck(contract.operator(name, "triton"), args, kwargs)

    factors = tuple(lay_out(t) for t in case.packed)
    core = lay_out(case.core).requires_grad_()
    weights = [lay_out(w) for w in case.weight]
    x, grad_y = lay_out(torch.randn(7, 5)), lay_out(torch.randn(7, 8))
    check_op("materialize", weights, *factors, core, 0.5, torch.float32)
    check_op("materialize", [], *factors, core, 0.5, torch.bfloat16)
    out = torch.zeros(3, 4, 5)
    check_op("materialize_out", weights, *factors, core.detach(), 0.5, out=out)
    beside = [lay_out(w) for w in side_by_side(case.weight, [2, 1])]
    check_op("materialize_out", beside, *factors, core.detach(), 0.5, out=torch.zeros(60))
    check_op("core_grad_dense", lay_out(torch.randn(3, 4, 5)).requires_grad_(), *factors)
    x, grad_y = x.requires_grad_(), grad_y.requires_grad_()
    check_op("core_grad_tokens", x, grad_y, *factors, 3, 1, 2)
    tokens = (x.detach(), grad_y.detach())  # packed there is no derivative
    check_op("core_grad_tokens", *tokens, *factors, 3, 1, 2, None, 1, True)
    check_op("core_of_packed", lay_out(torch.randn(3, 3, 2, 2)), 0.7)
    weight = torch.cat(weights[1:3])
    check_op("cur_linear", x, weight, torch.randn(8), *factors, core, 1, 2, 0.5, False)
    check_op("cur_linear", grad_y, weight, None, *factors, core, 1, 2, 0.5, True)
    check_op("w_eff_linear", x, weight, None, *factors, core, 1, 2, 0.5, False)


def test_inputs_may_be_strided():
    case = make_case(6, 8, 20, 2)
    weight = torch.randn(6, 8, 40)[:, :, ::2]
    factors = [t.mT.contiguous().mT for t in case.packed]
    core = case.core.mT.contiguous().mT
    check("materialize", [weight], *factors, core, 0.5, torch.float32)
    check("materialize", list(weight), *factors, core, 0.5, torch.float32)
    check("core_grad_dense", weight, *factors)
    x, grad_y = torch.randn(20, 7).T, torch.randn(7, 1).expand(7, 8)
    check("core_grad_tokens", x, grad_y, *factors, 6, 1, 1)
    check("core_of_packed", torch.randn(2, 6, 2, 4)[..., ::2], 0.7)
    check("cur_linear", x, weight[1], None, *factors, core, 1, 1, 0.5, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n3", [3, 7, 18])
def test_zero_core_and_special_values(n3, dtype):
    case = make_case(n3, 5, 37, 3, weight_dtype=dtype)
    case.core.zero_()
    case.weight[0, 0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    if dtype != torch.bfloat16:  # the interpreter has no denormals there
        case.weight[1, 0, 0] = 1e-40
    op = torch.ops.tcur.materialize_triton
    w_eff = op([case.weight], *case.packed, case.core, 0.5, dtype)
    assert torch.equal(w_eff.isnan(), case.weight.isnan())
    assert torch.equal(w_eff.nan_to_num(), case.weight.nan_to_num())


def test_the_same_bits_at_every_run():
    case = make_case(3, 6, 20, 2)
    grad, x, grad_y = torch.randn(3, 6, 20), torch.randn(600, 20), torch.randn(600, 6)
    for name, args in (
        ("core_grad_dense", (grad, *case.packed)),
        ("core_grad_tokens", (x, grad_y, *case.packed, 3, 1, 1)),
        ("core_grad_tokens", (x, grad_y, *case.packed, 3, 1, 1, None, 1, True)),
    ):
        op = contract.operator(name, "triton")
        assert torch.equal(op(*args), op(*args))


def test_autocast_does_not_reach_inside():
    case = make_case(5, 6, 9, 2)
    x, core = torch.randn(7, 9), case.core.requires_grad_()
    op = torch.ops.tcur.cur_linear_triton
    args = (case.weight[1], None, *case.packed, core, 1, 1, 0.5, False)
    expected = op(x, *args)
    (expected_grad,) = torch.autograd.grad(expected.sum(), core)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(x, *args)
        (grad,) = torch.autograd.grad(y.sum(), core)
    assert torch.equal(y, expected)
    assert torch.equal(grad, expected_grad)


def test_schemas_are_those_of_the_other_languages():
    for name in contract.OPERATORS:
        for language in ("triton", "triton_tf32"):
            ours = contract.operator(name, language)._schema
            theirs = contract.operator(name, "reference")._schema
            texts = [
                str(schema).replace("SymInt", "int").partition("(")[2] for schema in (ours, theirs)
            ]
            assert texts[0] == texts[1]  # sizes of `triton_op` are all symbolic


def test_the_public_face():
    case = make_case(4, 6, 9, 2)
    factors, core = case.factors, case.core
    exact = oracle.cur_product(case.lateral, core, case.horizontal)
    exact_w_eff = case.weight.double() + exact
    assert "triton" in tcur.build_info()["backends"]
    for precision in ("ieee", "tf32", "bf16"):
        how = {"backend": "triton", "precision": precision}
        product = tcur.cur_product(factors, core, **how)
        out = tcur.materialize(case.weight, factors, core, out=torch.empty(4, 6, 9), **how)
        w_eff = tcur.materialize(list(case.weight), factors, core, **how)
        assert torch.equal(out, w_eff)
        y = tcur.cur_linear(torch.eye(9), case.weight[1], None, factors, core, 1, **how)
        for actual, wanted in ((product, exact), (w_eff, exact_w_eff), (y, exact_w_eff[1].T)):
            assert relative_error(actual, wanted) <= PROMISE[precision]
    with pytest.raises(TypeError, match=r"factors: expected dtype torch.float32 for 'triton'"):
        tcur.cur_product(case.double().factors, core.double(), backend="triton")


def test_operators_check_their_shapes():
    """Called directly, past the Python layer, they refuse instead of reading out of bounds."""
    case = make_case(4, 6, 9, 2)
    packed, core, op = case.packed, case.core, torch.ops.tcur
    x, y = torch.ones(2, 9), torch.ones(2, 6)
    calls = {
        "core": lambda: op.materialize_triton([], *packed, core[:, :1], 1.0, torch.float32),
        "weights": lambda: op.materialize_triton(
            [case.weight[:, :3]], *packed, core, 1.0, torch.float32
        ),
        "weights: expected 4": lambda: op.materialize_triton(
            list(case.weight[:3]), *packed, core, 1.0, torch.float32
        ),
        "out: expected .216.": lambda: op.materialize_triton(
            side_by_side(case.weight, [3, 1]), *packed, core, 1.0, torch.float32
        ),
        "weights: expected torch.float32": lambda: op.materialize_triton(
            [case.weight[0].half(), *case.weight[1:]][::-1], *packed, core, 1.0, torch.float32
        ),
        "horizontal_hat": lambda: op.core_grad_dense_triton(
            case.weight, packed[0], packed[1][:3]
        ),
        "slice_index": lambda: op.core_grad_tokens_triton(x, y, *packed, 4, 4, 1),
        "grad_y": lambda: op.core_grad_tokens_triton(x, torch.ones(3, 6), *packed, 4, 0, 1),
        "x": lambda: op.cur_linear_triton(
            x[:, :8], None, None, *packed, core, 0, 1, 1.0, False
        ),
        "lateral_hat: expected float32": lambda: op.core_grad_dense_triton(
            case.weight.double(), packed[0].double(), packed[1].double()
        ),
        "packed: expected False with adapter_ids": lambda: op.core_grad_tokens_triton(
            x, y, *packed, 4, 0, 1, torch.zeros(2, dtype=torch.int64), 1, True
        ),
        r"packed: expected \[2, 4, 2, 2\]": lambda: op.core_of_packed_triton(
            torch.ones(2, 4, 2, 3), 1.0
        ),
        r"packed: expected \[m, n3, r, r\]": lambda: op.core_of_packed_triton(core, 1.0),
        "packed: expected float32": lambda: op.core_of_packed_triton(core[None].double(), 1.0),
        "adapter_ids": lambda: op.cur_linear_triton(
            x, None, None, *packed, core[None], 0, 1, 1.0, False, None, False,
            torch.zeros(3, dtype=torch.int64),
        ),
    }  # fmt: skip
    for message, call in calls.items():
        with pytest.raises((ValueError, TypeError), match=message):
            call()
