"""Which convolutions are adapted, in which stacks, and what the plan says of them."""

import re
from itertools import chain

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import tcur_kernels as tcur
from tcur_kernels.adapters.plan import make_plan


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
    assert sorted(chain(*members(plan).values())) == sorted(chosen)
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
    assert "lazy" in chain(*members(make_plan(model, "*", 2)).values())
    trained = make_plan(model, "*", 2, trained=["plain.bias"])
    assert reasons(trained)["plain"] == "trained directly (train_also)"
