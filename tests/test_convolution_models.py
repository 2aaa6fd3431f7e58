"""Whole models with convolutions, adapted with all their layers: what users rely on."""

import copy

import pytest
import torch
import transformers
from monai.networks.nets import SwinUNETR
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

import hf_models
import tcur_kernels as tcur
from adapted import randomise
from plain import Plain
from tcur_kernels import cli
from tolerance import assert_composition_close, assert_equal_in_float64, same_mathematics


class Block(nn.Module):
    """Two convolutions with batch norms, and a shortcut of one point if the size changes."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """The network of He and others, in small."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 5, stride=2, padding=2)
        sizes = [(6, 6, 1), (6, 6, 1), (6, 8, 2), (8, 8, 1)]
        self.blocks = nn.Sequential(*[Block(*size) for size in sizes])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Logits(nn.Module):
    """A model of transformers with its logits alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


def resnet_of_transformers():
    config = transformers.ResNetConfig(
        num_channels=3,
        embedding_size=6,
        hidden_sizes=[6, 8],
        depths=[2, 2],
        layer_type="basic",
        num_labels=3,
    )
    return transformers.ResNetForImageClassification(config)


def swin_unetr():
    return SwinUNETR(
        in_channels=2,
        out_channels=2,
        feature_size=12,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
        window_size=2,
        norm_name=("group", {"num_groups": 2}),
        spatial_dims=2,
    )


#: How a model is made, the shape of an image, and kinds of layers that it has.
MODELS = {
    "resnet": (ResNet, (3, 16, 16), (nn.Conv2d, nn.Linear)),
    "resnet of transformers": (
        lambda: Logits(resnet_of_transformers()),
        (3, 16, 16),
        (nn.Conv2d, nn.Linear),
    ),
    "vit": (lambda: Logits(hf_models.vit()), (3, 16, 16), (nn.Conv2d, nn.Linear)),
    "swin unetr": (swin_unetr, (2, 32, 32), (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)),
}


def build(name):
    """The model, with statistics of batch norms that are not those of a new one; and images."""
    make, shape, _ = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model, torch.randn(2, *shape)


def loss(y):
    return y.square().mean()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_adapted_whole(name, tmp_path):
    model, x = build(name)
    base, names = copy.deepcopy(model), list(model.state_dict())
    adapter = tcur.adapt(model, "*", rank=2)
    adapted = {member.module for stack in adapter.plan.stacks for member in stack.members}
    kinds = MODELS[name][2]
    assert adapted == {n for n, module in base.named_modules() if type(module) in kinds}
    assert {type(base.get_submodule(n)) for n in adapted} == set(kinds)
    assert not {item.module for item in adapter.plan.left_out} & adapted
    assert [n for n in model.state_dict() if not n.startswith("tcur.")] == names
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), base(x))

    randomise(adapter, 0.1)
    with torch.no_grad():
        y, merged = model(x), adapter.merge(inplace=False)
        w_eff = Plain(adapter, torch.float32, base).parameters()
        wanted = Plain(adapter, torch.float64, base)(x.double())
        assert not same_mathematics(y, base(x))
        assert_composition_close(y, lambda: functional_call(base, w_eff, (x,)), wanted)
        assert_composition_close(merged(x), lambda: functional_call(base, w_eff, (x,)), wanted)
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    adapter.save(tmp_path / "a")
    tcur.load_adapter(base, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(base(x), y)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_model_adapted_whole(name):
    model, x = build(name)
    base, x = copy.deepcopy(model.double()), x.double()
    adapter = tcur.adapt(model, "*", rank=2)
    randomise(adapter, 0.1)
    y = model(x)
    loss(y).backward()
    grads = tuple(stack.core.grad for stack in adapter.stacks.values())
    assert all(grad.any() for grad in grads)
    exact = Plain(adapter, torch.float64, base)
    assert_equal_in_float64((y, *grads), exact.with_gradients(loss, x))


@pytest.mark.parametrize("name", MODELS)
def test_two_adapters_in_one_batch(name):
    model, x = build(name)
    adapter = tcur.adapt(model, "*", rank=2)
    randomise(adapter, 0.1)
    adapter.add("other")
    alone, exact = [adapter.merge(inplace=False)], [Plain(adapter, torch.float64)]
    adapter.activate("other")
    randomise(adapter, 0.1)
    alone.append(adapter.merge(inplace=False))
    exact.append(Plain(adapter, torch.float64))
    cores = adapter.stack_cores(["default", "other"])
    # The windows of an image are rows of the layers in attentions.
    with torch.no_grad(), adapter.batch(cores, torch.tensor([1, 0]), repeat="each"):
        y = model(x)

    def run(models, x):
        return torch.cat([models[1](x[:1]), models[0](x[1:])])

    with torch.no_grad():
        assert_composition_close(y, lambda: run(alone, x), run(exact, x.double()))


@pytest.mark.parametrize("make", [hf_models.vit, resnet_of_transformers])
def test_directories_are_merged(make, tmp_path):
    """Also adapted from the files, with the model on the meta device."""
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 3, 16, 16)
    model.save_pretrained(tmp_path / "base")
    adapter = tcur.adapt(model, "*", rank=2)
    randomise(adapter, 0.1)
    adapter.save(tmp_path / "a")
    base, file, out = (str(tmp_path / name) for name in ("base", "a", "out"))
    assert cli.main(["merge", base, file, "-o", out]) == 0
    merged = Logits(type(model).from_pretrained(out).eval())
    plain, exact = (Plain(adapter, dtype) for dtype in (torch.float32, torch.float64))
    wanted = exact(x.double()).logits
    assert_composition_close(merged(x), lambda: plain(x).logits, wanted)
    assert_composition_close(model(x).logits, lambda: plain(x).logits, wanted)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "out"))
    changed = {n for n, tensor in after.items() if not torch.equal(tensor, before[n])}
    assert len(changed) == sum(len(stack.places) for stack in adapter.stacks.values())

    with torch.device("meta"):
        skeleton = make()
    again = tcur.adapt(skeleton, "*", rank=2, weights=tmp_path / "base")
    assert members(again.plan) == members(adapter.plan)
    for name, stack in again.stacks.items():
        assert torch.equal(stack.horizontal, adapter.stacks[name].horizontal)


def members(plan):
    return [[m.module for m in stack.members] for stack in plan.stacks]
