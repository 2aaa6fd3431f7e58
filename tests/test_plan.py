"""Which layers go where, and the reasons of those that stay out."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import tcur_kernels as tcur
from models import Tiny
from tcur_kernels.adapters.plan import Member, make_plan


def members(plan):
    return {stack.name: [(m.module, m.slices) for m in stack.members] for stack in plan.stacks}


def test_by_shape_with_a_fused_projection():
    plan = make_plan(Tiny(), None, 2)
    assert members(plan) == {
        "8x8": [
            (f"blocks.{i}.attn.{name}", slices)
            for i in range(3)
            for name, slices in (("out_proj", 1), ("qkv", 3))
        ],
        "32x8": [(f"blocks.{i}.mlp.0", 1) for i in range(3)],
        "8x32": [(f"blocks.{i}.mlp.2", 1) for i in range(3)],
    }
    assert [stack.n3 for stack in plan.stacks] == [12, 3, 3]
    assert [(item.module, item.reason) for item in plan.left_out] == [
        ("embed", "the only slice of its shape"),
        ("head", "the only slice of its shape"),
    ]
    assert plan.describe().splitlines() == [
        "stack 8x8: 12 slices of 8 x 8, rank 2",
        "        0  blocks.0.attn.out_proj",
        "      1-3  blocks.0.attn.qkv",
        "        4  blocks.1.attn.out_proj",
        "      5-7  blocks.1.attn.qkv",
        "        8  blocks.2.attn.out_proj",
        "     9-11  blocks.2.attn.qkv",
        "stack 32x8: 3 slices of 32 x 8, rank 2",
        *[f"        {i}  blocks.{i}.mlp.0" for i in range(3)],
        "stack 8x32: 3 slices of 8 x 32, rank 2",
        *[f"        {i}  blocks.{i}.mlp.2" for i in range(3)],
        "left out:",
        "  embed: the only slice of its shape",
        "  head: the only slice of its shape",
    ]
    assert str(plan).splitlines() == [
        "stack 8x8: 12 matrices of 8 x 8 share one core of 12 x 2 x 2 numbers: "
        "blocks.0-2.attn.out_proj, blocks.0-2.attn.qkv (3 matrices each: fused q, k, v)",
        "stack 32x8: 3 matrices of 32 x 8 share one core of 3 x 2 x 2 numbers: blocks.0-2.mlp.0",
        "stack 8x32: 3 matrices of 8 x 32 share one core of 3 x 2 x 2 numbers: blocks.0-2.mlp.2",
        "left out:",
        "  embed: the only slice of its shape",
        "  head: the only slice of its shape",
    ]


def test_a_projection_to_three_times_the_width_is_cut_by_its_name_only():
    model = nn.Sequential(*[nn.Linear(4, 12) for _ in range(2)])
    assert members(make_plan(model, None, 2)) == {"12x4": [("0", 1), ("1", 1)]}


@pytest.mark.parametrize(
    ("targets", "stacks"),
    [
        ("attn.qkv", ["8x8"]),
        (["blocks.*.mlp.0", "mlp.2"], ["32x8", "8x32"]),
        (["blocks.0.attn.out_proj"], ["8x8"]),
        (["blocks.?.attn.*"], ["8x8"]),
        (["head"], ["5x8"]),
    ],
)
def test_by_name_and_pattern(targets, stacks):
    plan = make_plan(Tiny(), targets, 2)
    assert [stack.name for stack in plan.stacks] == stacks


def test_by_mapping():
    targets = {"attention": ["attn.qkv", "attn.out_proj"], "up": "mlp.0"}
    plan = make_plan(Tiny(), targets, 2)
    assert [stack.name for stack in plan.stacks] == ["attention", "up"]
    assert plan.stacks[0].members[:2] == (
        Member("blocks.0.attn.out_proj", 1),
        Member("blocks.0.attn.qkv", 3),
    )
    fused_by_shape = make_plan(Tiny(), {"all": ["attn.out_proj", "mlp.0"]}, 2)
    assert fused_by_shape.stacks[0].members[1] == Member("blocks.0.mlp.0", 4)


def test_reasons():
    model = Tiny()
    model.blocks[2].mlp[0].weight = model.blocks[1].mlp[0].weight
    model.extra = Odd(8, 8)
    model.table = nn.Embedding(8, 8)
    model.sub = OddAttention(8, 2)
    plan = make_plan(model, None, 7, trained=["blocks.0.mlp.2.bias"])
    reasons = {item.module: item.reason for item in plan.left_out}
    tied = "its weight is tied: blocks.1.mlp.0.weight, blocks.2.mlp.0.weight"
    assert reasons["blocks.1.mlp.0"] == tied
    assert reasons["blocks.0.mlp.2"] == "trained directly (train_also)"
    assert reasons["extra"] == "Odd is not a plain nn.Linear"
    assert reasons["sub"] == "OddAttention is not a plain nn.MultiheadAttention"
    assert reasons["table"] == "Embedding is not a linear layer"
    wide = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(9, 9), nn.Linear(9, 9))
    plan = make_plan(wide, None, 4)
    assert [stack.name for stack in plan.stacks] == ["9x9"]
    assert plan.left_out[0].reason == "rank 4 exceeds min(3, 3)"


def test_layers_of_two_dtypes_make_two_stacks():
    linears = [nn.Linear(4, 4), nn.Linear(4, 4).half()] * 1 + [
        nn.Linear(4, 4),
        nn.Linear(4, 4).half(),
    ]
    plan = make_plan(nn.Sequential(*linears), None, 2)
    assert members(plan) == {"4x4": [("0", 1), ("2", 1)], "4x4_2": [("1", 1), ("3", 1)]}


def test_integer_weights_are_left_out():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    model[1].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    assert make_plan(model, None, 2).left_out[0].reason == "its weight is torch.int8"


class Odd(nn.Linear):
    """A subclass, which may not use its own forward."""


class OddAttention(nn.MultiheadAttention):
    """A subclass, which may not use what it inherits."""


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ("nothing", ValueError, "targets: expected a module that matches 'nothing', got none"),
        (["attn.qkv", "x.*"], ValueError, r"targets: expected a module that matches 'x\.\*'"),
        ("norm", TypeError, "targets: expected 'norm' to match nn.Linear, got BatchNorm1d"),
        ("odd", TypeError, "targets: expected 'odd' to match a plain nn.Linear, got Odd"),
        ([3], TypeError, "targets: expected names or patterns, got int"),
        ({"a": "nothing"}, ValueError, r"targets\['a'\]: expected a module that matches"),
        ({"a.b": "head"}, ValueError, "targets: expected identifiers as stack names"),
        ({"keys": "head"}, ValueError, "targets: expected a stack name that is free"),
        ({"training": "head"}, ValueError, "targets: expected a stack name that is free"),
        ({"caretaker": "head"}, ValueError, "targets: expected a stack name that is free"),
        (
            {"a": "mlp.0", "b": "blocks.1.mlp.0"},
            ValueError,
            "each module in one stack, got blocks.1.mlp.0 in 'a' and 'b'",
        ),
        ({"a": ["mlp.0", "mlp.2"]}, ValueError, "expected layers made of 8 x 8 slices, got"),
        (
            {"a": ["attn.qkv", "half"]},
            ValueError,
            "expected one dtype and device, got .*32 on cpu in .*qkv, torch.float16 on cpu in half",
        ),
        (
            {"a": "tied"},
            ValueError,
            r"targets\['a'\]: expected 'tied' to match a layer that can be ",
        ),
        ("tied", ValueError, r"targets: expected 'tied' to match a layer .* got none \(tied: its"),
        (["mlp.0", "tied"], ValueError, r"'tied' to match a layer that .* got none \(tied: its"),
    ],
)
def test_plans_refuse(targets, error, message):
    model = Tiny()
    model.odd = Odd(8, 8)
    model.half = nn.Linear(8, 8).half()
    model.tied = nn.Linear(8, 8)
    model.tied_too = nn.Linear(8, 8)
    model.tied_too.weight = model.tied.weight
    with pytest.raises(error, match=message):
        make_plan(model, targets, 2)


def test_a_pattern_reports_what_it_meets_and_cannot_take():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)], Odd(4, 4), nn.ReLU())
    prune.identity(model[0], "weight")
    for targets in ("?", {"a": "?"}, lambda name, module: isinstance(module, nn.Linear)):
        plan = make_plan(model, targets, 2)
        assert [member.module for member in plan.stacks[0].members] == ["1", "2"]
        assert [item.module for item in plan.left_out] == ["0", "3"]


def test_only_what_the_targets_name_is_reported():
    model = Tiny()
    model.blocks[0].mlp[0].weight = model.blocks[1].mlp[0].weight
    assert not make_plan(model, "attn.qkv", 2).left_out
    for targets in (["attn.qkv", "mlp.0"], {"a": ["attn.qkv"], "b": ["mlp.0"]}):
        plan = make_plan(model, targets, 2)
        assert [item.module for item in plan.left_out] == ["blocks.0.mlp.0", "blocks.1.mlp.0"]


def test_a_model_without_linear_layers():
    with pytest.raises(ValueError, match=r"targets: expected at least one nn.Linear"):
        tcur.adapt(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_rank_beyond_an_explicit_target():
    with pytest.raises(ValueError, match=r"rank: expected 1 to min\(n1, n2\) = 8 .* got 9"):
        make_plan(Tiny(), "mlp.0", 9)
