"""Layers that no stack can be made of: left out with a reason, refused as targets, unchanged."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import tcur_kernels as tcur
from tcur_kernels.adapters.plan import make_plan


def members(plan):
    return {stack.name: [(m.module, m.slices) for m in stack.members] for stack in plan.stacks}


def dict_of(plan):
    return {item.module: item.reason for item in plan.left_out}


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


#: What the reason adds for parameters with three axes.
EXPERTS = "; parameters [experts, n1, n2] are adapted if the targets name them"


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
        f"layers{EXPERTS}",
        "many": "ParameterList holds 0 [2, 3], 1 [2, 3], 2 [2, 3] and 2 more as bare parameters, "
        "not as linear layers",
    }
    assert plan.describe().count("bare parameter") == 4
    trained = dict_of(make_plan(model, None, 2, ["experts.up", "extra"]))
    assert trained["experts"].endswith(
        f"down [3, 4, 8] as a bare parameter, not as a linear layer{EXPERTS}"
    )
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
