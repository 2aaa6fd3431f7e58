"""Convolutions of every kind are adapted: values, gradients, modules, and a base that changes."""

import copy
import hashlib
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import tcur_kernels as tcur
from adapted import assert_is_the_merged_model, randomise
from plain import Plain
from tcur_kernels.adapters.file import read_contents
from tcur_kernels.adapters.fingerprint import digest, frozen_digest
from tcur_kernels.adapters.plan import make_plan
from tcur_kernels.layers.convolution import TProductConv2d
from tcur_kernels.merge.directory import _merged
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
    loaded.load(tmp_path / "a", "again")


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
        (built,) = {
            part.weight.detach().numbers.untyped_storage().data_ptr() for part in model.parts
        }
        assert model.parts[0].weight.detach().numbers.untyped_storage().data_ptr() == built


@pytest.mark.parametrize("name", ["2d", "transposed 2d"])
def test_gradients_can_be_checked_numerically(name):
    model, x = two_of(name, torch.float64)
    adapter = adapt(model, mode="factored")
    (stack,), x = adapter.stacks.values(), x[:1, :, :3].requires_grad_()
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


def test_transforms_of_functions():
    """Batches of inputs and of cores are well; C and R are slices of one base."""
    model, x = two_of("2d", torch.float64)
    adapter = adapt(model)
    core, y = adapter.stacks["6x18"].core, model(x)
    loss(y).backward()
    assert_equal_in_float64(vmap(model)(x), y)

    def of(name, value):
        return functional_call(model, {name: value}, (x,))

    found = grad(lambda core: loss(of("tcur.6x18", core)))(core.detach())
    assert_equal_in_float64(found, core.grad)
    cores = torch.stack([core.detach(), torch.zeros_like(core)])
    both = vmap(lambda core: of("tcur.6x18", core))(cores)
    assert_equal_in_float64(both[0], y)
    weights = torch.stack([model.parts[0].base_weight] * 2)
    with pytest.raises(ValueError, match="weight: expected one base weight for all, got a batch"):
        vmap(lambda weight: of("parts.0.weight", weight))(weights)


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
    with (
        pytest.raises(ValueError, match=r"cores: expected .* on meta"),
        adapter.batch(stacked, torch.tensor([0, 1])),
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


class Both(nn.Module):
    """A linear layer, once as a convolution and once as itself."""

    def __init__(self):
        super().__init__()
        self.point, self.flat = nn.Conv1d(8, 6, 1), nn.Linear(8, 6)

    def forward(self, x):
        return self.point(x) + self.flat(x.mT).mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_layers_and_points_in_one_stack(dtype):
    """Whether the linear layer builds W_eff, too, or never does, as on a half-precision base."""
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
    assert_composition_close(y, lambda: plain(x), exact(x.double()))
    _, wanted = exact.with_gradients(loss, x.double())
    (core,) = (stack.core for stack in adapter.stacks.values())
    assert same_mathematics(core.grad.to(dtype), wanted.to(dtype))


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


def test_a_tensor_of_a_file_is_merged_however_it_lies_in_memory(tmp_path):
    """As those do that transformers puts together of several."""
    model, _ = two_of("2d")
    adapter = adapt(model)
    adapter.save(tmp_path / "a")
    (stored,) = read_contents(tmp_path / "a").stacks
    weight = model.parts[0].base_weight.to(memory_format=torch.channels_last)
    how = {"factors": adapter.stacks["6x18"].factors, "stored": stored, "index": 0}
    merged = _merged(weight, **how)
    assert torch.equal(merged, _merged(weight.contiguous(), **how))
    assert not torch.equal(merged, weight)


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
