"""Ways of training on one process: mixed precision, scaled losses, accumulated gradients."""

import pytest
import torch

import tcur_kernels as tcur
from models import Tiny
from plain import Plain
from tolerance import assert_composition_close


def adapted(mode="auto"):
    torch.manual_seed(0)
    adapter = tcur.adapt(Tiny().eval(), rank=2, mode=mode, train_also="head")
    with torch.no_grad():
        for stack in adapter.stacks.values():
            stack.core.normal_(std=0.3)
    return adapter


def gradients(adapter):
    return tuple(p.grad.clone() for p in adapter.parameters())


def mean_square(y):
    return y.square().mean()


@pytest.mark.parametrize("mode", ["materialized", "factored"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_a_scaled_loss(mode, dtype):
    adapter, x = adapted(mode), torch.randn(8, 7, 6)
    plain, scale = Plain(adapter), 2.0**10 if dtype == torch.float16 else 1.0
    exact = Plain(adapter, torch.float64).with_gradients(mean_square, x.double())[1:]

    def by_plain_torch():
        with torch.autocast("cpu", dtype):
            y = plain(x)
        grads = torch.autograd.grad(scale * mean_square(y.float()), plain.trained)
        return [(grad / scale).to(dtype) for grad in grads]

    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype == torch.float16)
    with torch.autocast("cpu", dtype):
        y = adapter.model(x)
    scaler.scale(mean_square(y.float())).backward()
    scaler.unscale_(optimizer)
    grads = gradients(adapter)
    assert {grad.dtype for grad in grads} == {torch.float32}
    # The bound belongs to the precision of the products, which the dtype of the gradients hides.
    assert_composition_close([grad.to(dtype) for grad in grads], by_plain_torch, exact)
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
    x, plain = torch.randn(8, 7, 6), Plain(adapter)
    mean_square(whole.model(x)).backward()
    for part in x.chunk(4):
        (mean_square(adapter.model(part)) / 4).backward()
    exact = Plain(adapter, torch.float64).with_gradients(mean_square, x.double())[1:]
    for each in (adapter, whole):
        grads = gradients(each)
        assert_composition_close(grads, lambda: plain.with_gradients(mean_square, x)[1:], exact)


def test_several_forwards_before_one_backward():
    """As contrastive losses do: two graphs on one core version, one of a model in evaluation."""
    adapter = adapted("materialized")
    x = torch.randn(2, 4, 7, 6)
    first, second = adapter.model(x[0]), adapter.model(x[1])
    with torch.no_grad():
        adapter.model(x[1])
    (first * second).sum().backward()

    def run(plain, x):
        return torch.autograd.grad((plain(x[0]) * plain(x[1])).sum(), plain.trained)

    plain, exact = Plain(adapter), run(Plain(adapter, torch.float64), x.double())
    assert_composition_close(gradients(adapter), lambda: run(plain, x), exact)
