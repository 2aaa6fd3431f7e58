"""Inputs without a token: an empty result, and gradients of zeros, as of nn.Linear."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tcur_kernels as tcur
from tcur_kernels.operators import functional

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((0,), (2, 0), (0, 3), (0, 0), (2, 0, 3))

pytestmark = [
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("shape", SHAPES, ids=str),
    pytest.mark.parametrize("bias", [False, True]),
]


def make_stack(dtype, bias, mode="auto", n1=9, n2=40, slices=3):
    linears = [nn.Linear(n2, n1, bias, dtype=dtype).requires_grad_(False) for _ in range(slices)]
    stack = tcur.TProductStack(linears, rank=4, mode=mode)
    nn.init.normal_(stack.core)
    return stack


def check(y, same, x, core):
    assert y.shape == same.shape
    assert y.dtype == same.dtype
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert x.grad.dtype == x.dtype
    assert torch.equal(core.grad, torch.zeros_like(core))


@pytest.mark.parametrize("mode", ["auto", "materialized", "factored"])
@pytest.mark.parametrize("sizes", [(9, 40, 3), (9, 9, 3), (9, 9, 12)])  # gradients by z, x, dense
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_layers(mode, sizes, dtype, shape, bias, autocast):
    stack = make_stack(dtype, bias, mode, *sizes)
    layer, x = stack.layers[1], torch.zeros(*shape, sizes[1], dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y, same = layer(x), F.linear(x, layer.base_weight, layer.bias)
    check(y, same, x, stack.core)


def test_rows_of_several_adapters(dtype, shape, bias):
    stack = make_stack(dtype, bias)
    cores = torch.randn(5, *stack.core.shape, dtype=stack.core.dtype, requires_grad=True)
    layer, x = stack.layers[1], torch.zeros(*shape, 40, dtype=dtype, requires_grad=True)
    with stack.batch(cores, torch.zeros(shape[0], dtype=torch.int64)):
        y = layer(x)
    check(y, F.linear(x, layer.base_weight, layer.bias), x, cores)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("way", ["factors", "effective", "z", "dense", "adapters"])
def test_the_public_function(backend, way, dtype, shape, bias):
    stack = make_stack(dtype, bias)
    layer, core, factors = stack.layers[1], stack.core, stack.factors
    x = torch.zeros(*shape, 40, dtype=dtype, requires_grad=True)
    how = {}
    if way == "effective":
        how["effective"] = layer.base_weight
    elif way == "z":
        how["z"] = functional.project(x.detach(), factors)
    elif way == "dense":
        how["dense_grad"] = True
    elif way == "adapters":
        core = torch.stack([stack.core.detach()] * 2).requires_grad_()
        how["adapter_ids"] = torch.zeros(shape[0], dtype=torch.int64)
    y = tcur.cur_linear(x, layer.base_weight, layer.bias, factors, core, 1, backend=backend, **how)
    check(y, F.linear(x, layer.base_weight, layer.bias), x, core)
