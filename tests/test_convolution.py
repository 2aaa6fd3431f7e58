"""Convolutions of every kind are adapted: values, gradients, plans, files, batches."""

import copy
import hashlib
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import tcur_kernels as tcur
from adapted import assert_is_the_merged_model, randomise
from plain import Plain
from tcur_kernels.adapters.fingerprint import digest, frozen_digest
from tcur_kernels.adapters.plan import make_plan
from tcur_kernels.layers.convolution import TProductConv2d
from tcur_kernels.layers.rows import Rows, using_rows
from tolerance import assert_composition_close, assert_equal_in_float64, same_mathematics

#: A module, the shape of its input, and the size of its matrix.
KINDS = {
    "1d": (lambda: nn.Conv1d(3, 6, 3), (2, 3, 7), (6, 9)),
    "2d": (lambda: nn.Conv2d(3, 6, (2, 3), bias=False), (2, 3, 5, 4), (6, 18)),
    "3d": (lambda: nn.Conv3d(2, 5, 2, stride=2), (2, 2, 4, 4, 5), (5, 16)),
    "transposed 1d": (
        lambda: nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1, output_padding=1),
        (2, 4, 5),
        (4, 9),
    ),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, dilation=2),
        (2, 4, 5, 4),
        (4, 12),
    ),
    "transposed 3d": (
        lambda: nn.ConvTranspose3d(4, 2, 2, stride=2, bias=False),
        (2, 4, 2, 3, 2),
        (4, 16),
    ),
    "dilated, strided": (
        lambda: nn.Conv2d(3, 6, 3, stride=2, padding=2, dilation=2),
        (2, 3, 7, 7),
        (6, 27),
    ),
    "in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), (6, 18)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding="same"), (2, 6, 5, 5), (6, 9)),
    "circular": (
        lambda: nn.Conv1d(3, 6, 3, padding=1, padding_mode="circular"),
        (2, 3, 7),
        (6, 9),
    ),
    "pointwise": (lambda: nn.Conv2d(3, 6, 1, padding="valid"), (2, 3, 4, 4), (6, 3)),
    "without a batch": (lambda: nn.Conv2d(3, 6, 2), (3, 5, 4), (6, 12)),
}


def two_of(name, dtype=torch.float32):
    """A model that applies two modules of a kind to its input, and such an input."""
    torch.manual_seed(0)
    make, shape, _ = KINDS[name]
    return Sum(make(), make()).to(dtype).eval(), torch.randn(shape, dtype=dtype)


class Sum(nn.Module):
    """The sum of what its parts give for one input."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x, *args):
        return sum(part(x, *args) for part in self.parts)


def adapt(model, targets="parts.*", **kwargs):
    """Adapted with cores that are not zero."""
    adapter = tcur.adapt(model, targets, rank=2, **kwargs)
    randomise(adapter, 0.2)
    return adapter


def loss(y):
    return y.square().sum()


@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_of_every_kind(name, tmp_path):
    """Against float64; and adapted, merged and loaded anew are one model."""
    model, x = two_of(name, torch.float64)
    base, names = copy.deepcopy(model), list(model.state_dict())
    adapter = tcur.adapt(model, "parts.*", rank=2)
    assert torch.equal(model(x), base(x))  # a zero core changes no bit
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
    rows, columns = KINDS[name][2]
    assert [(s.n1, s.n2, s.n3) for s in adapter.plan.stacks] == [(rows, columns, 2)]
    assert [n for n in model.state_dict() if not n.startswith("tcur.")] == names
    randomise(adapter)
    (stack,) = adapter.stacks.values()
    y = model(x)
    loss(y).backward()
    exact = Plain(adapter, torch.float64, base)
    assert_equal_in_float64((y, stack.core.grad), exact.with_gradients(loss, x))
    assert not same_mathematics(y, base(x))

    state = base.state_dict()
    with adapter.disable():
        assert torch.equal(model(x), base(x))
    merged = adapter.merge(inplace=False)
    assert [type(part) for part in merged.parts] == [type(part) for part in base.parts]
    assert_equal_in_float64(merged(x), y)
    adapter.merge()
    assert torch.equal(model(x), merged(x))
    assert torch.equal(model.parts[0].base_weight, base.parts[0].weight)
    adapter.unmerge()
    assert all(torch.equal(model.state_dict()[n], state[n]) for n in names)
    adapter.save(tmp_path / "a")
    loaded = tcur.load_adapter(base, tmp_path / "a")
    assert torch.equal(base(x), model(x))
    assert loaded.plan.describe() == adapter.plan.describe()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["auto", "materialized", "factored"])
def test_precisions_and_modes(dtype, mode):
    model, x = two_of("3d", dtype)
    adapter = adapt(model, mode=mode)
    plain, exact = Plain(adapter, dtype), Plain(adapter, torch.float64)
    with torch.no_grad():
        y = model(x)
    assert y.dtype == dtype
    assert_composition_close(y, lambda: plain(x), exact(x.double()))
    stack = adapter.plan.stacks[0]
    merged = adapter.merge(inplace=False)
    if mode == "factored":
        assert "each call forms W_eff of its layer and does not keep it" in stack.note
    else:
        assert torch.equal(y, merged(x))
    is_half = dtype != torch.float32
    assert (f"rounded to {dtype}, which swallows small updates" in stack.note) == is_half
    assert stack.is_special == (is_half or mode != "auto")
    if mode != "factored":  # kept as long as the core stays the same
        (built,) = {part.weight.detach().numbers.untyped_storage().data_ptr() for part in model.parts}
        assert model.parts[0].weight.detach().numbers.untyped_storage().data_ptr() == built


@pytest.mark.parametrize("name", ["2d", "transposed 2d"])
def test_gradients_can_be_checked_numerically(name):
    model, x = two_of(name, torch.float64)
    adapter = adapt(model, mode="factored")
    (stack,), x = adapter.stacks.values(), x[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, core: model(x), (x, stack.core))
    assert torch.autograd.gradgradcheck(lambda x, core: model(x).sin(), (x, stack.core))


@pytest.mark.parametrize("name", ["2d", "transposed 1d"])
def test_autocast_does_what_it_does_to_the_merged_model(name):
    model, x = two_of(name)
    adapter = adapt(model)
    merged = adapter.merge(inplace=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert torch.equal(y, merged(x))
    assert y.dtype == torch.bfloat16
    loss(y.float()).backward()
    (core,) = (stack.core for stack in adapter.stacks.values())
    assert core.grad.dtype == torch.float32
    assert core.grad.any()


@pytest.mark.parametrize("name", ["2d", "transposed 3d", "pointwise"])
def test_the_order_of_channels_in_memory_is_that_of_the_base(name):
    """torch chooses by it how it convolves, so bits would change; and C and R stay."""
    model, x = two_of(name)
    format_ = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    model.to(memory_format=format_)
    base = copy.deepcopy(model)
    adapter = tcur.adapt(model, "parts.*", rank=2)
    (stack,) = adapter.stacks.values()
    assert torch.equal(model(x), base(x))
    assert model(x).stride() == base(x).stride()
    assert model.parts[0].weight.clone().stride() == base.parts[0].weight.stride()
    randomise(adapter)
    y, generation = model(x), stack.base.generation
    assert_is_the_merged_model(model, adapter, x)
    assert adapter.merge(inplace=False)(x).stride() == base(x).stride()
    for _ in range(2):
        loss(model(x)).backward()
    assert stack.base.generation == generation
    model.to(memory_format=torch.contiguous_format)
    assert same_mathematics(model(x), y)


def test_compiled_and_exported():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
    )
    x = torch.randn(2, 3, 4, 4)
    adapter = adapt(model, ["0", "2"])
    plain, exact = Plain(adapter, torch.float32), Plain(adapter, torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    loss(y).backward()
    grads = tuple(stack.core.grad for stack in adapter.stacks.values())
    wanted = exact.with_gradients(loss, x.double())
    assert_composition_close((y, *grads), lambda: plain.with_gradients(loss, x), wanted)
    exported = torch.export.export(model, (x,)).module()
    assert_composition_close(exported(x), lambda: plain(x), exact(x.double()))


def test_modules_stay_themselves():
    torch.manual_seed(0)
    model, x = two_of("2d")
    part, called = model.parts[0], []
    part.note = "kept"
    part.register_forward_hook(lambda *_: called.append(1))
    lines = repr(model).splitlines()
    adapter = adapt(model)
    assert model.parts[0] is part
    assert isinstance(part, nn.Conv2d)
    assert part.note == "kept"
    y = model(x)
    assert called == [1]
    assert "TProductConv2d(3, 6, kernel_size=(2, 3), stride=(1, 1), bias=False, " in repr(model)
    assert "slice=0 of 2, rank=2)" in repr(model)
    part._forward_hooks.clear()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.parts[1]) is TProductConv2d
        assert torch.equal(twin(x), y)
    assert repr(adapter.merge(inplace=False)).splitlines()[:4] == lines[:4]
    assert torch.equal(functional_call(model, dict(model.named_parameters()), (x,)), y)
    zero = {"tcur.6x18": torch.zeros_like(adapter.stacks["6x18"].core)}
    base = sum(nn.functional.conv2d(x, part.base_weight) for part in model.parts)
    assert torch.equal(functional_call(model, zero, (x,)), base)


@pytest.mark.parametrize("name", ["2d", "transposed 2d"])
def test_only_shapes_matter_on_meta(name):
    model, x = two_of(name)
    y, adapter = model(x), adapt(model)
    stacked = adapter.stack_cores([{n: s.core for n, s in adapter.stacks.items()}] * 2)
    model.to("meta")
    out = model(x.to("meta"))
    assert (out.shape, out.device.type) == (y.shape, "meta")
    out.sum().backward()
    assert all(stack.core.grad.is_meta for stack in adapter.stacks.values())
    with pytest.raises(ValueError, match="cores: expected .* on meta"), adapter.batch(
        stacked, torch.tensor([0, 1])
    ):
        pass


def test_activation_checkpoints():
    model, x = two_of("2d")
    adapter = adapt(model)
    (core,) = (stack.core for stack in adapter.stacks.values())
    loss(model(x)).backward()
    wanted, core.grad = core.grad, None
    loss(checkpoint(model, x, use_reentrant=False)).backward()
    assert torch.equal(core.grad, wanted)
    core.grad = None
    loss(checkpoint(model, x.requires_grad_(), use_reentrant=True)).backward()
    assert torch.equal(core.grad, wanted)


def test_a_transposed_convolution_is_told_its_output_size():
    model, x = two_of("transposed 1d")
    sizes = [(10,), (9,)]
    base = copy.deepcopy(model)
    adapter = tcur.adapt(model, "parts.*", rank=2)
    for size in sizes:
        assert torch.equal(model(x, size), base(x, size))
    cores = adapter.stack_cores([{n: s.core for n, s in adapter.stacks.items()}] * 2)
    with adapter.batch(cores, torch.tensor([0, 1])):
        assert same_mathematics(model(x, (9,)), base(x, (9,)))


# -- plans


class Mixed(nn.Module):
    """Convolutions whose matrices have one size, 4 x 12, and others."""

    def __init__(self):
        super().__init__()
        self.tall = nn.Conv2d(4, 4, (3, 1))
        self.wide = nn.Conv2d(4, 4, (1, 3))
        self.tall2 = nn.Conv2d(4, 4, (3, 1), stride=2)
        self.back = nn.ConvTranspose2d(4, 4, (3, 1))
        self.flat = nn.Linear(12, 4)
        self.point = nn.Conv3d(12, 4, 1)
        self.groups = nn.Conv1d(24, 4, 1, groups=2)
        self.group = nn.Conv1d(24, 4, 1, groups=2)
        self.other, self.other2 = nn.Linear(4, 4), nn.Linear(4, 4)


def members(plan):
    return {stack.name: [m.module for m in stack.members] for stack in plan.stacks}


def reasons(plan):
    return {item.module: item.reason for item in plan.left_out}


CONVOLUTIONS = ["tall", "wide", "tall2", "back", "point", "groups", "group"]


def test_convolutions_of_one_kernel_share_a_stack():
    plan = make_plan(Mixed(), "*", 2)
    assert members(plan) == {
        "4x12": ["tall", "tall2"],
        "4x12_2": ["wide"],
        "4x12_3": ["back"],
        "4x12_4": ["flat", "point"],  # a linear layer at every point
        "4x12_5": ["groups", "group"],
        "4x4": ["other", "other2"],
    }
    lines = str(plan).splitlines()
    assert lines[0] == (
        "stack 4x12: 2 matrices of 4 x 12 (convolutions: out x in*kernel) share one core of "
        "2 x 2 x 2 numbers: tall, tall2"
    )
    assert "1 matrix of 4 x 12 (transposed convolutions: in x out*kernel) has a core" in lines[2]
    assert "(linear layers, convolutions: out x in*kernel) share one core" in lines[3]
    assert "matrices of 4 x 4 share" in lines[5]
    text = plan.describe()
    assert "        0  tall (a convolution: 4 out x 4*3*1 in*kernel)" in text
    assert "        0  back (a transposed convolution: 4 in x 4*3*1 out*kernel)" in text
    assert "        1  point (a convolution: 4 out x 12*1*1*1 in*kernel)" in text
    assert "        1  group (a convolution in 2 groups: 4 out x 12*1 in*kernel)" in text
    assert "        0  flat\n" in text
    by_layer = make_plan(Mixed(), ["tall", "back"], 2, stacks="layer")
    assert members(by_layer) == {"tall": ["tall"], "back": ["back"]}


def test_targets_may_put_any_matrices_of_one_size_together():
    model = Mixed().double()
    adapter = tcur.adapt(model, {"all": ["wide", "back", "flat", "point", "group"]}, rank=2)
    assert members(adapter.plan) == {"all": ["wide", "back", "flat", "point", "group"]}
    stack = adapter.plan.stacks[0]
    assert stack.note.startswith("convolutions: W_eff, built once for each version of the core; ")
    assert "; linear layers: W_eff from" in stack.note
    assert not stack.is_special
    half = tcur.adapt(Mixed().bfloat16(), ["flat", "point"], rank=2).plan.stacks[0]
    assert half.note == (
        "convolutions: W_eff, built once for each version of the core, rounded to torch.bfloat16, "
        "which swallows small updates; linear layers: factored: the base is torch.bfloat16, and "
        "W_eff rounded to it would swallow small updates"
    )
    assert half.is_special
    with pytest.raises(ValueError, match=r"targets\['a'\]: expected layers made of 4 x 12 slices"):
        make_plan(model, {"a": ["tall", "other"]}, 2)


def test_linear_layers_and_points_in_one_stack():
    """Whether the linear layer builds W_eff or not, in every precision."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.point, self.flat = nn.Conv1d(8, 6, 1), nn.Linear(8, 6)

        def forward(self, x):
            return self.point(x) + self.flat(x.mT).mT

    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model, x = Both().to(dtype), torch.randn(2, 8, 5, dtype=dtype)
        base = copy.deepcopy(model)
        adapter = tcur.adapt(model, "*", rank=2)
        assert [stack.n3 for stack in adapter.plan.stacks] == [2]
        assert torch.equal(model(x), base(x))
        randomise(adapter)
        plain, exact = Plain(adapter, dtype), Plain(adapter, torch.float64)
        y = model(x)
        loss(y).backward()
        wanted = exact.with_gradients(loss, x.double())
        (core,) = (stack.core for stack in adapter.stacks.values())
        found = (y.float(), core.grad)
        if dtype == torch.float32:
            assert_composition_close(found, lambda: plain.with_gradients(loss, x), wanted)
        else:
            assert all(
                same_mathematics(a.to(dtype), w.to(dtype))
                for a, w in zip(found, wanted, strict=True)
            )


def test_convolutions_are_adapted_if_targets_name_them():
    model = Mixed()
    plan = make_plan(model, None, 2)
    assert members(plan) == {"4x4": ["other", "other2"]}
    assert set(reasons(plan)) == {*CONVOLUTIONS, "flat"}
    assert reasons(plan)["tall"] == "Conv2d is not a linear layer (targets may name it)"
    assert reasons(plan)["flat"] == "the only slice of its shape"
    assert members(make_plan(model, "tall?", 2)) == {"4x12": ["tall2"]}
    with pytest.raises(ValueError, match=r"expected at least one nn.Linear that can be adapted"):
        make_plan(nn.Sequential(nn.Conv1d(3, 3, 1)), None, 2)


def only_linear(name, module):
    """Knows only what linear layers have."""
    return module.in_features == 4


#: A function, what it chooses of a `Mixed`, and the reason for convolutions that it did not mean.
FUNCTIONS = {
    "all": (lambda name, module: True, ["flat", "other", "other2"], "by its name alone"),
    "names": (lambda name, module: "t" in name, ["flat", "other", "other2"], "by its name alone"),
    "type": (lambda name, module: isinstance(module, nn.Conv2d), ["tall", "tall2", "wide"], None),
    "types": (
        lambda name, module: isinstance(module, nn.Linear | nn.ConvTranspose2d),
        ["back", "flat", "other", "other2"],
        None,
    ),
    "what it has": (lambda name, module: module.weight.shape[-1] == 3, ["wide"], None),
    "what linear layers have": (only_linear, ["other", "other2"], "has no attribute 'in_features'"),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions_choose_convolutions_if_they_look_at_them(case):
    function, chosen, why = FUNCTIONS[case]
    plan = make_plan(Mixed(), function, 2)
    assert sorted(sum(members(plan).values(), [])) == sorted(chosen)
    left = reasons(plan)
    if why is None:
        assert not left
    else:
        assert left.keys() <= set(CONVOLUTIONS)
        assert "wide" in left or case == "names"
        assert all(why in reason for reason in left.values())


def test_functions_that_name_stacks():
    plan = make_plan(
        Mixed(), lambda name, m: {nn.Conv2d: "kernels", nn.Linear: None}.get(type(m)), 2
    )
    assert members(plan) == {"kernels": ["tall", "wide", "tall2"]}
    plan = make_plan(Mixed(), lambda name, m: "a" if name in ("other", "tall") else None, 2)
    assert members(plan) == {"a": ["other"]}
    assert "by its name alone" in reasons(plan)["tall"]
    with pytest.raises(TypeError, match="to return a bool, a stack name or None, got int for tall"):
        make_plan(Mixed(), lambda name, module: 1 if name == "tall" else None, 2)


class Own(nn.Conv2d):
    """Another forward, perhaps."""


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_convolutions_that_no_stack_can_be_made_of():
    def kernel(change=lambda conv: conv):
        return change(nn.Conv2d(4, 4, 3))

    def hooked(conv):
        with pytest.warns(FutureWarning, match="deprecated"):
            return nn.utils.weight_norm(conv)

    def of(dtype):
        conv = nn.Conv2d(4, 4, 3)
        conv.weight = nn.Parameter(torch.ones(4, 4, 3, 3, dtype=dtype), False)
        return conv

    model = nn.ModuleDict(
        {
            "plain": kernel(),
            "own": Own(4, 4, 3),
            "lazy": nn.LazyConv2d(4, 3),
            "complex": of(torch.complex64),
            "whole": of(torch.int32),
            "meta": kernel(lambda conv: conv.to("meta")),
            "empty": nn.Conv2d(0, 4, 3),
            "computed": kernel(parametrizations.weight_norm),
            "hooked": kernel(hooked),
            "tied": kernel(),
            "tied2": kernel(),
        }
    )
    model["tied"].weight = model["tied2"].weight
    wanted = {
        "own": "Own is not a plain convolution",
        "lazy": "its weight is not initialised yet: run a batch through the model first",
        "complex": "its weight is torch.complex64",
        "whole": "its weight is torch.int32",
        "meta": "its weight is on the meta device: C and R are slices of loaded weights",
        "empty": "its weight has no elements: [4, 0, 3, 3]",
        "computed": "parametrised: its weight by _WeightNorm is no parameter",
        "hooked": "its weight is no parameter, computed from weight_g and weight_v",
        "tied": "its weight is tied: tied.weight, tied2.weight",
        "tied2": "its weight is tied: tied.weight, tied2.weight",
    }
    plan = make_plan(model, "*", 2)
    assert members(plan) == {"4x36": ["plain"]}
    assert reasons(plan) == wanted
    chosen = make_plan(model, lambda name, m: isinstance(m, nn.Conv2d), 2)
    assert members(chosen) == {"4x36": ["plain"]}
    assert reasons(chosen) == wanted
    for name, why in wanted.items():
        with pytest.raises((TypeError, ValueError), match=re.escape(f"{name}: {why}")):
            make_plan(model, ["plain", name], 2)
    model["lazy"](torch.randn(1, 2, 4, 4))
    assert "lazy" in sum(members(make_plan(model, "*", 2)).values(), [])
    trained = make_plan(model, "*", 2, trained=["plain.bias"])
    assert reasons(trained)["plain"] == "trained directly (train_also)"


# -- the base


def small():
    """A convolution between linear layers, as in networks that see tokens and images."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Conv1d(4, 4, 3), nn.Linear(4, 6), nn.Linear(6, 6))


def test_files_from_before_convolutions_could_be_adapted_still_fit():
    """What is frozen beside the stacks has the digest that it always had."""
    model = small()
    plan = make_plan(model, None, 2)
    state = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name not in ("0.weight", "3.weight"):
            state.update(f"{name} {digest([parameter])};".encode())
    assert frozen_digest(model, plan, []) == state.hexdigest()


def test_weights_in_files(tmp_path):
    model, x = small(), torch.randn(3, 4, 6)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        skeleton = small()
    adapter = tcur.adapt(skeleton, ["0", "1", "3"], rank=2, weights=tmp_path)
    wanted = tcur.adapt(model, ["0", "1", "3"], rank=2)
    assert skeleton(x.to("meta")).is_meta
    skeleton.load_state_dict(model.state_dict(), assign=True)
    for name, stack in adapter.stacks.items():
        assert torch.equal(stack.lateral, wanted.stacks[name].lateral)
        with torch.no_grad():
            stack.core.normal_(std=0.3)
            wanted.stacks[name].core.copy_(stack.core)
    assert torch.equal(skeleton(x), model(x))


def test_a_base_that_changes():
    """Through the version counter, past it, and by a checkpoint while the model is merged."""
    model, x = two_of("2d")
    base = copy.deepcopy(model)
    adapter = adapt(model)
    (stack,) = adapter.stacks.values()
    model(x)
    model.parts[0].base_weight.data += 1.0
    base.parts[0].weight.data += 1.0
    for _ in range(len(stack.base._samples)):  # one number is compared in each pass
        model(x)
    assert_equal_to_plain(model, adapter, base, x)
    with torch.no_grad():
        model.parts[1].weight.mul_(2.0)
        base.parts[1].weight.mul_(2.0)
    assert_equal_to_plain(model, adapter, base, x)
    adapter.merge()
    base.parts[0].load_state_dict({"weight": torch.randn_like(base.parts[0].weight)})
    model.parts[0].load_state_dict(base.parts[0].state_dict())  # not of the whole model
    assert_equal_to_plain(model, adapter, base, x)
    adapter.unmerge()
    assert_equal_to_plain(model, adapter, base, x)


def assert_equal_to_plain(model, adapter, base, x):
    plain, exact = (Plain(adapter, dtype, base) for dtype in (torch.float32, torch.float64))
    assert_composition_close(model(x), lambda: plain(x), exact(x.double()))


def test_gradients_and_ranks_of_a_budget():
    model, x = small().double(), torch.randn(3, 4, 6, dtype=torch.float64)
    found = tcur.collect_gradients(model, [x], lambda model, x: loss(model(x)), ["0", "1"])
    loss(model(x)).backward()
    assert_equal_in_float64(found["1"], model[1].weight.grad.flatten(1))
    model.zero_grad(set_to_none=True)
    every = tcur.collect_gradients(model, [x], lambda model, x: loss(model(x)))
    assert every.keys() == {"0", "2", "3"}
    adapter = tcur.adapt(model, ["0", "1"], rank=tcur.Budget(20), gradients=found)
    assert {stack.name for stack in adapter.plan.stacks} == {"6x6", "4x12"}


# -- many adapters in one batch

ADAPTERS = 3


def some_cores(adapter):
    torch.manual_seed(1)
    return [
        {name: torch.randn_like(stack.core) * 0.3 for name, stack in adapter.stacks.items()}
        for _ in range(ADAPTERS)
    ]


@pytest.fixture
def rows():
    """A model of several kinds of layers, its adapter, cores, and an input of four rows."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=3, padding="same", padding_mode="circular"),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.Conv2d(4, 5, 1),
        nn.Linear(8, 6),
    ).eval()
    adapter = tcur.adapt(model, "*", rank=2)
    return model, adapter, some_cores(adapter), torch.randn(4, 3, 4, 4)


def alone(adapter, cores, ids, x):
    """``plain`` and ``exact`` of `assert_composition_close`: each row with its adapter alone."""

    def each(dtype):
        models = [Plain(adapter, dtype) for _ in cores]
        for model, own in zip(models, cores, strict=True):
            for name, core in model.cores.items():
                core.data.copy_(own[name])
        return models

    def run(models, x):
        return torch.cat([models[i](row[None]) for row, i in zip(x, ids, strict=True)])

    narrow = each(torch.float32)
    return lambda: run(narrow, x), run(each(torch.float64), x.double())


@pytest.mark.parametrize("ids", [[2, 0, 2, 1], [1, 1, 1, 1], [2]], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_are_those_of_each_adapter_alone(rows, ids, compiled):
    model, adapter, cores, x = rows
    x = x[: len(ids)]
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with torch.no_grad():
        before = model(x)
        with adapter.batch(adapter.stack_cores(cores), torch.tensor(ids)):
            y = run(x)
            with adapter.disable():
                assert torch.equal(model(x), before)
    assert_composition_close(y, *alone(adapter, cores, ids, x))
    assert not same_mathematics(y, before)


def test_a_batch_of_cores_of_zeros_changes_no_bit(rows):
    model, adapter, cores, x = rows
    zeros = {name: torch.zeros_like(core) for name, core in cores[0].items()}
    ids = torch.tensor([1, 0, 1, 1])
    with torch.no_grad():
        wanted, whole = model(x[ids == 1]), model(x)
        with adapter.batch(adapter.stack_cores([cores[0], zeros]), ids):
            assert torch.equal(model(x)[ids == 1], wanted)
        with adapter.batch(adapter.stack_cores([cores[0], zeros]), torch.ones_like(ids)):
            assert torch.equal(model(x), whole)


def test_gradients_reach_the_cores_of_a_batch():
    model, x = two_of("2d", torch.float64)
    adapter = adapt(model)
    (stack,) = adapter.stacks.values()
    cores = torch.randn(2, *stack.core.shape, dtype=torch.float64, requires_grad=True)
    with stack.batch(cores, torch.tensor([1, 0])):
        y = model(x)
        loss(y).backward()
    for row, index in ((0, 1), (1, 0)):
        plain = Plain(adapter, torch.float64)
        plain.cores["6x18"].data.copy_(cores[index].detach())
        wanted = plain.with_gradients(loss, x[row : row + 1])
        assert_equal_in_float64((y[row : row + 1], cores.grad[index]), wanted)
    with (
        stack.batch(cores, torch.tensor([1, 0])),
        pytest.warns(UserWarning, match="None of the inputs have requires_grad"),
        pytest.raises(RuntimeError, match="checkpoint: expected use_reentrant=False"),
    ):
        checkpoint(model, x, use_reentrant=True)


def test_ids_of_rows_in_a_batch(rows):
    model, adapter, cores, x = rows
    stacked, ids = adapter.stack_cores(cores), torch.tensor([2, 0])
    with torch.no_grad():
        for repeat, wanted in (("each", [2, 2, 0, 0]), ("all", [2, 0, 2, 0])):
            with adapter.batch(stacked, ids, repeat=repeat):
                y = model(x)
            assert_composition_close(y, *alone(adapter, cores, wanted, x))
        with adapter.batch(stacked, ids):
            with pytest.raises(ValueError, match="x: expected 2 rows, one for each of adapter_ids"):
                model(x)
            with pytest.raises(ValueError, match=r"x: expected a batch of 4 axes, .*got \[3, 4, 4"):
                model(x[0])
        with adapter.batch(stacked, ids[:1]):
            assert same_mathematics(model[0](x[0]), model[0](x[:1])[0])
    stack = adapter.stacks["6x27"]
    tokens = Rows(stacked["6x27"], torch.zeros(2, 3, dtype=torch.int64), None)
    with using_rows(stack, tokens), pytest.raises(
        ValueError, match=r"adapter_ids: expected one id for each row where a convolution"
    ):
        model(x[:2])


def test_the_weight_of_a_batch_is_not_read(rows):
    model, adapter, cores, x = rows
    with adapter.batch(adapter.stack_cores(cores), torch.tensor([0, 1, 2, 0])):
        with pytest.raises(RuntimeError, match="weight: expected a layer that is called"):
            model[0].weight + 1
        with adapter.disable():
            assert torch.equal(model[0].weight, model[0].base_weight)
