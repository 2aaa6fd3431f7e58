"""The gradient of a core: its layers hand on packed parts, one node adds them up and transforms."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tcur_kernels as tcur
from fake_cuda import FakeStreams
from plain import base_slices, product
from tcur_kernels.operators import gradient_sum
from tolerance import assert_composition_close, assert_equal_in_float64

MODES = pytest.mark.parametrize("mode", ["materialized", "factored"])
#: How the gradient is formed -> slices of each layer, n1, n2.
SIZES = {"z": ((1, 1, 1, 1), 40, 40), "dense": ((1,) * 12, 9, 9)}
SIZES |= {"fused": ((1, 3, 1), 40, 40), "fused_dense": ((1, 3, 1), 9, 9)}


def make_stack(mode="factored", way="z", dtype=torch.float64, alpha=0.7):
    slices, n1, n2 = SIZES[way]
    linears = [nn.Linear(n2, k * n1, dtype=dtype).requires_grad_(False) for k in slices]
    stack = tcur.TProductStack(linears, rank=4, mode=mode, alpha=alpha)
    with torch.no_grad():
        stack.core.normal_()
    return stack


def tokens(stack, count=300):
    return torch.randn(count, stack.n2, dtype=stack.core.dtype, requires_grad=True)


def loss_of(stack, x):
    return sum(layer(x).sin().sum() for layer in stack.layers)


def by_torch(stack, x, dtype, times=1):
    """Gradients of ``times`` losses by x and by the core, in plain torch."""
    x, core = (t.detach().to(dtype).requires_grad_() for t in (x, stack.core))
    base = torch.stack(base_slices(stack)).to(dtype)
    w_eff = base + stack.scale * product(stack.lateral.to(dtype), core, stack.horizontal.to(dtype))
    loss = 0.0
    for layer in stack.layers:
        own = w_eff[
            layer.tcur_place.slice_index : layer.tcur_place.slice_index + layer.tcur_place.slices
        ].flatten(0, 1)
        loss = loss + (x @ own.T + layer.bias.to(dtype)).sin().sum()
    return torch.autograd.grad(times * loss, (x, core))


def exact(stack, x, times=1):
    return by_torch(stack, x, torch.float64, times)


class Counted(TorchDispatchMode):
    """Transforms of packed gradients, by how many parts they have, and additions of cores."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.transforms, self.additions, self.others = shape, [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("tcur::core_of_packed"):
            self.transforms.append(args[0].shape[0])
        elif name.startswith("tcur::core_grad_dense"):
            self.transforms.append("dense")
        elif name in ("aten::add", "aten::add_") and args[0].shape == self.shape:
            self.additions += 1
        elif name.startswith("tcur::core_grad") and not any(args[9:]):  # packed is the last
            self.others += 1
        return func(*args, **(kwargs or {}))


def counted(stack, run):
    with Counted(stack.core.shape) as counts:
        run()
    return counts.transforms, counts.additions, counts.others


@MODES
@pytest.mark.parametrize("way", SIZES)
@pytest.mark.parametrize("alpha", [0.7, 1.0])
def test_one_transform_and_no_addition_for_all_layers(mode, way, alpha):
    stack = make_stack(mode, way, torch.float32, alpha)
    x = tokens(stack)
    loss = loss_of(stack, x)
    at_once = "dense" in way and mode == "materialized"
    transforms = ["dense" if at_once else len(stack.layers)]
    assert counted(stack, loss.backward) == (transforms, 0, 0)
    grads = (x.grad, stack.core.grad)
    assert_composition_close(grads, lambda: by_torch(stack, x, torch.float32), exact(stack, x))


def test_the_counts_would_tell(monkeypatch):
    """Without the node every layer transforms, and autograd adds up."""
    stack = make_stack()
    monkeypatch.setattr(gradient_sum.LatestSum, "of", lambda *args: None)
    x = tokens(stack)
    loss = loss_of(stack, x)
    layers = len(stack.layers)
    assert counted(stack, loss.backward) == ([], layers - 1, layers)
    assert_equal_in_float64((x.grad, stack.core.grad), exact(stack, x))


@MODES
def test_a_layer_that_is_called_twice(mode):
    stack = make_stack(mode)
    x = tokens(stack)
    loss = loss_of(stack, x) + loss_of(stack, x)
    assert counted(stack, loss.backward) == ([4], 4, 0)  # which autograd adds up, packed
    assert_equal_in_float64((x.grad, stack.core.grad), exact(stack, x, 2))


@MODES
def test_several_forwards_before_their_backwards(mode):
    stack = make_stack(mode)
    inputs = [tokens(stack, count) for count in (5, 7)]
    losses = [loss_of(stack, x) for x in inputs]
    wanted = [exact(stack, x)[1] for x in inputs]
    for loss, grad in zip(losses, wanted, strict=True):
        (found,) = torch.autograd.grad(loss, stack.core, retain_graph=True)
        assert_equal_in_float64(found, grad)
    sum(losses).backward(retain_graph=True)
    assert_equal_in_float64(stack.core.grad, sum(wanted))
    for loss in losses:  # and what they add is added to what is there
        loss.backward()
    assert_equal_in_float64(stack.core.grad, 2 * sum(wanted))


@MODES
def test_parts_of_the_derivatives_leave_nothing_behind(mode):
    stack = make_stack(mode)
    x = tokens(stack)
    loss = loss_of(stack, x)
    wanted = exact(stack, x)
    (grad_x,) = torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward(retain_graph=True, inputs=[stack.core])
    assert_equal_in_float64((grad_x, stack.core.grad), wanted)
    assert x.grad is None
    loss.backward()
    assert_equal_in_float64((x.grad, stack.core.grad), (wanted[0], 2 * wanted[1]))
    stack.core.grad = None
    one = stack.layers[2](x).sin().sum()  # the other layers have no gradient
    assert counted(stack, one.backward) == ([1], 0, 0)


@MODES
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(mode, reentrant):
    stack = make_stack(mode)
    x = tokens(stack)

    def halves(layers):
        return lambda x: sum(layer(x).sin().sum() for layer in layers)

    parts = [halves(stack.layers[:2]), halves(stack.layers[2:])]
    loss = sum(checkpoint(part, x, use_reentrant=reentrant) for part in parts)
    transforms, _, others = counted(stack, loss.backward)
    assert (transforms, others) == ([2, 2] if reentrant else [4], 0)
    assert_equal_in_float64((x.grad, stack.core.grad), exact(stack, x))


def test_a_core_that_is_frozen_and_trained_again():
    stack = make_stack()
    x = tokens(stack)
    kept = loss_of(stack, x)
    stack.core.requires_grad_(False)
    frozen = loss_of(stack, x)
    assert counted(stack, frozen.backward) == ([], 0, 0)
    stack.core.requires_grad_(True)
    loss_of(stack, x).backward()
    assert_equal_in_float64(stack.core.grad, exact(stack, x)[1])
    kept.backward()
    assert_equal_in_float64(stack.core.grad, 2 * exact(stack, x)[1])


def test_another_core_has_its_own():
    """Graphs of both are alive; and nothing keeps a core that was removed."""
    stack = make_stack()
    x = tokens(stack)
    stack.add_core("other")
    first, loss, wanted = stack.core, loss_of(stack, x), exact(stack, x)[1]
    stack.activate_core("other", "first")
    first.requires_grad_(True)  # which the exchange took from it
    with torch.no_grad():
        stack.core.normal_()
    (loss + loss_of(stack, x)).backward()
    assert_equal_in_float64((first.grad, stack.core.grad), (wanted, exact(stack, x)[1]))
    former = weakref.ref(first)
    stack.remove_core("first")
    del first, loss
    gc.collect()
    assert former() is None


def test_a_graph_that_is_gone_leaves_no_node():
    stack = make_stack()
    loss = loss_of(stack, tokens(stack))
    gradient_sum = stack._gradient_sum._latest
    assert gradient_sum() is not None
    loss.backward()
    del loss
    assert gradient_sum() is None


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_have_their_own(twin_of):
    stack = make_stack()
    x = tokens(stack)
    loss = loss_of(stack, x)
    twin = twin_of(stack)
    loss_of(twin, x).backward()
    assert stack.core.grad is None
    assert_equal_in_float64(twin.core.grad, exact(stack, x)[1])
    loss.backward()
    assert_equal_in_float64(stack.core.grad, twin.core.grad)


@MODES
@pytest.mark.parametrize("way", ["z", "dense"])
def test_gradients_that_are_differentiated_again(mode, way):
    """These go by the operators; what comes by the outputs of the layers is packed again."""
    stack = make_stack(mode, way)
    x = tokens(stack)
    loss = loss_of(stack, x)
    wanted, layers = exact(stack, x), len(stack.layers)
    found = []

    def once():
        found.extend(torch.autograd.grad(loss, (x, stack.core), create_graph=True))

    transforms, _, others = counted(stack, once)
    assert transforms == []
    assert others == layers
    assert_equal_in_float64(found, wanted)
    length = sum(grad.square().sum() for grad in found)
    transforms = ["dense" if way == "dense" and mode == "materialized" else layers]
    assert counted(stack, lambda: length.backward(retain_graph=True))[0] == transforms
    x64, core = (t.detach().requires_grad_() for t in (x, stack.core))
    w_eff = torch.stack(base_slices(stack))
    w_eff = w_eff + stack.scale * product(stack.lateral, core, stack.horizontal)
    bias = torch.stack([layer.bias for layer in stack.layers])[:, None]
    plain = (x64 @ w_eff.mT + bias).sin().sum()
    first = torch.autograd.grad(plain, (x64, core), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (x64, core))
    assert_equal_in_float64((x.grad, stack.core.grad), second)
    assert counted(stack, lambda: torch.autograd.grad(loss, stack.core))[0] == transforms


@MODES
def test_a_core_that_is_computed(mode):
    """Each layer may meet another one; what it was computed from has the gradient."""
    stack = make_stack(mode)
    x = tokens(stack)
    leaf = stack.core.detach().clone().requires_grad_()
    core = leaf * 1.0
    loss = functional_call(_Calls(stack), {"stack.core": core}, x)
    loss.backward()
    assert_equal_in_float64(leaf.grad, exact(stack, x)[1])
    assert stack.core.grad is None


class _Calls(nn.Module):
    def __init__(self, stack):
        super().__init__()
        self.stack = stack

    def forward(self, x):
        return loss_of(self.stack, x)


def test_a_changed_alpha_and_a_moved_stack():
    stack = make_stack()
    x = tokens(stack)
    losses, wanted = [], []
    for alpha in (0.7, 0.3):
        stack.alpha = alpha
        losses.append(loss_of(stack, x))
        wanted.append(exact(stack, x)[1])
    sum(losses).backward()
    assert_equal_in_float64(stack.core.grad, sum(wanted))
    before = loss_of(stack, x)
    nn.ModuleList([stack, *stack.layers]).float()
    stack.core.grad, x = None, x.detach().float().requires_grad_()
    loss_of(stack, x).backward()
    grads = (x.grad, stack.core.grad)
    assert_composition_close(grads, lambda: by_torch(stack, x, torch.float32), exact(stack, x))
    del before


def test_no_node_where_nothing_is_differentiated():
    stack = make_stack()
    x = tokens(stack)
    with torch.no_grad():
        loss_of(stack, x)
    with torch.inference_mode():
        loss_of(stack, x)
    assert stack._gradient_sum._latest is None
    cores = torch.stack([stack.core.detach()] * 2).requires_grad_()
    with stack.batch(cores, torch.tensor([0, 1]), repeat="each"):
        loss_of(stack, tokens(stack, 4)).backward()
    assert stack._gradient_sum._latest is None
    assert cores.grad is not None


def test_streams_and_captures_have_their_own(monkeypatch):
    """A node runs on the stream that it is made on, and one of a capture within it."""
    cuda = FakeStreams(monkeypatch)
    stack = make_stack()
    x = tokens(stack)
    losses, sums = [], set()
    for cuda.stream, cuda.capture in ((1, 0), (2, 0), (2, 5), (2, 0)):
        losses.append(loss_of(stack, x))
        sums.add(stack._gradient_sum._latest())
    assert len(sums) == 4
    sum(losses).backward()
    assert_equal_in_float64(stack.core.grad, exact(stack, x, 4)[1])


def test_hooks_of_the_core_meet_the_whole_gradient():
    stack = make_stack()
    x = tokens(stack)
    seen = []
    stack.core.register_hook(lambda grad: seen.append(grad.clone()))
    stack.core.register_post_accumulate_grad_hook(lambda core: seen.append(core.grad.clone()))
    loss_of(stack, x).backward()
    assert_equal_in_float64(seen, 2 * [exact(stack, x)[1]])


def test_a_backward_within_autocast():
    stack = make_stack(dtype=torch.float32)
    x = tokens(stack)
    loss = loss_of(stack, x)
    (wanted,) = torch.autograd.grad(loss, stack.core, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (grad,) = torch.autograd.grad(loss, stack.core)
    assert torch.equal(grad, wanted)
