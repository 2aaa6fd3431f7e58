"""The gradient of a core is the same by every way, and by ways that differ from layer to layer."""

import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tcur_kernels as tcur
from plain import base_slices, product
from tcur_kernels.layers.route import Routed
from tcur_kernels.operators import cost
from tolerance import PROMISE, assert_composition_close, assert_equal_in_float64, relative_error

SIZE, SLICES, RANK = 6, (1, 1, 1, 1), 2
#: The layers take them in turn; "dense" is gathered where W_eff is built.
WAYS = [("z",), ("x",), ("dense",), ("dense", "z"), ("x", "dense", "dense"), ("dense", "x", "z")]
EVERY_WAY = pytest.mark.parametrize("ways", WAYS, ids="-".join)


@pytest.fixture
def stack_by(monkeypatch):
    """Makes a stack whose layers go by these ways in turn, each always by the same."""

    def make(ways, mode="materialized", slices=SLICES, dtype=torch.float64, conv=False):
        place = []
        by_node = Routed._by_node

        def noted(self, given):
            place[:] = [given.place.slice_index]
            return by_node(self, given)

        def choose(*sizes, at_once):
            return ways[place[0] % len(ways)]

        monkeypatch.setattr(Routed, "_by_node", noted)
        monkeypatch.setattr(cost, "choose_gradient", choose)
        linears = [nn.Linear(SIZE, k * SIZE, dtype=dtype).requires_grad_(False) for k in slices]
        if conv:  # stored as GPT-2's Conv1D stores them
            for linear in linears:
                linear.weight.data = linear.weight.data.T.contiguous().T
        stack = tcur.TProductStack(linears, rank=RANK, mode=mode, alpha=0.7)
        with torch.no_grad():
            stack.core.normal_()
        return stack

    return make


def tokens(dtype=torch.float64, count=5):
    return torch.randn(2, count, SIZE, dtype=dtype, requires_grad=True)


def by_torch(stack, x, loss_of, dtype=torch.float64):
    """Gradients of a loss by x and by the core: ``loss_of`` takes layers and tokens."""
    x, core = (t.detach().to(dtype).requires_grad_() for t in (x, stack.core))
    base = torch.stack(base_slices(stack)).to(dtype)
    w_eff = base + stack.scale * product(stack.lateral.to(dtype), core, stack.horizontal.to(dtype))
    sizes = [place.slices for place in stack.places]
    layers = [
        partial(F.linear, weight=w.flatten(0, 1), bias=layer.bias.to(dtype))
        for w, layer in zip(w_eff.split(sizes), stack.layers, strict=True)
    ]
    return torch.autograd.grad(loss_of(layers, x), (x, core))


def side_by_side(layers, x):
    return sum(layer(x).sin().sum() for layer in layers)


def twice(layers, x):
    return side_by_side(layers, x) + side_by_side(layers, 0.5 * x)


def some(layers, x):
    return side_by_side(layers[1:2], x)


def chained(layers, x):
    for layer in layers:
        x = layer(x).sin()
    return x.sum()


def one_within_another(layers, x, reentrant=None):
    """Layers before and after a block, which may be a checkpoint; the last one is the first."""

    def block(x):
        return layers[2](layers[1](x).sin()).sin()

    y = layers[0](x)
    y = block(y) if reentrant is None else checkpoint(block, y, use_reentrant=reentrant)
    return layers[0](layers[3](y).sin()).sin().sum()


@EVERY_WAY
@pytest.mark.parametrize("mode", ["materialized", "factored"])
@pytest.mark.parametrize("loss_of", [side_by_side, twice, some, chained, one_within_another])
def test_the_gradient_is_that_of_plain_torch(stack_by, ways, mode, loss_of):
    stack, x = stack_by(ways, mode), tokens()
    loss = loss_of(stack.layers, x)
    wanted = by_torch(stack, x, loss_of)
    (found,) = torch.autograd.grad(loss, stack.core, retain_graph=True)
    assert_equal_in_float64(found, wanted[1])
    loss.backward(retain_graph=True)
    assert_equal_in_float64((x.grad, stack.core.grad), wanted)
    loss.backward()
    assert_equal_in_float64((x.grad, stack.core.grad), [2 * each for each in wanted])


@EVERY_WAY
@pytest.mark.parametrize("slices", [(1, 3, 1), (2, 2), (4,)], ids=str)
@pytest.mark.parametrize("conv", [False, True])
def test_layers_of_several_slices_and_transposed_ones(stack_by, ways, slices, conv):
    stack, x = stack_by(ways, slices=slices, conv=conv), tokens()
    twice(stack.layers, x).backward()
    assert_equal_in_float64((x.grad, stack.core.grad), by_torch(stack, x, twice))


@EVERY_WAY
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_within_another(stack_by, ways, reentrant):
    """The inner pass runs the node while layers of the outer one have written their part."""
    stack, x = stack_by(ways), tokens()
    one_within_another(stack.layers, x, reentrant).backward()
    assert_equal_in_float64((x.grad, stack.core.grad), by_torch(stack, x, one_within_another))


@EVERY_WAY
def test_passes_of_several_threads(stack_by, ways):
    """Graphs that share a node, each of whose backward passes waits for the other in between."""
    stack, barrier = stack_by(ways), threading.Barrier(2)
    inputs = [tokens(), tokens()]
    layers = stack.layers
    losses = [chained([*layers[:2], meeting(barrier), *layers[2:]], x) for x in inputs]
    found = [None, None]

    def run(i):
        found[i] = torch.autograd.grad(losses[i], (inputs[i], stack.core))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, grads in zip(inputs, found, strict=True):
        wanted = by_torch(stack, x, lambda layers, x: chained([*layers[:2], _same, *layers[2:]], x))
        assert_equal_in_float64(grads, wanted)


def _same(x):
    return x * 1.0


def meeting(barrier):
    def layer(x):
        y = _same(x)
        y.register_hook(lambda grad: (barrier.wait(10), None)[1])
        return y

    return layer


@EVERY_WAY
def test_a_gradient_of_tokens_alone_leaves_nothing(stack_by, ways):
    stack, x = stack_by(ways), tokens()
    loss = chained(stack.layers, x)
    wanted = by_torch(stack, x, chained)
    assert_equal_in_float64(torch.autograd.grad(loss, x, retain_graph=True)[0], wanted[0])
    assert stack._gradient_sum._latest().gathered.is_empty
    loss.backward()
    assert_equal_in_float64((x.grad, stack.core.grad), wanted)
    assert stack._gradient_sum._latest().gathered.is_empty


@EVERY_WAY
def test_a_pass_that_fails(stack_by, ways):
    """What it left is used by no other pass, and goes with its graph."""
    stack, x = stack_by(ways), tokens()
    y = stack.layers[0](x)
    handle = y.register_hook(lambda grad: 1 / 0)
    loss = side_by_side(stack.layers[1:], y.sin())
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    assert stack.core.grad is None
    left = weakref.ref(stack._gradient_sum._latest())
    after, wanted = chained(stack.layers, x), by_torch(stack, x, chained)
    (found,) = torch.autograd.grad(after, stack.core)
    assert_equal_in_float64(found, wanted[1])
    handle.remove()
    (found,) = torch.autograd.grad(loss, stack.core)  # the same graph once more
    of_failed = by_torch(stack, x, lambda layers, x: side_by_side(layers[1:], layers[0](x).sin()))
    assert_equal_in_float64(found, of_failed[1])
    is_left = not left().gathered.is_empty
    del loss, y, handle
    gc.collect()
    assert not is_left or left() is None


@EVERY_WAY
def test_other_slices_between_a_forward_and_its_backward(stack_by, ways):
    """A graph keeps the C and R that it was made with, although the next one has others."""
    stack, x = stack_by(ways), tokens()
    loss, wanted = chained(stack.layers, x), by_torch(stack, x, chained)
    stack.base.choose((3, 5), (0, 4))
    after, wanted_after = chained(stack.layers, x), by_torch(stack, x, chained)
    (loss + after).backward()
    assert_equal_in_float64(
        (x.grad, stack.core.grad), [a + b for a, b in zip(wanted, wanted_after, strict=True)]
    )


@EVERY_WAY
@pytest.mark.parametrize("count", [0, 1, 4000])
def test_tokens_of_16_bits_are_summed_in_fp32(stack_by, ways, count):
    """Their products are exact in fp32, so only the factors by tokens are rounded to bf16."""
    stack = stack_by(ways, dtype=torch.float32)
    x = tokens(torch.float32, count).detach().bfloat16()
    grads = [torch.randn(2, count, SIZE).bfloat16() for _ in range(8)]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [layer(x) for layer in (*stack.layers, *stack.layers)]
    torch.autograd.backward(outputs, grads)

    def loss_of(layers, x):
        outputs = [layer(x) for layer in (*layers, *layers)]
        return sum((y * grad.to(y)).sum() for y, grad in zip(outputs, grads, strict=True))

    exact = by_torch(stack, x, loss_of)[1]
    if set(ways) == {"dense"}:
        plain = lambda: by_torch(stack, x, loss_of, torch.float32)[1]  # noqa: E731
        assert_composition_close(stack.core.grad, plain, exact)
    assert relative_error(stack.core.grad, exact) <= PROMISE["bf16"]


@EVERY_WAY
def test_gradients_in_fp32(stack_by, ways):
    stack, x = stack_by(ways, dtype=torch.float32), tokens(torch.float32)
    twice(stack.layers, x).backward()
    exact = by_torch(stack, x, twice)
    grads = (x.grad, stack.core.grad)
    assert_composition_close(grads, lambda: by_torch(stack, x, twice, torch.float32), exact)
