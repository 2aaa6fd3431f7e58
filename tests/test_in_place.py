"""Adapted layers stay the modules that they were, and their weight reads as the one that counts."""

import copy
import gc
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import tcur_kernels as tcur
from plain import Plain
from tolerance import assert_composition_close, same_mathematics

WIDTH = 12


def layers(count=4, seed=0, bias=True):
    torch.manual_seed(seed)
    return [nn.Linear(WIDTH, WIDTH, bias) for _ in range(count)]


def randomise(adapter, std=0.5):
    with torch.no_grad():
        for stack in adapter.stacks.values():
            stack.core.normal_(std=std)


def adapted(model=None, **kwargs):
    model = nn.Sequential(*layers()) if model is None else model
    adapter = tcur.adapt(model, rank=3, **kwargs)
    randomise(adapter)
    return model, adapter


@pytest.fixture
def x():
    return torch.randn(5, WIDTH)


def assert_is_the_merged_model(model, adapter, *args):
    """Adapted and merged are one model, up to one rounding."""
    plain, exact = Plain(adapter, torch.float32), Plain(adapter, torch.float64)
    wide = [each.double() if each.is_floating_point() else each for each in args]
    assert_composition_close(model(*args), lambda: plain(*args), exact(*wide))
    merged = adapter.merge(inplace=False)
    assert_composition_close(merged(*args), lambda: plain(*args), exact(*wide))


# -- the same objects


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
    assert model.get_buffer("tcur_12x12__indices").dtype == torch.int64
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
    "model", [lambda: nn.Sequential(*layers()), Loop, Counted], ids=["Sequential", "Loop", "len"]
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


# -- reading the weight


class Reads(nn.Module):
    """Multiplies by weights itself, by half of its layers; the others it calls."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(layers())

    def forward(self, x):
        for index, part in enumerate(self.parts):
            x = part(x) if index % 2 else F.linear(x, part.weight, part.bias)
        return x


class ReadsAll(Reads):
    """Calls none of its layers."""

    def forward(self, x):
        for part in self.parts:
            x = F.linear(x, part.weight, part.bias)
        return x


@pytest.mark.parametrize("mode", ["auto", "materialized", "factored"])
def test_a_weight_that_is_read_is_w_eff(mode, x):
    base = Reads()
    model = copy.deepcopy(base)
    adapter = tcur.adapt(model, rank=3, mode=mode)
    assert torch.equal(model(x), base(x))
    assert torch.equal(model.parts[0].weight, base.parts[0].weight)
    randomise(adapter)
    assert_is_the_merged_model(model, adapter, x)
    plain, exact = Plain(adapter, torch.float32), Plain(adapter, torch.float64)

    def loss(y):
        return y.square().sum()

    y = model(x)
    loss(y).backward()
    (core,) = (stack.core for stack in adapter.stacks.values())
    assert_composition_close(
        (y, core.grad),
        lambda: plain.with_gradients(loss, x),
        exact.with_gradients(loss, x.double()),
    )
    with torch.no_grad():
        assert torch.equal(model.parts[0].weight.detach(), model.parts[0].weight.clone())


def test_gradients_through_a_read_can_be_differentiated_again():
    model, adapter = adapted(Reads(), mode="factored")
    model.double()
    core = adapter.stacks["12x12"].core
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, core: model(x), (x, core))
    assert torch.autograd.gradgradcheck(lambda x, core: model(x).sin(), (x, core))


def test_what_is_asked_of_a_weight_alone_computes_nothing(monkeypatch):
    model, adapter = adapted()
    part = model[0]
    stack = adapter.stacks["12x12"]
    monkeypatch.setattr(stack, "effective_value", None)  # computing anything fails
    with torch.no_grad():
        weight = part.weight
        assert (weight.dtype, weight.device.type, weight.shape) == (
            torch.float32,
            "cpu",
            (WIDTH, WIDTH),
        )
        assert (weight.size(0), weight.ndim, weight.numel(), weight.element_size()) == (
            WIDTH,
            2,
            WIDTH * WIDTH,
            4,
        )
        assert weight.is_floating_point()
        assert weight.is_contiguous()
        assert weight.to(torch.float32) is weight
        assert weight.to("meta").is_meta
    assert not torch.is_grad_enabled() or part.weight.requires_grad
    assert adapter.unused() == ()


def test_a_weight_serves_as_an_array_and_in_copies():
    model, _ = adapted()
    weight = model[0].weight.detach()
    assert torch.equal(torch.from_numpy(weight.numpy().copy()), weight.clone())
    assert torch.equal(torch.tensor(weight.tolist()), weight.clone())
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert type(twin) is torch.Tensor
        assert torch.equal(twin, weight.clone())
    assert repr(weight) == repr(weight.clone())
    with pytest.raises(RuntimeError, match=r"weight: expected a tensor without a graph"):
        model[0].weight.numpy()


def test_w_eff_of_an_earlier_core_is_not_overwritten(x):
    """Neither what was made of it: a transposed weight is a view."""
    model, adapter = adapted(mode="materialized")
    with torch.no_grad():
        turned = model[0].weight.T
        before = turned.clone()
        randomise(adapter)
        model(x)
        assert torch.equal(turned, before)


def test_writes_go_to_the_base_and_lost_ones_are_refused(x):
    model, adapter = adapted(mode="materialized")
    nn.init.eye_(model[0].weight)
    assert torch.equal(model[0].base_weight, torch.eye(WIDTH))
    model[3].weight.data = 3.0 * torch.eye(WIDTH)
    assert torch.equal(model[3].base_weight, 3.0 * torch.eye(WIDTH))
    model[3].weight.data = model[3].weight.data  # as code does that goes over all weights
    assert torch.equal(model[3].base_weight, 3.0 * torch.eye(WIDTH))
    model[1].weight.data.fill_(0.25)
    assert (model[1].base_weight == 0.25).all()
    with torch.no_grad():
        model[2].weight.copy_(torch.eye(WIDTH)).mul_(2.0)
    assert torch.equal(model[2].base_weight, 2 * torch.eye(WIDTH))
    assert_is_the_merged_model(model, adapter, x)
    with torch.no_grad():
        model[0].weight[0].zero_()
    gc.collect()
    with pytest.raises(RuntimeError, match="got a write in place to a part of the weight of 0"):
        model(x)
    assert_is_the_merged_model(model, adapter, x)


def test_weights_that_were_read_are_put_back_as_the_base(x):
    """Moving weights from device to device reads them, and registers what was read."""
    model, _ = adapted()
    y, before = model(x), model[1].base_weight.clone()
    model[0].weight = model[0].weight
    model[1].weight = nn.Parameter(model[1].weight.detach().to("cpu"), requires_grad=False)
    model[2]._parameters["weight"] = nn.Parameter(model[2].weight.data, requires_grad=False)
    state = model.state_dict()
    assert type(state["2.weight"]) is torch.Tensor
    assert torch.equal(state["1.weight"], before)
    assert torch.equal(model(x), y)
    other = nn.Linear(WIDTH, WIDTH)
    other.weight = nn.Parameter(model[3].weight.detach().clone())
    assert torch.equal(other.weight, model[3].weight.detach().clone())
    with pytest.raises(TypeError, match="expected a parameter, got the effective weight"):
        model[0].weight = model[3].weight


def test_reads_follow_merging_and_disabling():
    model, adapter = adapted()
    model(torch.ones(1, WIDTH))
    base = model[0].base_weight.clone()
    w_eff = model[0].weight.detach().clone()
    with adapter.disable():
        assert torch.equal(model[0].weight, base)
    adapter.merge()
    assert torch.equal(model[0].weight, w_eff)
    assert torch.equal(model[0].base_weight, base)
    adapter.unmerge()
    assert torch.equal(model[0].weight.detach(), w_eff)
    assert torch.equal(model[0].base_weight, base)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_models_that_read_weights_compile_whole(backend, x):
    model, adapter = adapted(Reads())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append(adapter.stacks["12x12"].core.grad.clone())
    assert same_mathematics(*grads)
    assert same_mathematics(compiled(x), model(x))


# -- torch's attention reads its weights


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_transformer_encoder_changes_no_bit_padded_places_included(norm_first, recorded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, 4, 24, batch_first=True, norm_first=norm_first, dropout=0.0
    )
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    model = copy.deepcopy(base)
    padding = torch.arange(6) >= torch.tensor([[6], [4], [3]])
    x = torch.randn(3, 6, WIDTH)
    adapter = tcur.adapt(model, rank=2)
    with torch.set_grad_enabled(recorded):
        before = base(x, src_key_padding_mask=padding)
        assert torch.equal(model(x, src_key_padding_mask=padding), before)
        randomise(adapter)
        moved = model(x, src_key_padding_mask=padding)
        merged = adapter.merge(inplace=False)(x, src_key_padding_mask=padding)
    assert not same_mathematics(moved, before)
    # A merged model trains nothing, and torch leaves padded places out where nothing is trained.
    rows = ~padding if recorded else ...
    assert same_mathematics(moved[rows], merged[rows])
    assert (moved[padding] == 0).all() == (before[padding] == 0).all()


# -- layers that never run


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


# -- several adapters in one backward


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


# -- FSDP1


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
