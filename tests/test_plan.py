"""Which layers go where, and the reasons of those that stay out."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

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
    text = str(plan)
    assert "stack 8x8: 12 slices of 8 x 8" in text
    assert "1-3  blocks.0.attn.qkv" in text
    assert "head: the only slice of its shape" in text


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


#: Ways of having a weight that is no parameter.
COMPUTED = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "prune structured": lambda layer: prune.ln_structured(layer, "weight", 0.5, 2, 0),
    "prune identity": lambda layer: prune.identity(layer, "weight"),
    "prune bias": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "hook weight_norm": lambda layer: old(nn.utils.weight_norm, layer),
    "hook spectral_norm": nn.utils.spectral_norm,
}


def old(change, layer):
    """What torch says of its older forms does not concern us."""
    with pytest.warns(FutureWarning, match="deprecated"):
        return change(layer)


@pytest.mark.parametrize("way", COMPUTED)
def test_a_weight_that_is_computed_is_left_out_and_stays_computed(way):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]).eval()
        COMPUTED[way](model[2])
        return model

    model, x = build(), torch.randn(5, 4)
    expected, kind = build()(x), type(model[2])
    adapter = tcur.adapt(model, rank=2)
    assert members(adapter.plan) == {"4x4": [("0", 1), ("1", 1), ("3", 1)]}
    [item] = adapter.plan.left_out
    assert item.module == "2"
    assert "is no parameter" in item.reason
    assert type(model[2]) is kind
    assert torch.equal(model(x), expected)

    for targets in ("2", ["0", "2"], {"a": ["0", "2"]}, lambda name, _: name == "2"):
        model = build()
        model[1].weight.requires_grad_(False)
        before = [parameter.requires_grad for parameter in model.parameters()]
        with pytest.raises((TypeError, ValueError), match=r"targets.*2: .*is no parameter"):
            tcur.adapt(model, targets, rank=2)
        assert [parameter.requires_grad for parameter in model.parameters()] == before
        assert not hasattr(model, "tcur")


@pytest.mark.parametrize("where", ["in_proj_weight", "q_proj_weight", "out_proj"])
def test_an_attention_with_a_computed_weight_is_left_out_whole(where):
    attention = nn.MultiheadAttention(4, 2, kdim=6 if where == "q_proj_weight" else None)
    if where == "out_proj":
        parametrizations.weight_norm(attention.out_proj)
    else:
        prune.l1_unstructured(attention, where, 0.5)
    model = nn.ModuleDict({"a": attention, "b": nn.MultiheadAttention(4, 2), "c": nn.Linear(4, 4)})
    plan = make_plan(model, None, 2)
    assert {m.module.partition(".")[0] for s in plan.stacks for m in s.members} == {"b", "c"}
    assert [item.module for item in plan.left_out] == ["a"]
    for target in ("a", "a.q_proj", "a.out_proj"):
        with pytest.raises(
            TypeError, match=rf"expected '{target}' to match nn.Linear, .*\(a: .*no"
        ):
            make_plan(model, target, 2)
    parametrizations.weight_norm(model["b"], "in_proj_weight")
    reason = make_plan(model, "c", 2) and dict_of(make_plan(nested(model), None, 2))["m.b"]
    assert "in_proj_weight by _WeightNorm is no parameter" in reason


def nested(model):
    """A model below another, with layers that can be adapted."""
    return nn.ModuleDict({"m": model, "x": nn.Linear(4, 4), "y": nn.Linear(4, 4)})


def dict_of(plan):
    return {item.module: item.reason for item in plan.left_out}


class Wrapped(torch.Tensor):
    """A tensor that is more than its numbers, as quantised ones are."""


class Sharded(Wrapped):
    """As a DTensor: a process has a part of it."""

    full_tensor = None


def test_weights_that_no_stack_can_be_made_of():
    def layer(change=None, *sizes):
        linear = nn.Linear(*(sizes or (4, 4)))
        if change is not None:
            linear.weight = nn.Parameter(change(linear.weight.detach()))
        return linear

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: tensors without elements, and of a new layout
        model = nn.ModuleDict(
            {
                "plain": layer(),
                "lazy": nn.LazyLinear(4),
                "wide": layer(None, 0, 4),
                "flat": layer(None, 4, 0),
                "float8": layer(lambda w: w.to(torch.float8_e4m3fn)),
                "complex": layer(lambda w: w.to(torch.complex64)),
                "wrapped": layer(lambda w: w.as_subclass(Wrapped)),
                "sharded": layer(lambda w: w.as_subclass(Sharded)),
                "sparse": layer(lambda w: w.to_sparse_csr()),
                "meta": layer(lambda w: w.to("meta")),
                "other": layer(),
            }
        )
    model["biased"] = layer()
    model["biased"].bias = nn.Parameter(torch.zeros(4).as_subclass(Wrapped))
    plan = make_plan(model, None, 2)
    assert members(plan) == {"4x4": [("plain", 1), ("other", 1)]}
    reasons = {
        "lazy": "its weight is not initialised yet: run a batch through the model first",
        "wide": "its weight has no elements: [4, 0]",
        "flat": "its weight has no elements: [0, 4]",
        "float8": "its weight is torch.float8_e4m3fn",
        "complex": "its weight is torch.complex64",
        "wrapped": "its weight is a Wrapped, no plain tensor",
        "sharded": "its weight is sharded: adapt first, then fully_shard",
        "sparse": "its weight is torch.sparse_csr",
        "meta": "its weight is on the meta device: C and R are slices of loaded weights",
        "biased": "its bias is a Wrapped, no plain tensor",
    }
    assert dict_of(plan) == reasons
    for name, reason in reasons.items():
        with pytest.raises((TypeError, ValueError), match=re.escape(f"({name}: {reason})")):
            make_plan(model, ["plain", "other", name], 2)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_layers_that_are_not_initialised_stay_lazy():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LazyLinear(3))
    adapter = tcur.adapt(model, rank=2)
    assert dict_of(adapter.plan).keys() == {"2"}
    assert model(torch.randn(5, 4)).shape == (5, 3)
    assert not model[2].weight.requires_grad
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LazyBatchNorm1d())
    with pytest.raises(
        ValueError, match=r"model: expected buffers with values, got 2.running_mean"
    ):
        tcur.adapt(model, rank=2)
    assert model[0].weight.requires_grad


class Experts(nn.Module):
    """Matrices as parameters of their own, as experts and position embeddings are."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 4))
        self.down = nn.Parameter(torch.randn(3, 4, 8))
        self.scale = nn.Parameter(torch.ones(4))
        self.token = nn.Parameter(torch.ones(1, 1, 4))
        self.packed = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 5, 4))
        self.extra = nn.Parameter(torch.zeros(5, 4))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm((5, 4))
        self.experts = Experts()
        self.many = nn.ParameterList(torch.randn(2, 3) for _ in range(5))


def test_matrices_that_are_bare_parameters_are_named():
    model = Mixture()
    plan = make_plan(model, None, 2)
    assert dict_of(plan) == {
        "position": "a bare parameter of Mixture, not a linear layer",
        "extra": "a bare parameter of Mixture, not a linear layer",
        "experts": "Experts holds up [3, 8, 4], down [3, 4, 8] as bare parameters, not as linear "
        "layers",
        "many": "ParameterList holds 0 [2, 3], 1 [2, 3], 2 [2, 3] and 2 more as bare parameters, "
        "not as linear layers",
    }
    assert str(plan).count("bare parameter") == 4
    trained = dict_of(make_plan(model, None, 2, ["experts.up", "extra"]))
    assert trained["experts"].endswith("down [3, 4, 8] as a bare parameter, not as a linear layer")
    assert trained["extra"] == "trained directly (train_also)"
    trained = dict_of(make_plan(model, None, 2, ["experts.up", "experts.down"]))
    assert trained["experts"] == "trained directly (train_also)"
    assert not make_plan(model, "layers.*", 2).left_out
    for name in ("experts", "position"):
        with pytest.raises(TypeError, match=rf"expected '{name}' to match nn.Linear.*\({name}: "):
            make_plan(model, ["layers.*", name], 2)


def test_integers_are_not_trained():
    model = Mixture()
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(TypeError, match=r"train_also: expected .*uint8 in experts.packed by 'exp"):
        tcur.adapt(model, rank=2, train_also=["norm", "experts"])
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_stacks_of_zeros_are_left_out():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(2)], *[nn.Linear(4, 6) for _ in "ab"])
    nn.init.zeros_(model[0].weight)  # one of two is no hindrance
    for layer in model[2:]:
        nn.init.zeros_(layer.weight)
    plan = make_plan(model, None, 2)
    assert members(plan) == {"4x4": [("0", 1), ("1", 1)]}
    assert [item.module for item in plan.left_out] == ["2", "3"]
    assert "the core could never learn" in plan.left_out[0].reason
    for targets in (["1", "2", "3"], {"a": ["2", "3"]}):
        with pytest.raises(ValueError, match=r"targets: .* not all zero in stack .*zeros in 2, 3"):
            make_plan(model, targets, 2)
    with torch.device("meta"):
        assert len(make_plan(nn.Sequential(nn.Linear(4, 4)), "0", 2, loaded=False).stacks) == 1


def test_slices_of_zeros_are_refused():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(2)])
    for layer in model:
        nn.init.zeros_(layer.weight[0])
        nn.init.zeros_(layer.weight[:, 1])
    with pytest.raises(ValueError, match=r"stack 4x4: selection: expected columns C .* got zeros"):
        tcur.adapt(model, rank=1, selection=([2], [1]))
    with pytest.raises(ValueError, match=r"stack 4x4: selection: expected rows R .* got zeros"):
        tcur.adapt(model, rank=1, selection=([0], [2]))
    assert all(parameter.requires_grad for parameter in model.parameters())
    tcur.adapt(model, rank=1, selection=([2], [2]))


def test_a_pattern_reports_what_it_meets_and_cannot_take():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)], Odd(4, 4), nn.ReLU())
    prune.identity(model[0], "weight")
    for targets in ("?", {"a": "?"}, lambda name, module: isinstance(module, nn.Linear)):
        plan = make_plan(model, targets, 2)
        assert [member.module for member in plan.stacks[0].members] == ["1", "2"]
        assert list(dict_of(plan)) == ["0", "3"]


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
