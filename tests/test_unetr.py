"""The model of the paper, at its size: counts, bits, and every core moving."""

import copy

import pytest
import torch
from monai.networks.nets import UNETR
from torch import nn

import tcur_kernels as tcur
from plain import by_plain_torch
from tolerance import assert_composition_close


def unetr(img_size, **sizes):
    torch.manual_seed(0)
    return UNETR(in_channels=1, out_channels=2, img_size=img_size, **sizes)


def test_the_papers_number_of_trainable_parameters():
    """128³, feature 16, hidden 768, rank 8, decoder trained: 2,678,528 + 72 slices x 64."""
    model = unetr((128, 128, 128), feature_size=16, hidden_size=768, mlp_dim=3072, num_heads=12)
    assert sum(p.numel() for p in model.parameters()) == 93_029_602
    adapter = tcur.adapt(model, rank=8, train_also=("decoder*",))
    assert adapter.count_parameters() == 2_683_136
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2_683_136
    plan = {stack.name: stack.n3 for stack in adapter.plan.stacks}
    assert plan == {"3072x768": 12, "768x3072": 12, "768x768": 48}
    attention = next(stack for stack in adapter.plan.stacks if stack.n3 == 48)
    assert [(m.module, m.slices) for m in attention.members[:2]] == [
        ("vit.blocks.0.attn.out_proj", 1),
        ("vit.blocks.0.attn.qkv", 3),
    ]
    left_out = {item.module: item.reason for item in adapter.plan.left_out}
    not_named = "Conv3d is not a linear layer (targets may name it)"
    assert left_out["out.conv.conv"] == not_named
    assert left_out["decoder2.conv_block.conv1.conv"] == "trained directly (train_also)"
    assert not any(type(model.get_submodule(name)) is nn.Linear for name in left_out)
    mlp, back, attention, others = str(adapter.plan).splitlines()
    assert mlp == (
        "stack 3072x768: 12 matrices of 3072 x 768 share one core of 12 x 8 x 8 numbers: "
        "vit.blocks.0-11.mlp.linear1"
    )
    assert back.endswith(" of 12 x 8 x 8 numbers: vit.blocks.0-11.mlp.linear2")
    assert attention == (
        "stack 768x768: 48 matrices of 768 x 768 share one core of 48 x 8 x 8 numbers: "
        "vit.blocks.0-11.attn.out_proj, "
        "vit.blocks.0-11.attn.qkv (3 matrices each: fused q, k, v)"
    )
    assert others.startswith(f"left out: {len(left_out)} modules, which plan.describe() names: ")
    assert f"; 11 x {not_named}; " in others
    lines = adapter.plan.describe().splitlines()
    assert len(lines) == 3 + (12 + 12 + 24) + 1 + len(left_out)
    assert "   45-47  vit.blocks.11.attn.qkv" in "\n".join(lines)


@pytest.fixture
def small():
    return unetr((32, 32, 32), feature_size=4, hidden_size=48, mlp_dim=96, num_heads=4).eval()


@pytest.mark.parametrize("mode", ["materialized", "factored"])
def test_a_small_unetr_trains_and_comes_back(small, mode, tmp_path):
    base = copy.deepcopy(small)
    x = torch.randn(1, 1, 32, 32, 32)
    adapter = tcur.adapt(small, rank=4, mode=mode, train_also=("decoder*", "out"))
    with torch.no_grad():
        assert torch.equal(small(x), base(x))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        small(x).square().mean().backward()
        optimizer.step()
    for name, stack in adapter.stacks.items():
        assert (stack.core != 0).all(dim=(1, 2)).all(), f"a slice of {name} did not move"
    adapter.save(tmp_path / "adapter.safetensors")
    twin = copy.deepcopy(base)
    loaded = tcur.load_adapter(twin, tmp_path / "adapter.safetensors")
    with torch.no_grad():
        y, expected = small(x), by_plain_torch(adapter, x)
        assert_composition_close(y, *expected)
        assert torch.equal(twin(x), y)
        loaded.merge()
        assert_composition_close(twin(x), *expected)
        loaded.unmerge()
        assert torch.equal(twin(x), y)


def test_the_published_way_trains_nothing(small):
    """What the released script does: a core outside of the model gets no gradient."""
    stack = torch.stack([block.mlp.linear1.weight.data for block in small.vit.blocks])
    d = tcur.tensor_cur(stack, 4)
    core = torch.nn.Parameter(d.core)
    update = tcur.t_product(tcur.t_product(d.lateral, core), d.horizontal)
    for block, delta in zip(small.vit.blocks, update, strict=True):
        block.mlp.linear1.weight.data = block.mlp.linear1.weight.data + delta.detach()
    small(torch.randn(1, 1, 32, 32, 32)).sum().backward()
    assert core.grad is None
