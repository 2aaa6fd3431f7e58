"""Adapted layers stay the modules that they were, in the containers that they were in."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.fx
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers.pytorch_utils import Conv1D

import tcur_kernels as tcur
from adapted import (
    WIDTH,
    Reads,
    adapted,
    assert_is_the_merged_model,
    layers,
)
from tolerance import same_mathematics


@pytest.fixture
def x():
    return torch.randn(5, WIDTH)


def test_modules_hooks_and_attributes_stay(x):
    parts = layers()
    model = nn.Sequential(*parts)
    parts[1].note, seen = "mine", []
    parts[0].register_forward_hook(lambda *_: seen.append("after"))
    parts[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    parts[2].register_full_backward_hook(lambda *_: seen.append("backward"))
    keys, weight = list(model.state_dict()), parts[3].weight
    _, adapter = adapted(model)
    assert all(ours is theirs for ours, theirs in zip(model, parts, strict=True))
    assert parts[1].note == "mine"
    assert all(isinstance(part, nn.Linear) for part in parts)
    model(x).sum().backward()
    assert seen == ["before", "after", "backward"]
    assert [key for key in model.state_dict() if not key.startswith("tcur_")] == keys
    assert parts[3].base_weight is weight
    merged = adapter.merge(inplace=False)
    assert [type(part) for part in merged] == [nn.Linear] * 4
    assert merged[1].note == "mine"
    assert list(merged.state_dict()) == keys
    assert merged.__dict__.keys() == nn.Sequential().__dict__.keys()


class Mixed(nn.Module):
    """All kinds of layers that are adapted."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layers(2)
        self.third, self.fourth = Conv1D(WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 3)

    def forward(self, x):
        x = self.fourth(self.third(self.second(self.first(x))))
        return self.attention(x, x, x)[0]


def test_symbolic_traces_call_adapted_layers(x):
    """As `create_feature_extractor` of torchvision makes them."""
    model, adapter = adapted(Mixed())
    traced = torch.fx.symbolic_trace(model)
    assert same_mathematics(traced(x), model(x))
    traced(x).square().sum().backward()
    by_trace = {name: core.grad for name, core in adapter.named_parameters()}
    adapter_grads = torch.autograd.grad(model(x).square().sum(), adapter.parameters())
    for got, expected in zip(by_trace.values(), adapter_grads, strict=True):
        assert same_mathematics(got, expected)
    assert adapter.merge(inplace=False).first.__module__ == nn.Linear.__module__


class Loop(nn.Module):
    """Runs through its children, whatever they are called."""

    def __init__(self):
        super().__init__()
        for index, part in enumerate(layers()):
            self.add_module(f"part{index}", part)

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


class Pairs(nn.Sequential):
    """Calls its parts with two arguments where they are no linear layers."""

    def forward(self, x, mask):
        for part in self:
            x = part(x * mask) if isinstance(part, nn.Linear) else part(x, mask)
        return x


def test_containers_hold_what_they_held(x):
    for model in (nn.Sequential(*layers()), nn.ModuleList(layers()), Loop()):
        children = list(model.named_children())
        tcur.adapt(model, rank=2)
        assert list(model.named_children()) == children
    model = nn.ModuleDict({"a": layers(1)[0], "b": layers(1)[0]})
    tcur.adapt(model, rank=2)
    assert list(model) == ["a", "b"]
    model = nn.Sequential(*layers())
    last = model[-1]
    tcur.adapt(model, rank=2)
    assert (len(model), model[-1], model[1:3][0]) == (4, last, model[1])
    model, adapter = adapted(Loop())
    assert_is_the_merged_model(model, adapter, x)
    pairs, adapter = adapted(Pairs(*layers()))
    assert_is_the_merged_model(pairs, adapter, x, torch.ones(5, 1))


def test_a_model_with_a_name_that_cores_take_is_refused_and_stays():
    model = nn.Sequential(*layers())
    model.register_buffer(f"tcur_{WIDTH}x{WIDTH}", torch.ones(1))
    before = model.state_dict()
    with pytest.raises(ValueError, match="model: expected no attribute 'tcur_12x12'"):
        tcur.adapt(model, rank=2)
    assert list(before) == list(model.state_dict())
    assert all(type(part) is nn.Linear and part.weight.requires_grad for part in model)


def test_a_part_that_is_adapted_is_no_base():
    model = nn.Sequential(nn.Sequential(*layers()), *layers(2))
    tcur.adapt(model[0], rank=2)
    with pytest.raises(ValueError, match="adapted already"):
        tcur.adapt(model, rank=2)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_models_of_their_own(clone, x):
    model, _ = adapted()
    y = model(x)
    twin = clone(model)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        twin.get_parameter("tcur_12x12").zero_()
        twin[0].base_weight.zero_()
    assert not torch.equal(twin(x), y)
    twin.double()
    assert torch.equal(model(x), y)
    assert model.get_parameter("tcur_12x12").dtype == torch.float32
    twin.load_state_dict(model.state_dict())
    assert same_mathematics(twin(x.double()).float(), y)


def test_parameters_may_be_swapped_or_made_anew_by_a_cast(x):
    """Two ways that torch has for `_apply`, beside writing to what is there."""
    future = torch.__future__
    for switch in (
        future.set_overwrite_module_params_on_conversion,
        future.set_swap_module_params_on_conversion,
    ):
        model, adapter = adapted()
        y = model(x).detach()
        switch(True)
        try:
            model.double()
        finally:
            switch(False)
        assert same_mathematics(model(x.double()).float(), y)
        assert adapter.stacks["12x12"].core.dtype == torch.float64


def test_cores_keep_their_precision_through_casts(x):
    model, adapter = adapted()
    core = adapter.stacks["12x12"].core
    before = core.detach().clone()
    holder = nn.Sequential(model)
    holder.half()
    assert core.dtype == torch.float32
    assert adapter.stacks["12x12"].core is core
    assert torch.equal(core, before)
    assert model(x.half()).dtype == torch.float16
    assert model.get_buffer("tcur_12x12__orthonormal_indices").dtype == torch.int64
    holder.double()
    assert adapter.stacks["12x12"].core.dtype == torch.float64


def test_the_first_parameter_tells_the_dtype_of_the_model(x):
    """Many models ask their first parameter; averages go by the order of all of them."""
    model, adapter = adapted(Reads())
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert same_mathematics(average(x), model(x))
    model.to(torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert [name for name, _ in model.named_parameters()][-1] == "tcur.12x12"
    assert adapter.stacks["12x12"].core is model.tcur.get_parameter("12x12")
    assert adapter.stacks["12x12"].core.dtype == torch.float32
    assert [name for name, _ in adapter.named_parameters()] == ["tcur.12x12"]
    copied = copy.deepcopy(model)
    copied.float()
    assert copied.tcur.get_parameter("12x12") is not adapter.stacks["12x12"].core


class Counted(nn.Module):
    """A container of one's own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers(2)

    def __len__(self):
        return len(self._modules)

    def forward(self, x):
        return self.last(self.first(x))


@pytest.mark.parametrize(
    "model",
    [lambda: nn.Sequential(*layers()), Loop, Counted],
    ids=["Sequential", "Loop", "len"],
)
def test_containers_hold_cores_themselves(model, x):
    model, adapter = adapted(model())
    assert [name for name, _ in adapter.named_parameters()] == ["tcur_12x12"]
    assert "tcur" not in dict(model.named_children())
    core = adapter.stacks["12x12"].core
    assert dict(model.named_parameters(recurse=False)) == {"tcur_12x12": core}
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert same_mathematics(average(x), model(x))
    assert_is_the_merged_model(model, adapter, x)
    assert adapter.merge(inplace=False).__dict__.keys() == nn.Module().__dict__.keys()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel.*:FutureWarning")
@pytest.mark.parametrize("transposed", [False, True])
def test_fsdp1_of_base_and_cores_in_one_flat_parameter(x, transposed):
    """Trained as a whole, for the sake of the cores: the base in it is frozen all the same."""

    def made():
        model = nn.Sequential(*layers())
        if transposed:
            for index in range(len(model)):
                torch.manual_seed(index)
                model[index] = Conv1D(WIDTH, WIDTH)
        torch.manual_seed(1)
        return adapted(model)

    model, adapter = made()
    y = model(x)
    y.sum().backward()
    wanted = {name: core.grad for name, core in adapter.named_parameters()}
    other, _ = made()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = FullyShardedDataParallel(
            other, use_orig_params=True, device_id=torch.device("cpu")
        )
        again = sharded(x)
        again.sum().backward()
        assert torch.equal(again, y)
        got = {
            name.replace("_fsdp_wrapped_module.", ""): p.grad
            for name, p in sharded.named_parameters()
            if p.grad is not None
        }
        assert got.keys() == wanted.keys()
        for name, grad in wanted.items():
            assert same_mathematics(got[name], grad)
    finally:
        dist.destroy_process_group()
