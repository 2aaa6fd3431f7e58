"""Ways of training on one process: mixed precision, scaled losses, accumulated gradients."""

import copy

import pytest
import torch

import tcur_kernels as tcur
from models import Tiny


def adapted(mode="auto"):
    torch.manual_seed(0)
    adapter = tcur.adapt(Tiny().eval(), rank=2, mode=mode, train_also="head")
    with torch.no_grad():
        for stack in adapter.stacks.values():
            stack.core.normal_(std=0.3)
    return adapter


def gradients(adapter):
    return {name: p.grad.clone() for name, p in adapter.named_parameters()}


@pytest.mark.parametrize("mode", ["materialized", "factored"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_a_scaled_loss(mode, dtype):
    adapter, plain = adapted(mode), adapted(mode)
    x = torch.randn(8, 7, 6)
    plain.model(x).square().mean().backward()
    wanted = gradients(plain)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    with torch.autocast("cpu", dtype):
        loss = adapter.model(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for name, grad in gradients(adapter).items():
        assert grad.dtype == torch.float32
        error = (grad - wanted[name]).norm() / wanted[name].norm()
        assert error < 0.05, f"{name} is off by {error:.2g}"
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    scaler.step(optimizer)
    scaler.update()
    for name, parameter in adapter.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_a_step_with_an_overflow_is_left_out():
    """What GradScaler does with a gradient that is not finite must reach the cores."""
    adapter = adapted()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", torch.float16):
        loss = adapter.model(torch.full((8, 7, 6), 300.0)).square().mean() * 1e30
    scaler.scale(loss).backward()
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**10
    for name, parameter in adapter.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("mode", ["auto", "materialized", "factored"])
def test_accumulated_gradients_are_those_of_the_whole_batch(mode):
    adapter, whole = adapted(mode), adapted(mode)
    x = torch.randn(8, 7, 6)
    whole.model(x).square().mean().backward()
    for part in x.chunk(4):
        (adapter.model(part).square().mean() / 4).backward()
    wanted = gradients(whole)
    for name, grad in gradients(adapter).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_several_forwards_before_one_backward():
    """As contrastive losses do: two graphs on one core version, one of a model in evaluation."""
    adapter = adapted("materialized")
    x = torch.randn(2, 4, 7, 6)
    first, second = adapter.model(x[0]), adapter.model(x[1])
    with torch.no_grad():
        adapter.model(x[1])
    (first * second).sum().backward()
    twin = copy.deepcopy(adapter)
    twin.model.zero_grad()
    (twin.model(x[0]) * twin.model(x[1])).sum().backward()
    for name, grad in gradients(twin).items():
        torch.testing.assert_close(grad, gradients(adapter)[name])
