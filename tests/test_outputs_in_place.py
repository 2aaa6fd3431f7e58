"""What a layer returns may be changed in place, as what nn.Linear returns."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tcur_kernels as tcur
from plain import product
from tcur_kernels.operators import contract
from tolerance import assert_composition_close, same_mathematics

MODES = pytest.mark.parametrize("mode", ["materialized", "factored"])
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = DTYPES[2:]
AXES = {1: (), 2: (6,), 3: (2, 6), 4: (2, 3, 4)}


def set_to_zero(y):
    y[..., 1] = 0.0
    return y


def scaled_part(y):
    y.narrow(-1, 3, 3).sub_(1).relu_()
    return y


def divided_transpose(y):
    view = y.transpose(-1, 0)
    view /= 2
    return view


CHANGES = {
    "relu": lambda y: y.relu_(),
    "module": nn.ReLU(inplace=True),
    "times": lambda y: y.mul_(2),
    "added": lambda y: y.add_(y.detach()),
    "view": lambda y: y.view(-1, 3).mul_(2),
    "zero": set_to_zero,
    "part": scaled_part,
    "transpose": divided_transpose,
}


def make_stack(mode, dtype, bias=True, core=True):
    linears = [nn.Linear(40, 9, bias, dtype=dtype).requires_grad_(False) for _ in range(3)]
    stack = tcur.TProductStack(linears, rank=4, mode=mode, alpha=0.7)
    if core:
        nn.init.normal_(stack.core)
    return stack


@MODES
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_changed_result(mode, change, axes, bias):
    stack = make_stack(mode, torch.float32, bias)
    layer = stack.layers[1]
    x = torch.randn(*AXES[axes], 40)

    def by_torch(dtype):
        own, core = (t.detach().to(dtype).requires_grad_() for t in (x, stack.core))
        update = product(stack.lateral.to(dtype), core, stack.horizontal.to(dtype))
        w_eff = layer.base_weight.to(dtype) + stack.scale * update[1]
        y = change(F.linear(own, w_eff, None if layer.bias is None else layer.bias.to(dtype)))
        return (y, *torch.autograd.grad(y.sin().sum(), (own, core)))

    x.requires_grad_()
    y = change(layer(x))
    actual = (y, *torch.autograd.grad(y.sin().sum(), (x, stack.core)))
    assert_composition_close(actual, lambda: by_torch(torch.float32), by_torch(torch.float64))


@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_zero_core_changes_no_bit_and_results_are_no_views(mode, dtype, axes, bias, grad):
    stack = make_stack(mode, dtype, bias, core=False)
    layer, x = stack.layers[1], torch.randn(*AXES[axes], 40, dtype=dtype, requires_grad=grad)
    y = layer(x)
    assert torch.equal(y, F.linear(x, layer.base_weight, layer.bias))
    assert not y._is_view()
    for change in CHANGES.values():
        change(layer(x)).float().sum().backward()
    with torch.no_grad():
        y = layer(x)
    y.mul_(stack.core.sum().to(dtype))  # what a view made without gradients would refuse
    assert y.requires_grad


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_results_of_the_public_function(dtype, effective, backend, autocast):
    stack = make_stack("factored", dtype)
    layer, x = stack.layers[1], torch.randn(2, 6, 40, dtype=dtype, requires_grad=True)
    w_eff = stack.effective(dtype)[1] if effective else None
    how = {"effective": w_eff, "backend": backend}
    args = (layer.base_weight, layer.bias, stack.factors, stack.core, 1, stack.scale)

    def grads(change):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            y = change(tcur.cur_linear(x, *args, **how))
        return y, *torch.autograd.grad(y.float().sin().sum(), (x, stack.core))

    changed, same = grads(lambda y: y.view(-1, 3).mul_(2).view_as(y)), grads(lambda y: 2 * y)
    assert all(map(torch.equal, changed, same))
    with torch.no_grad():
        y = tcur.cur_linear(x, *args, **how)
    assert y.mul_(stack.core.sum().to(dtype)).requires_grad


@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_later_operation_needs_is_not_changed_unseen(mode, dtype):
    stack = make_stack(mode, dtype)
    for result in (stack.layers[1], lambda x: stack.layers[1](x).view(-1)):
        y = result(torch.randn(2, 6, 40, dtype=dtype))
        loss = y.sigmoid().mul(y).sum()
        version = y._version
        y.mul_(2)
        assert y._version == version + 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# torch's own, when it traces a function of autograd.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_layers(dtype):
    torch._dynamo.reset()
    stack = make_stack("factored", dtype)
    layer, x = stack.layers[1], torch.randn(2, 6, 40, dtype=dtype)
    for change in (CHANGES["relu"], CHANGES["view"], CHANGES["zero"], CHANGES["transpose"]):
        compiled = torch.compile(
            lambda x, change=change: change(layer(x)), backend="aot_eager", fullgraph=True
        )
        y, same = compiled(x), change(layer(x))
        assert torch.equal(y, same)
        grads = [torch.autograd.grad(each.float().sum(), stack.core)[0] for each in (y, same)]
        assert same_mathematics(*grads)


@pytest.mark.parametrize("language", contract.LANGUAGES, ids=lambda name: name or "compiled")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["cur_linear", "w_eff_linear"])
def test_results_of_the_operator(language, transposed, name):
    stack = make_stack("factored", torch.float32)
    x = torch.randn(2, 6, 9 if transposed else 40, requires_grad=True)
    weight, bias = stack.layers[1].base_weight, None if transposed else stack.layers[1].bias
    packed, core = stack.factors.packed(), stack.core
    how = (1, 1, 0.7, transposed)
    y = contract.operator(name, language)(x, weight, bias, *packed, core, *how)
    y.view(-1).mul_(2).sum().backward()
    assert x.grad is not None
