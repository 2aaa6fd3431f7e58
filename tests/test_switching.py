"""Nothing is lost without a word: gradients of another core, layers that never run."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adapted import WIDTH, ReadsAll, adapted, layers
from tolerance import same_mathematics


@pytest.fixture
def x():
    return torch.randn(5, WIDTH)


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.ModuleList(layers(2)), nn.ModuleList(layers(2, seed=1))

    def forward(self, x):
        for part in self.used:
            x = part(x)
        return x


def test_layers_that_never_run_are_named(x, tmp_path):
    model, adapter = adapted(Half())
    assert adapter.unused() == ()  # nothing ran yet
    y = model(x).sum()
    assert adapter.unused() == ("spare.0", "spare.1")
    with pytest.warns(UserWarning, match=r"backward: spare\.0, spare\.1 never ran"):
        y.backward()
    model(x).sum().backward()  # said once
    with pytest.warns(UserWarning, match=r"save: spare\.0"):
        adapter.save(tmp_path / "a")
    with pytest.warns(UserWarning, match=r"merge: spare\.0"):
        adapter.merge(inplace=False)


@pytest.mark.parametrize("change", ["replaced", "dropped"])
def test_a_layer_that_left_the_model_is_not_saved(change, x, tmp_path):
    model, adapter = adapted(Half())
    if change == "replaced":  # as resize_token_embeddings does with the last layer
        model.used[1] = nn.Linear(WIDTH, WIDTH)
    else:
        model.used = model.used[:1]
    with pytest.raises(ValueError, match=r"save: expected the layers .* without that of used\.1"):
        adapter.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()
    merged = adapter.merge(inplace=False)
    assert same_mathematics(merged(x), model(x))


def test_two_adapters_in_one_backward_both_learn(x):
    model, adapter = adapted()
    adapter.add("b")
    stack = adapter.stacks["12x12"]
    stack.core_of("b").data.normal_()
    first = stack.core
    one = model(x)
    adapter.activate("b")
    second, two = stack.core, model(x)
    (one * two).sum().backward()
    both = first.grad, second.grad
    adapter.activate("default")
    (alone,) = torch.autograd.grad((model(x) * two.detach()).sum(), first)
    assert same_mathematics(both[0], alone)
    adapter.activate("b")
    (alone,) = torch.autograd.grad((model(x) * one.detach()).sum(), second)
    assert same_mathematics(both[1], alone)
    assert not first.requires_grad
    second.grad = first.grad = None
    for _ in range(3):
        adapter.activate("default")
        one = model(x)
        adapter.activate("b")
    (one * two.detach()).sum().backward()
    assert same_mathematics(first.grad, both[0])  # once, however often it was switched


def test_a_late_gradient_comes_once_however_often_adapters_were_exchanged(x):
    model, adapter = adapted()
    adapter.add("b")
    core = adapter.stacks["12x12"].core
    (wanted,) = torch.autograd.grad(model(x).sum(), core)
    for _ in range(3):
        y = model(x)
        adapter.activate("b")
        y.sum().backward()
        assert torch.equal(core.grad, wanted)
        adapter.activate("default")
        core.grad = None
    model(x).sum().backward()
    assert torch.equal(core.grad, wanted)


@pytest.mark.parametrize("reads", [False, True])
def test_checkpoints_are_not_computed_again_with_another_adapter(reads, x):
    model, adapter = adapted(ReadsAll() if reads else None)
    adapter.add("b")
    x.requires_grad_()
    y = checkpoint(model, x, use_reentrant=False)
    adapter.activate("b")
    with pytest.raises(RuntimeError, match="core: expected the adapter of the forward"):
        y.sum().backward()
    y = checkpoint(model, x, use_reentrant=False)
    y.sum().backward()
    adapter.activate("default")
    both = y.detach() * checkpoint(model, x, use_reentrant=False)
    both.sum().backward()  # nothing of b is pending
    one = checkpoint(model, x, use_reentrant=False)
    adapter.activate("b")
    with pytest.raises(RuntimeError, match="core: expected the adapter of the forward"):
        (one * checkpoint(model, x, use_reentrant=False)).sum().backward()
    del one
    if reads:
        return  # weights are not read in a batch of many
    cores = adapter.stack_cores(["default", "b"])
    with adapter.batch(cores, torch.tensor([0, 1, 0, 1, 1])):
        y = checkpoint(model, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="within the batch of many"):
        y.sum().backward()
