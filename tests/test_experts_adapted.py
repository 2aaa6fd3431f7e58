"""Which parameters of experts are adapted, and what becomes of their module and its files."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tcur_kernels as tcur
from adapted import randomise
from expert_models import (
    EXPERTS,
    IN,
    OUT,
    TARGETS,
    Experts,
    Model,
    adapted,
    exactly,
    tokens,
    with_gradients,
)
from tcur_kernels import cli
from tcur_kernels.adapters import fingerprint
from tcur_kernels.adapters.linear_maps import find_weights
from tcur_kernels.adapters.plan import make_plan
from tcur_kernels.layers.linear import Adapted
from tcur_kernels.merge import directory
from tolerance import assert_composition_close, same_mathematics

#: Each way to multiply reads one of two parameters.
pytestmark = pytest.mark.filterwarnings("ignore:.*never ran")


# -- which parameters are adapted


def test_the_plan_names_parameters():
    model = Model()
    left = {item.module: item.reason for item in make_plan(model, "first", 3).left_out}
    assert left == {}
    plan = make_plan(nn.ModuleList([model, nn.Linear(IN, IN)]), None, 3)
    assert [m.module for s in plan.stacks for m in s.members] == ["0.first", "1"]
    assert plan.left_out[0].reason.endswith(
        "; parameters [experts, n1, n2] are adapted if the targets name them"
    )
    plan = make_plan(model, ["*.rows", "first"], 3)
    assert [(s.name, s.n3, [m.module for m in s.members]) for s in plan.stacks] == [
        ("8x8", 1, ["first"]),
        ("12x8", 4, ["experts.rows"]),
    ]
    both = nn.ModuleDict({"a": Model(), "b": Model()})
    plan = make_plan(both, "rows", 3)
    assert [(s.name, s.n3) for s in plan.stacks] == [("12x8", 8)]
    plan = make_plan(both, "rows", 3, stacks="layer")
    assert [(s.name, s.n3) for s in plan.stacks] == [("a_experts_rows", 4), ("b_experts_rows", 4)]
    assert "a.experts.rows (4 matrices), b" not in str(plan)
    plan = make_plan(both, {"up": ["a.experts.rows"], "other": ["b.experts.rows"]}, 3)
    assert [(s.name, s.n1, s.n3) for s in plan.stacks] == [("up", 12, 4), ("other", 12, 4)]


def test_functions_are_asked_with_the_module_that_holds_them():
    asked = {}

    def choose(name, module):
        asked.setdefault(name, type(module).__name__)
        return name.endswith("columns")

    model = Model()
    model.experts.one = nn.Parameter(torch.randn(1, 5, 4))  # one matrix is no choice of experts
    plan = make_plan(model, choose, 3)
    asked.pop("experts.weight")  # to see whether the choice of the columns is meant
    assert asked == {"first": "Linear", "experts.rows": "Experts", "experts.columns": "Experts"}
    assert [m.module for s in plan.stacks for m in s.members] == ["experts.columns"]
    plan = make_plan(model, lambda name, _: "own" if "rows" in name else None, 3)
    assert [s.name for s in plan.stacks] == ["own"]


class Granite(nn.Module):
    """As some are in transformers: the parameter is called weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, OUT, IN))
        self.bias = nn.Parameter(torch.randn(EXPERTS, OUT))

    def forward(self, x, ids):
        return torch.stack(
            [F.linear(x[i], self.weight[e], self.bias[e]) for i, e in enumerate(ids)]
        )


def test_a_parameter_may_be_called_weight():
    model = nn.ModuleDict({"experts": Granite()})
    x, ids = tokens()
    y = model["experts"](x, ids)
    adapter = tcur.adapt(model, "experts.weight", rank=3, mode="factored")
    assert torch.equal(model["experts"](x, ids), y)
    randomise(adapter, 0.1)
    merged = adapter.merge(inplace=False)
    assert same_mathematics(model["experts"](x, ids), merged["experts"](x, ids))
    assert model["experts"].base_weight.shape == (EXPERTS, OUT, IN)


class Others(Experts):
    def __init__(self):
        super().__init__()
        self.flat = nn.Parameter(torch.randn(4, 4))
        self.register_parameter("none", None)
        self.deep = nn.Parameter(torch.randn(2, 2, 4, 4))
        self.convolution = nn.Conv1d(4, 4, 3)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("experts.flat", r"or a parameter \[experts, n1, n2\], got experts.flat \[4, 4\]"),
        ("*.deep", r"to match a linear layer or .*, got experts.deep \[2, 2, 4, 4\]"),
        ("convolution.weight", r"got experts.convolution.weight \[4, 4, 3\]"),
        ("experts", r"'experts' to match nn.Linear, got Others \(.* if the targets name them\)"),
    ],
)
def test_other_parameters_are_refused_by_name(targets, message):
    model = nn.ModuleDict({"experts": Others()})
    with pytest.raises(TypeError, match=rf"targets: expected .*{message}"):
        tcur.adapt(model, targets, rank=2)
    assert type(model["experts"]) is Others


def test_a_bare_wildcard_means_modules_alone():
    model = nn.ModuleDict({"experts": Others()})
    (stack,) = tcur.adapt(model, "experts.*", rank=1, stacks="layer").plan.stacks
    assert [member.module for member in stack.members] == ["experts.convolution"]


def test_what_cannot_be_adapted_is_refused_with_the_reason():
    model = nn.ModuleDict({"a": Model(), "b": Model()})
    model["b"].experts.rows = model["a"].experts.rows
    model["a"].experts.columns.data = model["a"].experts.columns.data.half()
    with pytest.raises(ValueError, match=r"a.experts.rows: its weight is tied: a.experts.rows, b"):
        make_plan(model, "a.experts.rows", 3)
    with pytest.raises(ValueError, match=r"one dtype and device, got torch.float16"):
        make_plan(model, {"one": "columns"}, 3)
    model = Model()
    with pytest.raises(ValueError, match=r"experts.rows: trained directly"):
        tcur.adapt(model, "experts.rows", rank=3, train_also="experts.rows")
    model.small = nn.Linear(IN, 9)
    with pytest.raises(ValueError, match=r"made of 9 x 8 slices, got experts.rows of 12 x 8"):
        make_plan(model, {"one": ["experts.rows", "small"]}, 3)


def test_several_slices_for_each_expert():
    model = Model()
    model.narrow = nn.Linear(IN, OUT // 2)
    adapter = tcur.adapt(model, {"one": ["narrow", "experts.rows"]}, rank=3)
    assert adapter.stacks["one"].n3 == 1 + 2 * EXPERTS
    randomise(adapter, 0.1)
    x, ids = tokens()
    for way in ("linear", "times its transpose", "grouped"):
        model.experts.way = way
        adapter.stacks["one"].core.grad = None
        found = with_gradients(model, adapter, x, ids)
        same, exact = exactly(adapter, x, ids, way, torch.float32), exactly(adapter, x, ids, way)()
        assert_composition_close(found, same, exact)


# -- the module in its model


def note(module, inputs, output):
    module.noted = True


def test_the_module_stays_itself():
    model = Model()
    module, keys = model.experts, set(model.state_dict())
    module.register_forward_hook(note)
    adapter = tcur.adapt(model, TARGETS, rank=3)
    randomise(adapter, 0.1)
    x, ids = tokens()
    y = model(x, ids)
    assert model.experts is module
    assert isinstance(module, Adapted)
    assert isinstance(module, Experts)
    assert module.noted
    assert {key for key in model.state_dict() if "tcur" not in key} == keys
    assert isinstance(model.state_dict()["experts.rows"], torch.Tensor)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x, ids), y)
        assert type(twin.experts) is type(module)
    cores = {n: p for n, p in model.named_parameters() if "tcur" in n}
    zeros = {name: torch.zeros_like(core) for name, core in cores.items()}
    with adapter.disable():
        start = model(x, ids)
    assert torch.equal(functional_call(model, zeros, (x, ids)), start)
    assert same_mathematics(functional_call(model, cores, (x, ids)), y)
    changed = {k: v + 1 for k, v in model.state_dict().items() if k == "experts.rows"}
    model.load_state_dict(changed, strict=False)
    assert same_mathematics(model(x, ids), adapter.merge(inplace=False)(x, ids))
    assert not same_mathematics(model(x, ids), y)
    module.columns = nn.Parameter(module.base_columns.detach().clone())
    assert torch.equal(module.columns.detach(), model.experts.columns.detach())


@pytest.mark.parametrize("way", ["linear", "grouped"])
def test_merged_in_place_and_back(way):
    model, adapter = adapted(way)
    x, ids = tokens()
    read = model.experts.rows
    y, base = model(x, ids), model.experts.base_rows.detach().clone()
    adapter.merge()
    assert same_mathematics(model(x, ids), y)
    assert type(model.experts.rows) is nn.Parameter
    assert torch.equal(model.experts.base_rows, base)
    assert torch.equal(model.experts.rows, adapter.merge(inplace=False).experts.rows)
    assert same_mathematics(F.linear(x, read[0]), F.linear(x, model.experts.rows[0]))
    assert same_mathematics(x @ read[0].mT, F.linear(x, model.experts.rows[0]))
    adapter.unmerge()
    assert torch.equal(model(x, ids), y)
    assert torch.equal(model.experts.base_rows, base)


def test_a_batch_of_many_adapters_is_refused():
    model, adapter = adapted()
    adapter.add("other")
    x, ids = tokens()
    cores = adapter.stack_cores(["default", "other"])
    with adapter.batch(cores, torch.zeros(8, dtype=torch.int64)):
        assert model.experts.rows.shape == (EXPERTS, OUT, IN)
        with pytest.raises(RuntimeError, match=r"expected one adapter for all rows .* experts"):
            model(x, ids)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("way", ["linear", "times", "grouped"])
def test_checkpoints(way, use_reentrant):
    model, adapter = adapted(way)
    x, ids = tokens()
    x.requires_grad_()
    wanted = with_gradients(model, adapter, x, ids)[2:]
    for stack in adapter.stacks.values():
        stack.core.grad = None
    checkpoint(model, x, ids, use_reentrant=use_reentrant).square().sum().backward()
    found = [stack.core.grad for stack in adapter.stacks.values()]
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or same_mathematics(one, other)


@pytest.mark.parametrize("way", ["times", "grouped"])
def test_checkpoints_refuse_another_core(way):
    model, adapter = adapted(way)
    adapter.add("other")
    x, ids = tokens()
    y = checkpoint(model, x.requires_grad_(), ids, use_reentrant=False)
    adapter.activate("other")
    with pytest.raises(RuntimeError, match=r"core: expected the adapter of the forward"):
        y.sum().backward()


@pytest.mark.parametrize("way", ["times", "grouped"])
def test_a_graph_that_had_its_backward_hinders_no_other_core(way):
    model, adapter = adapted(way)
    adapter.add("other")
    x, ids = tokens()
    y = model(x, ids)
    y.sum().backward(retain_graph=True)
    adapter.activate("other")
    checkpoint(model, x.requires_grad_(), ids, use_reentrant=False).sum().backward()
    assert y.requires_grad  # its graph is still there


def test_experts_without_tokens_are_no_surprise():
    model, adapter = adapted(targets=["experts.rows", "first"])
    x, ids = tokens()
    model(x, torch.zeros_like(ids)).sum().backward()
    assert adapter.unused() == ()
    model, adapter = adapted(targets=["experts.columns", "first"])
    model(x, ids)
    assert adapter.unused() == ("experts.columns",)


# -- files


def test_files(tmp_path, monkeypatch):
    base = Model()
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    model, adapter = adapted(targets=[*TARGETS, "first"])
    x, ids = tokens()
    y = model(x, ids)
    adapter.save(tmp_path / "adapter")
    again = Model()
    tcur.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(x, ids), y)
    other = Model()
    del other.experts.rows
    with pytest.raises(ValueError, match=r"expected a linear layer experts.rows as in the adapter"):
        tcur.load_adapter(other, tmp_path / "adapter")

    (tmp_path / "base").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "base" / "model.safetensors")
    update, counts = directory.slice_update, []

    def one_at_a_time(factors, core, slice_index, slices, scale):
        counts.append(slices)  # whose rows, squared, it needs as memory
        return update(factors, core, slice_index, slices, scale)

    monkeypatch.setattr(directory, "slice_update", one_at_a_time)
    arguments = ["merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out"]
    assert cli.main([str(each) for each in arguments]) == 0
    assert counts == [1] * (2 * EXPERTS + 1)
    merged = Model()
    merged.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert same_mathematics(merged(x, ids), y)
    reference = adapter.merge(inplace=False).state_dict()
    for name, value in merged.state_dict().items():
        assert same_mathematics(value, reference[name])

    with torch.device("meta"):
        empty = Model()
    streamed = tcur.adapt(empty, [*TARGETS, "first"], rank=3, weights=tmp_path / "base")
    for name, stack in adapter.stacks.items():
        assert torch.equal(streamed.stacks[name].lateral, stack.lateral)
        assert torch.equal(streamed.stacks[name].horizontal, stack.horizontal)


def test_files_made_before_there_were_experts_still_fit(monkeypatch):
    model = Model()
    plan = make_plan(model, "first", 3)
    now = fingerprint.frozen_digest(model, plan, [])
    found = fingerprint.find_weights
    monkeypatch.setattr(
        fingerprint, "find_weights", lambda m: {n: w for n, w in found(m).items() if n == "first"}
    )
    assert fingerprint.frozen_digest(model, plan, []) == now
    both = make_plan(model, ["first", "experts.rows"], 3)
    monkeypatch.undo()
    assert fingerprint.frozen_digest(model, both, []) != now


def test_a_budget_shares_out_among_experts():
    x, ids = tokens()
    gradients = tcur.collect_gradients(
        Model(), [x, -x], lambda model, x: model(x, ids).square().sum(), TARGETS
    )
    assert {name: list(grad.shape) for name, grad in gradients.items()} == {
        "experts.rows": [EXPERTS * OUT, IN],
        "experts.columns": [EXPERTS * IN, OUT],
    }
    assert not gradients["experts.rows"].view(EXPERTS, OUT, IN)[1].any()  # no token came
    model = Model()
    adapter = tcur.adapt(model, "experts.rows", rank=tcur.Budget(EXPERTS * 16), gradients=gradients)
    assert adapter.stacks["12x8"].rank == 4
    assert torch.equal(model(x, ids), Model()(x, ids))


@pytest.mark.parametrize("kind", [lambda each: nn.Sequential(*each), nn.ModuleList])
def test_cores_are_no_experts(kind):
    """Their three axes are no matrices of a model, whoever holds them."""
    model = nn.Module()
    model.blocks = kind([nn.Linear(8, 8), nn.Linear(8, 8)])
    before = list(find_weights(model))
    tcur.adapt(model.blocks, rank=2)
    assert list(find_weights(model)) == before == ["blocks.0", "blocks.1"]
    other = nn.ModuleDict({"model": Model()})
    before = list(find_weights(other))
    tcur.adapt(other["model"], TARGETS, rank=2)
    assert list(find_weights(other)) == before


class Relative(nn.Module):
    """An attention with a bias for each head and pair of positions, and position embeddings."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.bias_table = nn.Parameter(torch.randn(2, 8, 8))
        self.positions = nn.Parameter(torch.randn(1, 4, 8))


@pytest.mark.parametrize(
    "targets",
    [
        "block*",
        "block.attn*",
        "*.attn.*",
        "*.[kq]*",
        lambda name, module: "attn" in name,
        lambda name, module: True,
        lambda name, module: module.in_features == 8,
        lambda name, module: "own" if name.startswith("block") else None,
    ],
)
def test_parameters_with_three_axes_are_not_adapted_by_accident(targets):
    model = nn.ModuleDict({"block": nn.ModuleDict({"attn": Relative()})})
    plan = tcur.adapt(model, targets, rank=2).plan
    members = [member.module for stack in plan.stacks for member in stack.members]
    assert members == ["block.attn.q", "block.attn.k"]
    if callable(targets):
        (left,) = plan.left_out
        assert left.module == "block.attn.bias_table"
        assert "Relative is not a linear layer (targets " in left.reason


@pytest.mark.parametrize(
    "targets",
    [
        "bias_table",
        "block.*.bias_table",
        lambda name, module: name.endswith("bias_table"),
        lambda name, module: isinstance(module, Relative),
    ],
)
def test_parameters_with_three_axes_that_are_meant(targets):
    model = nn.ModuleDict({"block": nn.ModuleDict({"attn": Relative()})})
    plan = tcur.adapt(model, targets, rank=2).plan
    members = [member.module for stack in plan.stacks for member in stack.members]
    assert members == ["block.attn.bias_table"]
