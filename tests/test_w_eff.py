"""What a stack keeps on a GPU, where no values are compared: nothing stale, nothing freed early.

CUDA's streams and captures are faked, by the one module that asks for them; tensors stay on the
CPU. `test_graph.py` has the same with a GPU.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tcur_kernels as tcur
from fake_cuda import FakeStreams
from plain import base_slices, product, scale_of, sides_of
from tcur_kernels.layers import route
from tcur_kernels.layers import w_eff as kept_module
from tcur_kernels.operators import streams
from tolerance import assert_equal_in_float64


@pytest.fixture
def float64():
    """Where values are compared: what is stale is far off, and roundings are not looked at."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def cuda(monkeypatch):
    """As if tensors were on a GPU."""
    return FakeStreams(monkeypatch)


@pytest.fixture
def builds(monkeypatch):
    """The buffers that W_eff is built into."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs["out"].data_ptr())
        return materialize(*args, **kwargs)

    materialize = route.materialize
    monkeypatch.setattr(route, "materialize", counted)
    return calls


def make_stack(mode="materialized", n2=9, **kwargs):
    torch.manual_seed(0)
    linears = [nn.Linear(n2, 6).requires_grad_(False) for _ in range(3)]
    stack = tcur.TProductStack(linears, rank=2, mode=mode, **kwargs)
    with torch.no_grad():
        stack.core.normal_()
    return stack


def run(stack, x):
    return torch.stack([layer(x) for layer in stack.layers])


def silently(stack, by=1.5):
    """What a replayed graph, or a kernel of a foreign optimizer, does to the core."""
    stack.core.data.mul_(by)


def exact(stack, x):
    """By plain torch, which keeps nothing."""
    base = torch.stack(base_slices(stack))
    lateral, horizontal = sides_of(stack, base)
    w_eff = base + scale_of(stack) * product(lateral, stack.core.detach(), horizontal)
    return torch.stack([F.linear(x, w_eff[i], stack.layers[i].bias) for i in range(stack.n3)])


class DataSGD:
    """An optimizer of old."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    def step(self):
        for parameter in self.parameters:
            parameter.data.add_(parameter.grad.data, alpha=-1e-2)


OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "plain": lambda p: torch.optim.SGD(p, 1e-2, foreach=False),
    "data": DataSGD,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_training_never_meets_a_stale_w_eff(cuda, float64, make, micro_batches):
    x = torch.randn(4, 5, 9)
    outputs = []
    for mode in ("materialized", "factored"):
        stack = make_stack(mode)
        optimizer = make([stack.core])
        for _ in range(4):
            stack.core.grad = None
            for part in x[:micro_batches]:
                y = run(stack, part)
                y.square().sum().backward()
            optimizer.step()
            with torch.no_grad():
                y = run(stack, x[3])  # an evaluation in between
        outputs.append(y)
    assert_equal_in_float64(*outputs)


def test_fused_optimizers_count_no_versions():
    """The reason for all this; should it fail one day, W_eff may be kept for longer."""
    stack = make_stack()
    stack.core.grad = torch.ones_like(stack.core)
    version = stack.core._version
    torch.optim.AdamW([stack.core], fused=True).step()
    assert stack.core._version == version


def test_gradients_that_are_not_accumulated(cuda, float64):
    stack, x = make_stack(), torch.randn(5, 9)
    (grad,) = torch.autograd.grad(run(stack, x).sum(), stack.core)
    stack.core.data.sub_(grad)
    assert_equal_in_float64(run(stack, x), exact(stack, x))


def test_training_by_the_factors_or_compiled_is_heard_of(cuda, float64):
    """The gradient comes by other ways than the layers'; then comes an evaluation with W_eff."""
    stack, x = make_stack(), torch.randn(5, 9)
    optimizer = torch.optim.AdamW([stack.core], 1e-2, fused=True)
    for _ in range(2):
        with torch.no_grad():
            y = run(stack, x)
        assert_equal_in_float64(y, exact(stack, x))
        tcur.cur_product(stack.factors, stack.core).square().sum().backward()
        optimizer.step()


def test_a_core_that_is_trained_only_later(cuda, float64):
    stack, x = make_stack(), torch.randn(5, 9)
    stack.core.requires_grad_(False)
    run(stack, x)
    stack.core.requires_grad_(True)
    tcur.cur_product(stack.factors, stack.core).square().sum().backward()
    torch.optim.AdamW([stack.core], 1e-2, fused=True).step()
    assert_equal_in_float64(run(stack, x), exact(stack, x))


def test_how_often_w_eff_is_built(cuda, builds):
    """Once per backward, for an optimizer may have stepped; an evaluation builds it once."""
    stack, x = make_stack(), torch.randn(5, 9, requires_grad=True)
    with torch.no_grad():
        for _ in range(3):
            run(stack, x)
    run(stack, x).sum().backward()
    assert len(builds) == 1
    for count in (2, 3):  # accumulation
        run(stack, x).sum().backward()
        assert len(builds) == count
    assert len(set(builds)) == 1  # in one buffer
    stack.core.requires_grad_(False)
    for _ in range(2):
        run(stack, x).sum().backward()
    assert len(builds) == 4


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_builds_nothing_within_a_backward(cuda, float64, builds, use_reentrant):
    for has_graphs in (False, True):
        builds.clear()
        stack, x = make_stack(n2=6), torch.randn(5, 6, requires_grad=True)
        stack._kept.has_graphs = has_graphs
        h = x
        for layer in stack.layers:
            h = checkpoint(layer, h, use_reentrant=use_reentrant)
        h.sum().backward()
        assert len(builds) == 1
        plain, again = copy.deepcopy(stack), x.detach().requires_grad_()
        plain.zero_grad()
        nn.Sequential(*plain.layers)(again).sum().backward()
        assert_equal_in_float64(stack.core.grad, plain.core.grad)
        assert_equal_in_float64(x.grad, again.grad)


def test_captures_build_their_own(cuda, builds):
    stack, x = make_stack(), torch.randn(5, 9)
    with torch.no_grad():
        run(stack, x)
        for capture in (7, 8):  # one after the other, no eager call in between
            cuda.capture = capture
            run(stack, x)
        cuda.capture = 0
        assert len(builds) == 3
        eager, captured, other = builds
        assert captured == other  # each graph fills it before it reads it
        assert captured != eager
        run(stack, x)
        assert builds[3:] == [eager]


def test_two_captures_of_different_layers(cuda, float64, builds):
    stack, x = make_stack(), torch.randn(5, 9)
    with torch.no_grad():
        stack.layers[0](x)
        for capture, layer in ((7, 0), (8, 1)):
            cuda.capture = capture
            stack.layers[layer](x)
        assert len(builds) == 3
        cuda.capture = 0
        silently(stack)
        assert_equal_in_float64(stack.layers[1](x), exact(stack, x)[1])


def test_a_step_within_a_capture_is_seen(cuda, float64, builds):
    """Two steps in one graph: W_eff is built in each, from the core as it then is."""
    stack, x = make_stack(), torch.randn(5, 9)
    optimizer = torch.optim.AdamW([stack.core], 1e-2, fused=True)
    cuda.capture = 7
    for _ in range(2):
        assert_equal_in_float64(run(stack, x), exact(stack, x))
        run(stack, x).sum().backward()
        optimizer.step()
    assert len(set(builds)) == 1


@pytest.mark.parametrize("mode", ["materialized", "factored"])
def test_replays_are_not_heard_of_and_not_believed(cuda, float64, builds, mode):
    """Whatever way the captured forward took: after it, every eager pass builds W_eff."""
    stack, x = make_stack(), torch.randn(5, 9)
    with torch.no_grad():
        run(stack, x)
        stack.mode, cuda.capture = mode, 7
        run(stack, x)
        stack.mode, cuda.capture = "materialized", 0
        for _ in range(3):
            silently(stack)
            before = len(builds)
            assert_equal_in_float64(run(stack, x), exact(stack, x))
            assert len(builds) == before + 1
        for _ in range(2):
            silently(stack)
            w_eff = stack.effective(x.dtype)
            wanted = tcur.materialize(base_slices(stack), stack.factors, stack.core, stack.scale)
            assert_equal_in_float64(w_eff, wanted)


def test_a_captured_backward_alone_is_heard_of(cuda, float64):
    """A compiled model is captured without a line of the layers being run."""
    stack, x = make_stack(), torch.randn(5, 9)
    with torch.no_grad():
        run(stack, x)
    cuda.capture = 7
    tcur.cur_product(stack.factors, stack.core).square().sum().backward()
    cuda.capture = 0
    with torch.no_grad():
        for _ in range(2):
            silently(stack)
            assert_equal_in_float64(run(stack, x), exact(stack, x))


def test_what_a_graph_reads_lives_as_long_as_the_stack(cuda, builds):
    stack, x = make_stack(), torch.randn(5, 9, requires_grad=True)
    cuda.capture = 7
    pending = run(stack, x)
    silently(stack)
    stack.invalidate()
    run(stack, x)  # another buffer, the first is still to be read by the backward
    del pending
    cuda.capture = 0
    run(stack, x)
    first, second, eager = builds
    assert len({first, second, eager}) == 3
    kept = stack._kept
    assert [buffer.data_ptr() for buffer in kept._worn] == [first]
    assert kept._captured.buffer.data_ptr() == second
    for _ in range(2):
        silently(stack)
        stack.invalidate()
        run(stack, x)
    assert set(builds[3:]) <= {eager}
    stack.merge()  # the layers do without W_eff now, a replay does not
    assert [buffer.data_ptr() for buffer in kept._worn] == [first]
    assert kept._captured.buffer.data_ptr() == second
    assert kept._eager is None


def test_another_stream_waits(cuda):
    stack, x = make_stack(), torch.randn(5, 9)
    with torch.no_grad():
        run(stack, x)
        cuda.stream = 2
        run(stack, x)
        run(stack, x)
        assert cuda.log == ["2 waits for event of 1"]
        cuda.stream = 1
        stack.core.mul_(2)
        run(stack, x)
        assert cuda.log[1:] == ["1 waits for stream 2"]  # before the buffer is written again
        cuda.stream = 2
        run(stack, x)
        assert cuda.log[2:] == ["2 waits for event of 1"]
        cuda.stream = 3
        stack.core.mul_(2)
        run(stack, x)
        assert cuda.log[3:] == ["3 waits for stream 1", "3 waits for stream 2"]


def test_a_capture_waits_for_nothing_outside(cuda):
    """Such a wait would break it."""
    stack, x = make_stack(), torch.randn(5, 9)
    with torch.no_grad():
        run(stack, x)
        for number in (2, 3):  # each on a stream of its own
            cuda.stream = cuda.capture = number
            run(stack, x)
        assert not cuda.log
        cuda.stream = 4  # a fork within the capture
        run(stack, x)
        assert cuda.log == ["4 waits for stream 3"]


def test_z_is_shared_on_one_stream_and_in_one_capture(cuda, monkeypatch):
    calls, project = [], kept_module.project
    monkeypatch.setattr(kept_module, "project", lambda *args: calls.append(0) or project(*args))
    stack, x = make_stack("factored", n2=40), torch.randn(5, 40, requires_grad=True)
    graphs = [run(stack, x)]
    assert len(calls) == 1
    cuda.stream = 2
    graphs.append(run(stack, x))
    assert len(calls) == 2
    cuda.capture = 7
    graphs.append(run(stack, x))
    assert len(calls) == 3
    cuda.capture = 0
    graphs.append(run(stack, x))
    assert len(calls) == 4


def test_packed_bf16_factors_outlive_a_capture(cuda):
    stack, x = make_stack(precision="bf16"), torch.randn(5, 9)
    cuda.capture = 7
    run(stack, x).sum().backward()
    assert stack.factors._narrow is None  # no values in it until a replay
    assert not stack._calls
    cuda.capture = 0
    run(stack, x).sum().backward()
    narrow = stack.factors.packed("bf16")
    cuda.capture = 8
    run(stack, x).sum().backward()
    stack.to("cpu").float().requires_grad_().zero_grad()  # nothing that moves anything
    assert stack.factors.packed("bf16") is narrow
    assert {call.lateral_hat.data_ptr() for call in stack._calls.values()} == {narrow[0].data_ptr()}
    assert stack._kept._captured is not None
    stack.double()
    assert not stack._calls
    assert stack._kept._captured is None


def test_invalidate_and_modes_of_the_module(cuda, float64, builds):
    linears = [nn.Linear(6, 6) for _ in range(3)]
    model = nn.Sequential(*linears)
    adapter = tcur.adapt(model, rank=2, mode="materialized")
    (stack,) = adapter.stacks.values()
    with torch.no_grad():
        x, average = torch.randn(4, 6), torch.randn_like(stack.core)
        model(x)
        model(x)
        assert len(builds) == 1
        for change in (adapter.invalidate, stack.invalidate, model.eval, model.train):
            stack.core.data.copy_(average.normal_())
            change()
            wanted = nn.Sequential(*copy.deepcopy(model))(x)
            assert_equal_in_float64(model(x), wanted)
        assert len(builds) == 1 + 4 * 2


def test_invalidate_on_the_cpu(builds):
    stack, x = make_stack(), torch.randn(5, 9)
    for _ in range(2):
        run(stack, x)
        stack.invalidate()
    assert len(builds) == 2
    assert len(set(builds)) == 1


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_listen_to_their_own_core(cuda, builds, clone):
    stack, x = make_stack(), torch.randn(5, 9)
    run(stack, x).sum().backward()
    twin = clone(stack)
    run(twin, x).sum().backward()
    builds.clear()
    run(stack, x)
    run(twin, x)
    assert len(builds) == 2
    run(twin, x).sum().backward()
    run(stack, x)
    assert len(builds) == 2
    run(twin, x)
    assert len(builds) == 3


def test_cores_that_take_turns(cuda, float64, builds):
    stack, x = make_stack(), torch.randn(5, 9)
    stack.add_core("b")
    hooks = []
    for former in ("a", "b", "a", "b"):
        run(stack, x).sum().backward()
        stack.activate_core("a" if former == "b" else "b", former)
        silently(stack, 0.5)
        assert_equal_in_float64(run(stack, x), exact(stack, x))
        hooks.append(len(stack.core._post_accumulate_grad_hooks))
    assert max(hooks) == 1


def test_another_core_in_the_same_memory(cuda, float64):
    """A core computed anew in each forward may come to lie where the last one was."""
    stack, x = make_stack(), torch.randn(5, 9)
    memory = stack.core.detach().clone()
    for _ in range(3):
        memory.mul_(2)
        y = torch.func.functional_call(_Runs(stack), {"stack.core": memory.data}, (x,))
        twin = copy.deepcopy(stack)
        twin.core.data.copy_(memory)
        assert_equal_in_float64(y, exact(twin, x))


def test_a_buffer_is_free_when_nobody_holds_a_view(cuda):
    stack, x = make_stack(), torch.randn(6, 9, requires_grad=True)
    stack.effective(torch.float32)
    built = stack._kept._eager

    def is_free():
        return built.reclaim(torch.float32, x.device, False, 0)

    view = built.view_of(stack.places[1])
    assert not is_free()
    graph = x * view  # a node of C++ saves it
    del view
    assert not is_free()
    del graph
    assert is_free()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        graph = x * built.view_of(stack.places[1])  # an object of Python has it
    assert not is_free()
    del graph
    assert is_free()
    assert not built.reclaim(torch.bfloat16, x.device, False, 0)
    assert not built.reclaim(torch.float32, x.device, True, 0)


class _Runs(nn.Module):
    def __init__(self, stack):
        super().__init__()
        self.stack = stack

    def forward(self, x):
        return run(self.stack, x)


def test_on_the_cpu_nothing_is_asked_of_cuda():
    device = torch.device("cpu")
    assert not streams.are_used(device)
    assert streams.capture_of(device) == 0
    assert streams.current(device) == 0
    stack = make_stack()
    run(stack, torch.randn(5, 9)).sum().backward()
    assert not stack.core._post_accumulate_grad_hooks
