"""A training step as a CUDA graph, by the recipe of docs/adapters.md: the same training as eager.

``pytest --device cuda`` runs it on a GPU. On the CPU a recording of operators stands for the graph,
and streams are faked: what the recipe asks of the package is tested, CUDA is not.
"""

import copy
import itertools

import pytest
import torch
from torch import nn

import tcur_kernels as tcur
from fake_cuda import FakeGraph, FakeStreams

WIDTH, TOKENS, WARM_UP, STEPS = 48, 32, 3, 5


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


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
        return h + self.down(torch.relu(self.up(h)))


def adapted(device, mode, dtype, precision="ieee"):
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(dtype) for _ in range(2))).to(device)
    adapter = tcur.adapt(model, rank=4, mode=mode)
    for stack in adapter.stacks.values():
        stack.precision = precision
    return adapter


def optimizer_of(adapter, device):
    if device.type == "cuda":
        return torch.optim.AdamW(adapter.parameters(), lr=1e-2, capturable=True, fused=True)
    return torch.optim.SGD(adapter.parameters(), lr=1e-1, momentum=0.9, foreach=False)


def batches(device, dtype):
    generator = torch.Generator().manual_seed(1)
    sizes = (WARM_UP + STEPS, 2, TOKENS, WIDTH)
    return torch.randn(sizes, generator=generator, device="cpu").to(device, dtype)


def evaluated(adapter, x):
    with torch.no_grad():
        return adapter.model(x).float()


def eager_training(adapter, device, data):
    optimizer, losses = optimizer_of(adapter, device), []
    for x, y in data:
        optimizer.zero_grad(set_to_none=True)
        loss = (adapter.model(x) - y).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses[WARM_UP:])


def captured_training(adapter, device, graphs, data, between=lambda: None):
    """The recipe."""
    make, capture = graphs
    optimizer = optimizer_of(adapter, device)
    static_x, static_y = data[0].clone()

    def forward_and_backward():
        loss = (adapter.model(static_x) - static_y).float().square().mean()
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
def test_captured_training_is_eager_training(device, graphs, mode):
    """Steps, evaluations between the replays, which nothing tells of, and steps after them."""
    data = batches(device, torch.float32)
    eager, captured = (adapted(device, mode, torch.float32) for _ in range(2))
    wanted = eager_training(eager, device, data)
    assert wanted[0] > wanted[-1] * 1.0001
    outputs = []
    losses = captured_training(
        captured, device, graphs, data, lambda: outputs.append(evaluated(captured, data[0, 0]))
    )
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-5)
    for name, stack in captured.stacks.items():
        torch.testing.assert_close(
            stack.core, eager.stacks[name].core, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: n + m
        )
    # No two evaluations are the same, and the last is that of the cores as they are now.
    assert all((a - b).abs().max() > 1e-5 for a, b in itertools.pairwise(outputs))
    fresh = copy.deepcopy(captured)
    torch.testing.assert_close(outputs[-1], evaluated(fresh, data[0, 0]), rtol=1e-4, atol=1e-5)
    for each in (eager, captured):
        eager_training(each, device, data)
    for name, stack in captured.stacks.items():
        torch.testing.assert_close(stack.core, eager.stacks[name].core, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("mode", ["materialized", "factored"])
def test_captured_training_of_a_bf16_base(device, graphs, mode):
    data = batches(device, torch.bfloat16)
    eager, captured = (adapted(device, mode, torch.bfloat16, "bf16") for _ in range(2))
    wanted = eager_training(eager, device, data)
    losses = captured_training(captured, device, graphs, data)
    torch.testing.assert_close(losses, wanted, rtol=2e-2, atol=1e-3)


def test_graphs_of_several_sizes_read_the_core_as_it_is(device, graphs):
    """As a server makes them: one after the other, replayed in any order, cores loaded between."""
    make, capture = graphs
    adapter = adapted(device, "materialized", torch.float32)
    captured = []
    with torch.no_grad():
        for tokens in (4, 8, 16):
            x, graph = torch.randn(tokens, WIDTH, device=device), make()
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
            fresh = copy.deepcopy(adapter)
            torch.testing.assert_close(y, evaluated(fresh, x), rtol=1e-4, atol=1e-4)


def test_captures_have_numbers(device, on_gpu):
    """By the driver, which alone tells one capture from another."""
    from tcur_kernels import streams

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
