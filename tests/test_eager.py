"""Layers in eager mode: a node of their own, which gives what the operators give."""

import pytest
import torch
from torch import nn

import oracle
import tcur_kernels as tcur
from plain import product
from tcur_kernels.layers import route
from tcur_kernels.operators import eager
from tolerance import assert_composition_close, assert_equal_in_float64

MODES = pytest.mark.parametrize("mode", ["materialized", "factored"])
SIZES = {"z": (3, 9, 40), "x": (3, 9, 9), "dense": (12, 9, 9)}  # slices, n1, n2


def make_stack(mode, slices=3, n1=9, n2=40, dtype=torch.float32, bias=True, alpha=0.7):
    linears = [nn.Linear(n2, n1, bias, dtype=dtype).requires_grad_(False) for _ in range(slices)]
    stack = tcur.TProductStack(linears, rank=4, mode=mode, alpha=alpha)
    with torch.no_grad():
        stack.core.normal_()
    return stack


def by_operators(stack, layer, x, mode):
    """What a layer is by the public function, all of whose derivatives are the operators'."""
    effective = None
    if mode == "materialized":
        effective = stack.effective(x.dtype)[layer.tcur_place.slice_index]
    return tcur.cur_linear(
        x, layer.base_weight, layer.bias, stack.factors, stack.core,
        layer.tcur_place.slice_index, stack.scale,
        effective=effective,
    )  # fmt: skip


@MODES
@pytest.mark.parametrize("way", SIZES)
@pytest.mark.parametrize("alpha", [0.7, 1.0])
def test_values_and_both_derivatives_are_those_of_the_operators(mode, way, alpha):
    stack = make_stack(mode, *SIZES[way], dtype=torch.float64, alpha=alpha)
    layer, n2 = stack.layers[1], SIZES[way][2]
    x = torch.randn(2, 400, n2, dtype=torch.float64, requires_grad=True)

    def derivatives(y):
        first = torch.autograd.grad(y.sin().sum(), (x, stack.core), create_graph=True)
        loss = sum(g.square().sum() for g in first)
        return y, *first, *torch.autograd.grad(loss, (x, stack.core), retain_graph=True)

    y = layer(x)
    assert type(y.grad_fn).__name__ == "_LayerBackward"
    plain = torch.autograd.grad(y.sin().sum(), (x, stack.core), retain_graph=True)
    exact = derivatives(by_operators(stack, layer, x, mode))
    assert_equal_in_float64((*derivatives(y), *plain), (*exact, *exact[1:3]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_half_precision_is_that_of_the_operators(dtype, bias):
    stack = make_stack("factored", dtype=dtype, bias=bias)
    layer = stack.layers[1]
    x = torch.randn(30, 40, dtype=dtype, requires_grad=True)
    y, same = layer(x), by_operators(stack, layer, x, "factored")
    assert torch.equal(y, same)
    grads = torch.autograd.grad(y.sum(), (x, stack.core))
    of_operators = torch.autograd.grad(same.sum(), (x, stack.core))
    assert [g.dtype for g in grads] == [g.dtype for g in of_operators] == [dtype, torch.float32]
    factors = stack.lateral.float(), stack.horizontal.float()

    def by_torch(x, core, product):
        update = product(factors[0], core, factors[1])[layer.tcur_place.slice_index]
        w_eff = (layer.base_weight.to(update.dtype) + stack.scale * update).to(x.dtype)
        return [grad.to(x.dtype) for grad in torch.autograd.grad((x @ w_eff.T).sum(), (x, core))]

    wide = [t.detach().double().requires_grad_() for t in (x, stack.core)]
    exact = by_torch(*wide, oracle.cur_product)
    for found in (grads, of_operators):
        assert_composition_close(found, lambda: by_torch(x, stack.core, product), exact)


@MODES
def test_a_backward_within_autocast_keeps_its_precision(mode):
    """autocast reaches the products of torch, and must not reach those of the gradients."""
    stack = make_stack(mode)
    x = torch.randn(30, 40, requires_grad=True)
    y = stack.layers[1](x)
    wanted = torch.autograd.grad(y.sum(), (x, stack.core), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(y.sum(), (x, stack.core))
    assert all(map(torch.equal, grads, wanted))


@MODES
def test_gradients_in_batches(mode):
    stack = make_stack(mode, dtype=torch.float64)
    x = torch.randn(4, 40, dtype=torch.float64, requires_grad=True)
    y, grads = stack.layers[1](x), torch.randn(3, 4, 9, dtype=torch.float64)
    inputs = (x, stack.core)
    many = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, inputs, grad, retain_graph=True) for grad in grads]
    assert_equal_in_float64(many, [torch.stack(each) for each in zip(*single, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", SIZES)
def test_gradients_in_batches_of_every_way(way, dtype):
    stack = make_stack("factored", *SIZES[way], dtype=dtype)
    x = torch.randn(400, SIZES[way][2], dtype=dtype, requires_grad=True)
    y, grads = stack.layers[1](x), torch.randn(2, 400, 9, dtype=dtype)
    inputs = (x, stack.core)
    many = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, inputs, grad, retain_graph=True) for grad in grads]
    for found, wanted in zip(many, map(torch.stack, zip(*single, strict=True)), strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).norm() <= torch.finfo(found.dtype).eps * 8 * wanted.norm()


@MODES
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(3, 8), ValueError, r"x: expected \[..., 40\], got \[3, 8\]"),
        (torch.tensor(1.0), ValueError, "x: expected"),
        (torch.ones(3, 40).int(), TypeError, "x: expected a floating dtype"),
        (torch.ones(3, 40).half(), TypeError, "x: expected dtype torch.float32"),
    ],
)
def test_layers_refuse_what_does_not_fit(mode, x, error, message):
    layer = make_stack(mode).layers[1]
    layer(torch.ones(3, 40))
    with pytest.raises(error, match=message):
        layer(x)


@MODES
def test_layers_are_looked_at_once(mode, monkeypatch):
    stack = make_stack(mode)
    looked = []
    prepare = route.prepare
    monkeypatch.setattr(route, "prepare", lambda *args: looked.append(0) or prepare(*args))
    for _ in range(3):
        for layer in stack.layers:
            layer(torch.randn(5, 40)).sum().backward()
    assert len(looked) == len(stack.layers)
    nn.ModuleList([stack, *stack.layers]).double()
    for layer in stack.layers:
        layer(torch.randn(5, 40, dtype=torch.float64))
    assert len(looked) == 2 * len(stack.layers)


def test_a_bias_that_requires_grad_is_refused_in_forward():
    layer = make_stack("materialized").layers[1]
    layer(torch.ones(3, 40))
    layer.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="bias: expected a frozen tensor"):
        layer(torch.ones(3, 40))


@MODES
def test_calls_of_one_input_have_backwards_of_their_own(mode):
    """They share z, whose graph no backward of a layer frees."""
    stack = make_stack(mode, dtype=torch.float64)
    x = torch.randn(6, 40, dtype=torch.float64, requires_grad=True)
    for loss in [layer(x).sin().sum() for layer in stack.layers]:
        loss.backward()
    wanted = sum(by_operators(stack, layer, x, mode).sin().sum() for layer in stack.layers)
    found = (x.grad, stack.core.grad)
    assert_equal_in_float64(found, torch.autograd.grad(wanted, (x, stack.core)))


def test_without_autocast():
    a = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with eager.without_autocast():
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
