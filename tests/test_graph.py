"""A training step as a CUDA graph, by the recipe of docs/adapters.md: the same training as eager.

``pytest --device cuda`` runs it on a GPU, in fp32. On the CPU a recording of operators stands for
the graph, and streams are faked: what the recipe asks of the package is tested, CUDA is not; in
float64, as it is not about roundings.
"""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tcur_kernels as tcur
from fake_cuda import FakeGraph, FakeStreams
from plain import Plain, by_plain_torch
from tolerance import assert_composition_close, assert_equal_in_float64

WIDTH, TOKENS, WARM_UP, STEPS = 48, 32, 3, 5


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def dtype(device):
    return torch.float32 if device.type == "cuda" else torch.float64


@pytest.fixture
def graphs(device, monkeypatch):
    """What captures: (makes a graph, context of its capture)."""
    if device.type == "cuda":
        return torch.cuda.CUDAGraph, torch.cuda.graph
    return FakeGraph, FakeStreams(monkeypatch).graph


@pytest.fixture
def on_gpu(device):
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")


class Block(nn.Module):
    """Layers that share an input, and layers of another shape."""

    def __init__(self, dtype):
        super().__init__()
        self.q, self.k = (nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(2))
        self.up = nn.Linear(WIDTH, 2 * WIDTH, dtype=dtype)
        self.down = nn.Linear(2 * WIDTH, WIDTH, dtype=dtype)

    def forward(self, x):
        h = x + self.q(x) * torch.sigmoid(self.k(x))
        return h + self.down(F.silu(self.up(h)))  # no kink, which roundings could cross


def adapted(device, mode, dtype, precision="ieee"):
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(dtype) for _ in range(2))).to(device)
    adapter = tcur.adapt(model, rank=4, mode=mode)
    for stack in adapter.stacks.values():
        stack.precision = precision
    return adapter


def optimizer_of(cores, device):
    if device.type == "cuda":
        # With so large an eps no step is the sign of a small gradient, which roundings decide.
        return torch.optim.AdamW(cores, lr=1e-2, eps=1e-3, capturable=True, fused=True)
    return torch.optim.SGD(cores, lr=1e-1, momentum=0.9, foreach=False)


def cores_of(adapter):
    return [stack.core for stack in adapter.stacks.values()]


def batches(device, dtype):
    generator = torch.Generator().manual_seed(1)
    sizes = (WARM_UP + STEPS, 2, TOKENS, WIDTH)
    return torch.randn(sizes, generator=generator, device="cpu").to(device, dtype)


def evaluated(adapter, x):
    with torch.no_grad():
        return adapter.model(x)


def loss_of(model, x, y):
    difference = model(x) - y
    wide = torch.promote_types(difference.dtype, torch.float32)
    return difference.to(wide).square().mean()


def eager_training(model, cores, device, data):
    optimizer, losses = optimizer_of(cores, device), []
    for x, y in data:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses[WARM_UP:])


class PlainTraining:
    """Losses and cores of trainings by plain torch, one after the other, as often as asked for."""

    def __init__(self, adapter, device, data, dtype):
        self.plain, self.device, self.data = Plain(adapter, dtype), device, data.to(dtype)

    def __call__(self, trainings=1):
        cores = list(self.plain.cores.values())
        with torch.no_grad():
            for core in cores:
                core.zero_()
        for _ in range(trainings):
            losses = eager_training(self.plain, cores, self.device, self.data)
        return losses, *(core.detach().clone() for core in cores)


def assert_right(actual, plain, exact):
    """In float64, or by the bound of compositions."""
    if exact[0].dtype == actual[0].dtype:
        assert_equal_in_float64(actual, exact)
    else:
        assert_composition_close(actual, plain, exact)


def captured_training(adapter, device, graphs, data, between=lambda: None):
    """The recipe."""
    make, capture = graphs
    optimizer = optimizer_of(adapter.parameters(), device)
    static_x, static_y = data[0].clone()

    def forward_and_backward():
        loss = loss_of(adapter.model, static_x, static_y)
        loss.backward()
        return loss.detach()

    def load(batch):
        static_x.copy_(batch[0])
        static_y.copy_(batch[1])

    def warm_up():
        for batch in data[:WARM_UP]:
            load(batch)
            optimizer.zero_grad(set_to_none=True)
            forward_and_backward()
            optimizer.step()

    if device.type == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            warm_up()
        torch.cuda.current_stream().wait_stream(stream)
    else:
        warm_up()
    optimizer.zero_grad(set_to_none=True)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict())
    graph = make()
    with capture(graph):
        static_loss = forward_and_backward()
        optimizer.step()
    if device.type == "cpu":  # where the capture itself was a step
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                parameter.copy_(before[name])
            for old, new in zip(optimizer.state.values(), state["state"].values(), strict=True):
                old["momentum_buffer"].copy_(new["momentum_buffer"])
    losses = []
    for batch in data[WARM_UP:]:
        load(batch)
        graph.replay()
        losses.append(static_loss.clone())
        between()
    return torch.stack(losses)


@pytest.mark.parametrize("mode", ["materialized", "factored", "auto"])
def test_captured_training_is_eager_training(device, dtype, graphs, mode):
    """Steps, evaluations between the replays, which nothing tells of, and steps after them."""
    data = batches(device, dtype)
    eager, captured = (adapted(device, mode, dtype) for _ in range(2))
    plain, exact = (PlainTraining(eager, device, data, each) for each in (dtype, torch.float64))
    wanted = eager_training(eager.model, cores_of(eager), device, data)
    assert wanted[0] > wanted[-1] * 1.0001
    outputs = []
    losses = captured_training(
        captured, device, graphs, data, lambda: outputs.append(evaluated(captured, data[0, 0]))
    )
    for each, seen in ((eager, wanted), (captured, losses)):
        assert_right((seen, *cores_of(each)), plain, exact())
    # No two evaluations are the same, and the last is that of the cores as they are now.
    assert all((a - b).abs().max() > 1e-5 for a, b in itertools.pairwise(outputs))
    assert_right(outputs[-1], *by_plain_torch(copy.deepcopy(captured), data[0, 0]))
    for each in (eager, captured):
        seen = eager_training(each.model, cores_of(each), device, data)
        assert_right((seen, *cores_of(each)), lambda: plain(2), exact(2))


@pytest.mark.parametrize("mode", ["materialized", "factored"])
def test_captured_training_of_a_bf16_base(device, graphs, mode):
    data = batches(device, torch.bfloat16)
    eager, captured = (adapted(device, mode, torch.bfloat16, "bf16") for _ in range(2))
    wanted = eager_training(eager.model, cores_of(eager), device, data)
    losses = captured_training(captured, device, graphs, data)
    plain = PlainTraining(eager, device, data, torch.bfloat16)
    exact = PlainTraining(eager, device, data, torch.float64)()
    assert_composition_close(
        (wanted, *cores_of(eager), losses, *cores_of(captured)),
        lambda: 2 * [each.bfloat16() for each in plain()],
        2 * exact,
    )


def test_graphs_of_several_sizes_read_the_core_as_it_is(device, dtype, graphs):
    """As a server makes them: one after the other, replayed in any order, cores loaded between."""
    make, capture = graphs
    adapter = adapted(device, "materialized", dtype)
    captured = []
    with torch.no_grad():
        for tokens in (4, 8, 16):
            x, graph = torch.randn(tokens, WIDTH, device=device, dtype=dtype), make()
            adapter.model(x)
            if device.type == "cuda":
                torch.cuda.synchronize()
            with capture(graph):
                y = adapter.model(x)
            captured.append((graph, x, y))
        for graph, x, y in (*captured, *captured[::-1]):
            for stack in adapter.stacks.values():
                stack.core.data.normal_(std=0.1)
            x.normal_()
            graph.replay()
            assert_right(y, *by_plain_torch(copy.deepcopy(adapter), x))


def test_captures_have_numbers(device, on_gpu):
    """By the driver, which alone tells one capture from another."""
    from tcur_kernels.operators import streams

    numbers = []
    for _ in range(2):
        x = torch.ones(3, device=device)
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.add_(1)
            numbers.append(streams.capture_of(device))
            assert streams.capture_of(device) == numbers[-1]
    assert streams.capture_of(device) == 0
    assert len({0, *numbers}) == 3


def test_another_stream_meets_a_whole_w_eff(device, on_gpu):
    adapter = adapted(device, "materialized", torch.float32)
    other = torch.cuda.Stream()
    x = torch.randn(TOKENS, WIDTH, device=device)
    other.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        for _ in range(20):
            for stack in adapter.stacks.values():
                stack.core.normal_(std=0.1)
            torch.cuda.current_stream().wait_stream(other)
            torch.cuda._sleep(1_000_000)
            here = adapter.model(x)
            with torch.cuda.stream(other):
                there = adapter.model(x)
            torch.cuda.synchronize()
            assert torch.equal(here, there)
