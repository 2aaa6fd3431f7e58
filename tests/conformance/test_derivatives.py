"""Derivatives of every operator: the operators are closed under differentiation."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tolerance import (
    PROMISE,
    assert_composition_close,
    assert_equal_in_float64,
    relative_error,
)

from .calls import call, plain
from .cases import ALL_SLOW, BF16, EMULATOR, F64, case
from .data import arguments

SIZES = (5, (3, 4, 2))
ROWS = {"tokens": (3, 2), "ids": "three", "adapters": 3}

#: Operators and the arguments that are differentiated.
DIFFERENTIABLE = {
    "materialize": ("core",),
    "core_grad_dense": ("grad",),
    "core_grad_tokens": ("x", "grad_y"),
    "cur_linear": ("x", "core"),
}


def cases(sizes, meant_for=(), slow=False, **how):
    """Each operator, with one core and with many, both ways; dtypes by ``how``."""
    slices = min(2, sizes[0])
    where = {"slices": slices, "first": sizes[0] - slices}
    how = {**how, "meant_for": meant_for}
    yield case("materialize", *sizes, **how)
    yield case("core_grad_dense", *sizes, **how)
    for amount in ({"tokens": (3,)}, ROWS):
        is_left = slow and amount is ROWS
        yield case("core_grad_tokens", *sizes, **where, **amount, **how, matrix=is_left)
        yield case("cur_linear", *sizes, **where, **amount, **how, matrix=is_left)
        yield case("cur_linear", *sizes, **where, **amount, **how, transposed=True, matrix=slow)


IN_FP32 = [
    *cases(SIZES, ALL_SLOW, slow=True),
    *[
        case("cur_linear", 4, (5, 6, 2), meant_for=ALL_SLOW, tokens=(7,), first=1, way_back=way)
        for way in ("z", "dense")
    ],
    *cases((5, (6, 9, 2)), EMULATOR),
]


@pytest.mark.once
@pytest.mark.cases(IN_FP32)
def test_first_and_second_derivatives(case, backend):
    """Against those that torch's own autograd makes of plain torch."""
    given, exact = arguments(case)
    of = DIFFERENTIABLE[case.operator]
    if case.get("way_back"):
        of = ("core",)
        way = case.get("way_back")
        given = {**given, "dense_grad": way == "dense"}
        if way == "z":
            given["z"] = given["x"] @ given["horizontal_hat"].T

    def ours(**given):
        return backend.run(case.operator, **given).cpu()

    def theirs(**given):
        return plain(case.operator, **given)

    wanted = derivatives(theirs, {**exact, "dense_grad": False} if "z" in given else exact, of)
    assert_composition_close(
        derivatives(ours, given, of), lambda: derivatives(theirs, given, of), wanted
    )


def derivatives(function, given, of):
    """First derivatives of the squares of a result, and second ones through all of them."""
    leaves = {name: given[name].detach().clone().requires_grad_() for name in of}
    value = function(**{**given, **leaves})
    first = torch.autograd.grad(value.square().sum(), list(leaves.values()), create_graph=True)
    length = sum(each.square().sum() for each in first)
    second = torch.autograd.grad(length, list(leaves.values()), materialize_grads=True)
    return *first, *second


IN_FP64 = [
    each
    for n3 in (1, 2, 5)
    for each in cases((n3, (3, 4, 2)), factors=F64, elements=(F64,))
    if each.operator in ("materialize", "cur_linear")
]


@pytest.mark.once
@pytest.mark.cases(IN_FP64)
def test_differences(case, backend):
    """First and second derivatives by differences."""
    given = arguments(case)[0]
    names = DIFFERENTIABLE[case.operator]
    leaves = [given[name].detach().clone().requires_grad_() for name in names]

    def function(*leaves):
        return backend.run(case.operator, **{**given, **dict(zip(names, leaves, strict=True))})

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


WAYS = [
    case(name, 5, (4, 6, 2), factors=F64, elements=(F64,), tokens=(2, 7), first=1, slices=slices)
    for name, slices in itertools.product(("cur_linear", "w_eff_linear"), (1, 3))
]


@pytest.mark.once
@pytest.mark.cases(WAYS)
@pytest.mark.parametrize("way", ["z", "dense"])
def test_every_way_to_the_gradient_of_the_core(case, backend, way):
    """Values, first and second derivatives agree with those by way of x, in float64."""
    given = arguments(case)[0]
    seed = torch.randn(2, 7, 4 * case.get("slices"), dtype=F64)

    def results(way):
        x, core = (given[name].detach().clone().requires_grad_() for name in ("x", "core"))
        z = x @ given["horizontal_hat"].T if way == "z" else None
        how = {"x": x, "core": core, "z": z, "dense_grad": way == "dense"}
        y = backend.run(case.operator, **{**given, **how})
        first = torch.autograd.grad(y.sin(), (x, core), seed, create_graph=True)
        second = torch.autograd.grad(first[1].square().sum(), (x, core), materialize_grads=True)
        return y, *first, *second

    assert_equal_in_float64(results(way), results(None))


LAYERS = [
    case("core_grad_tokens", n3, (6, 9, 3), tokens=(2, 20), packed=True, **how)
    for n3 in (1, 5, 12)
    for how in (
        {"meant_for": EMULATOR},
        {"meant_for": EMULATOR, "precision": "bf16", "elements": (BF16,)},
        {"meant_for": (), "factors": F64, "elements": (F64,)},
    )
]


@pytest.mark.cases(LAYERS)
def test_packed_gradients_end_as_the_gradient_does(case, backend):
    """Of all slices, added up and transformed once: the sum of the gradients."""
    given, exact = ({**each, "packed": False} for each in arguments(case))
    dtype = case.elements[0]
    tokens = [
        {"x": torch.randn(2, 20, 9).to(dtype), "grad_y": torch.randn(2, 20, 6).to(dtype)}
        | {"slice_index": index}
        for index in range(case.n3)
    ]
    run = backend.run_case(case)
    parts = [run(case.operator, **{**given, **each, "packed": True}) for each in tokens]
    actual = backend.run("core_of_packed", packed=torch.stack(parts), scale=0.7).cpu()
    assert actual.dtype == torch.promote_types(dtype, torch.float32)

    def summed(given, dtype):
        found = [
            plain(
                case.operator,
                **{**given, **each, **{name: each[name].to(dtype) for name in ("x", "grad_y")}},
            )
            for each in tokens
        ]
        return 0.7 * torch.stack(found).sum(0)

    wanted = summed(exact, F64)
    if case.precision == "bf16":
        assert relative_error(actual, wanted) <= PROMISE["bf16"]
    else:
        assert_composition_close(actual, lambda: summed(given, dtype), wanted)


@pytest.mark.once
def test_packed_gradients_have_no_derivative_and_say_so(backend):
    given = arguments(case("core_grad_tokens", 5, (6, 9, 2), tokens=(7,), first=1))[0]
    x = given["x"].clone().requires_grad_()
    packed = torch.randn(3, 5, 2, 2, requires_grad=True)
    part = backend.run("core_grad_tokens", **{**given, "x": x, "packed": True})
    core = backend.run("core_of_packed", packed=packed, scale=0.7)
    for result in (part, core):
        with pytest.raises(RuntimeError, match="packed gradients cannot be differentiated"):
            result.sum().backward()


FEW_TOKENS = [
    case("cur_linear", 4, (6, 9, 2), meant_for=ALL_SLOW, tokens=t, first=1, transposed=turned)
    for t in ((), (0,), (2, 0), (1,))
    for turned in (False, True)
]


@pytest.mark.cases(FEW_TOKENS)
def test_derivatives_of_one_token_and_of_none(case, backend):
    given = arguments(case)[0]
    x, core = (given[name].detach().clone().requires_grad_() for name in ("x", "core"))
    y = backend.run(case.operator, **{**given, "x": x, "core": core})
    assert y.shape == (*case.get("tokens"), 9 if case.get("transposed") else 6)
    grad_x, grad_core = torch.autograd.grad(y.sum(), (x, core))
    assert grad_x.shape == x.shape
    assert bool(grad_core.any()) == (x.numel() > 0)


@pytest.mark.cases(
    [case("w_eff_linear", 4, (6, 9, 2), meant_for=EMULATOR, tokens=(5,), first=1, bias=True)]
)
def test_a_map_by_w_eff_is_the_plain_one(case, backend):
    given = {name: backend.place(value) for name, value in arguments(case)[0].items()}
    y = call(case.operator, backend.languages["ieee"], **given)
    assert torch.equal(y, torch.nn.functional.linear(given["x"], given["w_eff"], given["bias"]))
