"""Products of the precision "bf16" on processors with units for them, and on those without."""

import subprocess
import sys

import pytest
import torch
from torch.profiler import profile

import tcur_kernels as tcur
from cases import make_case
from tcur_kernels.operators import bf16_products, contract, functional, reference
from tolerance import PROMISE, assert_close, relative_error

N3, N1, N2, RANK, PLACE = 4, 24, 40, 3, 2
WITHOUT = "operands rounded to bf16, multiplied in fp32"


@pytest.fixture
def units(request, monkeypatch):
    """A processor that has the units, or has not."""
    torch._dynamo.reset()  # what was compiled for one processor is not for another
    monkeypatch.setattr(bf16_products, "_units", request.param)
    return request.param


BOTH = pytest.mark.parametrize("units", [True, False], indirect=True, ids=["units", "none"])
NONE = pytest.mark.parametrize("units", [False], indirect=True, ids=["none"])
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
WAYS = pytest.mark.parametrize("way", ["x", "z", "dense"])


def make_stack(**how):
    """Three layers of one shape, with a core that is not zero."""
    linears = [torch.nn.Linear(N2, N1).requires_grad_(False) for _ in range(3)]
    stack = tcur.TProductStack(linears, rank=RANK, **how)
    with torch.no_grad():
        stack.core.normal_()
    return stack


def rounded(*tensors):
    return [each.bfloat16().float() for each in tensors]


def bf16_products_of(function):
    """How many products of bf16 matrices torch is asked for, within operators too."""
    with profile(record_shapes=True) as recorded:
        function()
    return sum(
        event.name() in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
        and "c10::BFloat16" in event.dtypes()
        for event in recorded.profiler.kineto_results.events()
    )


def step(case, factors, backend, way, x, **how):
    """The output of a layer, and the gradients of its tokens and core."""
    x, core = x.clone().requires_grad_(), case.core.clone().requires_grad_()
    if way == "z":
        how["z"] = functional.project(x.detach(), factors, how.get("precision", "ieee"))
    how["dense_grad"] = way == "dense"
    y = tcur.cur_linear(x, case.weight[PLACE], None, factors, core, PLACE, 0.5, backend, **how)
    y.square().sum().backward()
    return y.detach(), x.grad, core.grad


@BOTH
@BACKENDS
@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_are_as_good(units, backend, way, dtype):
    case, x = make_case(N3, N1, N2, RANK, weight_dtype=dtype), torch.randn(50, N2).to(dtype)
    found = step(case, case.factors, backend, way, x, precision="bf16")
    exact = step(case.double(), case.double().factors, backend, "x", x.double())
    for name, actual, wanted in zip(("y", "x", "core"), found, exact, strict=True):
        assert actual.dtype == (torch.float32 if name == "core" else dtype)
        # y and the gradient of x are in the dtype of the weight; its rounding is no product's
        is_rounded_twice = dtype == torch.bfloat16
        assert relative_error(actual, wanted) <= PROMISE["bf16"] * (1 + is_rounded_twice), name


@NONE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["x", "G"])
@pytest.mark.parametrize("language", contract.LANGUAGES)
def test_operands_are_rounded_and_nothing_else(units, language, way, dtype):
    """As exact as fp32 is of the rounded operands, and not of the operands as they were."""
    case = make_case(N3, N1, N2, RANK)
    x, grad_y = torch.randn(N1, N2).to(dtype), torch.randn(N1, N1).to(dtype)
    if way == "G":
        grad_y = None
    lateral_hat, horizontal_hat = case.factors.packed("bf16")
    for packed, wide in zip((lateral_hat, horizontal_hat), case.packed, strict=True):
        assert torch.equal(packed, *rounded(wide))
    where = {"n3": N3, "slice_index": PLACE, "slices": 1}
    actual = contract.operator("core_grad_tokens", language)(
        x, grad_y, lateral_hat, horizontal_hat, *where.values(), bf16_operands=True
    )

    def plain(x, grad_y, packed, to):
        grad_y = torch.eye(N1, dtype=to) if grad_y is None else grad_y.to(to)
        left = packed[0].to(to).reshape(N1, N3, RANK).movedim(1, 0)
        right = packed[1].to(to).reshape(N3, RANK, N2)
        spectra = reference.unpack(left), reference.unpack(right)
        return reference.core_grad_tokens(x.to(to), grad_y, *spectra, **where)

    tokens = rounded(*(each for each in (x, grad_y) if each is not None))
    tokens = tokens if len(tokens) == 2 else [*tokens, None]
    packed = lateral_hat, horizontal_hat
    exact = plain(*tokens, packed, torch.float64)
    assert_close(actual, plain(*tokens, packed, torch.float32), exact)
    unrounded = plain(x, grad_y, case.packed, torch.float64)
    assert 1e-4 < relative_error(actual, unrounded) <= PROMISE["bf16"]


@BOTH
def test_z_is_what_it_was(units):
    case, x = make_case(N3, N1, N2, RANK), torch.randn(2, 7, N2)
    z = functional.project(x, case.factors, "bf16")
    assert (z.dtype, z.shape) == (torch.bfloat16, (2, 7, N3 * RANK))
    tokens, horizontal_hat = rounded(x, case.packed[1])
    exact = tokens.double() @ horizontal_hat.double().T
    assert_close(z, (tokens @ horizontal_hat.T).bfloat16(), exact)


@BOTH
@BACKENDS
@WAYS
def test_without_units_no_matrices_in_bf16_are_multiplied(units, backend, way):
    case, x = make_case(N3, N1, N2, RANK), torch.randn(50, N2)
    count = bf16_products_of(lambda: step(case, case.factors, backend, way, x, precision="bf16"))
    if not units:
        assert count == 0
    elif backend == "cpu":
        assert count > 0


@NONE
@pytest.mark.parametrize("mode", ["factored", "materialized"])
@pytest.mark.parametrize("tokens", [3, 300])
def test_under_autocast_only_the_products_of_a_frozen_layer_are_in_bf16(units, mode, tokens):
    """Those with the weight: one forward, one for the gradient of the tokens."""
    stack = make_stack(mode=mode)
    x = torch.randn(tokens, N2, requires_grad=True)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            y = stack.layers[1](x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()

    run()
    assert bf16_products_of(run) == 2
    assert stack.core.grad is not None


@NONE
def test_factors_are_rounded_once(units):
    factors = make_case(N3, N1, N2, RANK).factors
    packed = factors.packed("bf16")
    assert factors.packed("bf16") is packed
    assert factors.packed()[0] is factors.lateral_hat
    assert {each.dtype for each in packed} == {torch.float32}


@BOTH
def test_the_rest_is_for_processors_alone(units):
    """Shapes on the meta device have the dtypes that every device has."""
    case = make_case(N3, N1, N2, RANK)
    factors = case.factors.to("meta")
    assert not factors.bf16_operands("bf16")
    assert functional.project(torch.randn(5, N2, device="meta"), factors, "bf16").dtype == (
        functional.project(torch.randn(5, N2), case.factors, "bf16").dtype
    )


@BOTH
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_step(units, autocast):
    stack = make_stack(mode="factored", precision="bf16")
    x = torch.randn(50, N2)

    def run(layer):
        stack.core.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.float().square().sum().backward()
        return y.detach(), stack.core.grad

    compiled = torch.compile(stack.layers[1], backend="aot_eager", fullgraph=True)
    for actual, wanted in zip(run(compiled), run(stack.layers[1]), strict=True):
        assert actual.dtype == wanted.dtype
        assert relative_error(actual, wanted) <= PROMISE["bf16"] * (1 + autocast)


@BOTH
def test_an_exported_layer(units):
    """The layer itself runs afterwards as it did."""
    stack = make_stack(mode="factored", precision="bf16")
    x = torch.randn(5, N2)
    exported = torch.export.export(stack.layers[1], (x,)).module()
    assert relative_error(exported(x), stack.layers[1](x)) <= PROMISE["bf16"]
    assert bf16_products_of(lambda: exported(x)) == (2 if units else 0)


@NONE
def test_a_transform_of_functorch(units):
    case, x = make_case(N3, N1, N2, RANK), torch.randn(6, 5, N2)
    factors, exact = case.factors, case.double()

    def loss(core, x, weight, factors, precision):
        how = {"precision": precision}
        y = tcur.cur_linear(x, weight, None, factors, core, PLACE, 0.5, **how)
        return y.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, None, None, None))
    found = each(case.core, x, case.weight[PLACE], factors, "bf16")
    given = exact.core, x.double(), exact.weight[PLACE], exact.factors, "ieee"
    assert relative_error(found, each(*given)) <= PROMISE["bf16"]


@NONE
def test_second_derivatives(units):
    case, x = make_case(N3, N1, N2, RANK), torch.randn(9, N2)

    def second(case, factors, x, **how):
        core = case.core.requires_grad_()
        y = tcur.cur_linear(x, case.weight[PLACE], None, factors, core, PLACE, 0.5, **how)
        (grad,) = torch.autograd.grad(y.pow(3).sum(), core, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), core)[0]

    found = second(case, case.factors, x, precision="bf16")
    exact = second(case.double(), case.double().factors, x.double())
    # The second derivative is a product of three numbers that were rounded, the first of them y.
    assert relative_error(found, exact) <= 3 * PROMISE["bf16"]


@BOTH
def test_build_info_says_what_runs(units):
    products = tcur.build_info()["products"]
    assert products == {"cpu": {"ieee": "fp32", "bf16": "bf16" if units else WITHOUT}}


@pytest.mark.parametrize(
    ("onednn", "takes_bf16", "machine", "avx512_bf16", "wanted"),
    [
        (True, True, "x86_64", True, True),
        (True, True, "x86_64", False, False),  # AVX-512 that emulates
        (True, True, "AMD64", False, False),
        (True, False, "x86_64", False, False),  # AVX2
        (True, False, "x86_64", True, False),  # oneDNN is held to AVX2
        (True, True, "aarch64", False, True),
        (True, False, "aarch64", False, False),
        (False, True, "arm64", False, False),  # torch's own loop
    ],
)
def test_which_processors_have_units(monkeypatch, onednn, takes_bf16, machine, avx512_bf16, wanted):
    monkeypatch.setattr(bf16_products, "_units", None)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: takes_bf16)
    monkeypatch.setattr(bf16_products.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert bf16_products.has_units() is wanted
    monkeypatch.setattr(bf16_products, "_ask", lambda: pytest.fail("asked twice"))
    assert bf16_products.has_units() is wanted


def test_the_processor_is_asked_when_it_matters_alone():
    code = """
import torch, tcur_kernels as tcur
from tcur_kernels.operators import bf16_products
factors = tcur.CURFactors(torch.randn(4, 6, 2), torch.randn(4, 2, 5))
tcur.cur_product(factors, torch.randn(4, 2, 2))
print(bf16_products._units)
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (result.stdout.strip(), result.stderr) == ("None", "")


def test_factors_in_bf16_are_not_held_in_fp32():
    lateral_hat, horizontal_hat = (each.bfloat16() for each in make_case(4, 6, 9, 2).packed)
    given = torch.randn(3, 9), torch.randn(3, 6), lateral_hat, horizontal_hat, 4, 0, 1
    with pytest.raises(RuntimeError, match="lateral_hat must be fp32 with bf16_operands"):
        torch.ops.tcur.core_grad_tokens(*given, bf16_operands=True)
