"""accelerate's hooks: weights that are on the meta device while their layer does not run."""

import pytest
import torch
from torch import nn

import tcur_kernels as tcur
from tolerance import same_mathematics

accelerate = pytest.importorskip("accelerate")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.norm = nn.LayerNorm(12)

    def forward(self, x):
        for layer in self.layers:
            x = self.norm(layer(x)).relu()
        return x


def adapted(model, mode="auto"):
    adapter = tcur.adapt(model, rank=3, mode=mode)
    torch.manual_seed(1)
    with torch.no_grad():
        adapter.stacks["12x12"].core.normal_(std=0.5)
    return adapter


@pytest.fixture
def x():
    return torch.randn(100, 12)


@pytest.mark.parametrize("mode", ["auto", "factored"])
def test_offloaded_after_it_was_adapted(mode, x, tmp_path):
    for offload in (
        accelerate.cpu_offload,
        lambda model, device: accelerate.disk_offload(model, tmp_path / "weights", device),
    ):
        model = Net()
        adapted(model, mode)
        with torch.no_grad():
            y = model(x)
            offload(model, torch.device("cpu"))
            assert model.layers[0].base_weight.is_meta
            assert same_mathematics(model(x), y)
            assert same_mathematics(model(x), y)


def test_w_eff_of_all_layers_is_not_to_be_had(x):
    model = Net()
    adapted(model, "materialized")
    accelerate.cpu_offload(model, torch.device("cpu"))
    with torch.no_grad(), pytest.raises(ValueError, match="where weights are sharded or offloaded"):
        model(x)


def test_another_base_is_refused_where_it_cannot_be_seen_whole(x):
    model = Net()
    adapted(model)
    state = {name: torch.randn_like(p) for name, p in Net().state_dict().items()}
    accelerate.cpu_offload(model, torch.device("cpu"), state_dict={**model.state_dict(), **state})
    for _ in range(2):  # refused once, it is not taken for known
        with torch.no_grad(), pytest.raises(RuntimeError, match="base: expected all weights of st"):
            model(x)


def test_adapted_after_hooks_were_put_on(x):
    """They call the forward that they found when they were put on."""
    model = Net()
    for layer in model.layers:
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    base = model(x)
    adapter = tcur.adapt(model, rank=3)
    assert torch.equal(model(x), base)
    with torch.no_grad():
        adapter.stacks["12x12"].core.normal_()
    merged = adapter.merge(inplace=False)
    assert same_mathematics(model(x), merged(x))
    assert not same_mathematics(model(x), base)


def test_moved_by_hooks_that_read_and_put_back(x):
    model = Net()
    adapted(model)
    y = model(x)
    before = [layer.base_weight.clone() for layer in model.layers]
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert torch.equal(model(x), y)
    assert all(
        torch.equal(layer.base_weight, own) for layer, own in zip(model.layers, before, strict=True)
    )
