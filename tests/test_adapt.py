"""Adapting whole models: what changes, what does not, what trains."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tcur_kernels as tcur
from models import Tiny
from plain import by_plain_torch
from tcur_kernels.decompose import RULES
from tolerance import assert_composition_close

MODES = pytest.mark.parametrize("mode", ["auto", "materialized", "factored"])


@pytest.fixture
def x():
    return torch.randn(4, 7, 6)


def adapted(seed=0, base_dtype=torch.float32, **kwargs):
    """A tiny model in evaluation mode, its untouched twin, and the adapter.

    Its weights are numbers of ``base_dtype``, which a cast to it does not change.
    """
    torch.manual_seed(seed)
    model = Tiny().eval().to(base_dtype).float()
    base = copy.deepcopy(model)
    return model, base, tcur.adapt(model, **{"rank": 2, **kwargs})


def randomise(adapter):
    with torch.no_grad():
        for stack in adapter.stacks.values():
            stack.core.normal_(std=0.3)  # from 1 on, softmax amplifies roundings without end


def train(model, adapter, x, steps=5, lr=1e-2):
    optimizer = torch.optim.Adam(adapter.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@MODES
def test_a_fresh_adapter_changes_no_bit(mode, x):
    model, base, _ = adapted(mode=mode)
    assert torch.equal(model(x), base(x))


@MODES
def test_every_core_trains_and_the_base_is_never_written(mode, x):
    model, base, adapter = adapted(mode=mode)
    losses = train(model, adapter, x)
    assert losses[-1] < losses[0]
    for stack in adapter.stacks.values():
        assert stack.core.grad.abs().max() > 0
        assert stack.core.abs().max() > 0
    weights = dict(model.named_parameters())
    for name, weight in base.named_parameters():
        assert torch.equal(weights[name], weight), name
        assert weights[name].grad is None


def test_optimizers_of_the_model_have_the_cores():
    """The published script trains nothing because its cores are not in model.parameters()."""
    model, _, adapter = adapted()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"tcur.{name}" for name in adapter.stacks}
    assert {id(p) for p in adapter.parameters()} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    assert names <= set(model.state_dict())


def test_counts_and_train_also():
    model, _, adapter = adapted(train_also=("head", "blocks.0.norm"))
    cores = sum(stack.core.numel() for stack in adapter.stacks.values())
    assert cores == (12 + 3 + 3) * 4
    assert adapter.count_parameters() == cores + 8 * 5 + 5 + 16
    trained = [name for name, _ in adapter.named_parameters()]
    assert trained[:3] == ["tcur.8x8", "tcur.32x8", "tcur.8x32"]
    assert trained[3:] == [
        "blocks.0.norm.weight",
        "blocks.0.norm.bias",
        "head.weight",
        "head.bias",
    ]
    assert model.head.weight.requires_grad
    assert not model.embed.weight.requires_grad
    assert "head: trained directly (train_also)" in str(adapter.plan)
    assert repr(adapter).startswith("Adapter(133 parameters, Plan(")


def test_train_also_matches_whole_names():
    model = nn.ModuleDict(
        {"out": nn.Linear(2, 2), "dropout": nn.Linear(4, 4), "a": nn.Linear(4, 4)}
    )
    adapter = tcur.adapt(model, rank=2, train_also="out")
    assert [name for name, _ in adapter.named_parameters()][1:] == ["out.weight", "out.bias"]


def test_a_sequential_model_still_runs():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    x = torch.randn(3, 6)
    y = model(x)
    tcur.adapt(model, rank=2)
    assert torch.equal(model(x), y)


@MODES
def test_merge_unmerge_disable(mode, x):
    model, base, adapter = adapted(mode=mode)
    with torch.no_grad():
        randomise(adapter)
        y, expected = model(x), by_plain_torch(adapter, x)
        assert_composition_close(y, *expected)
        assert not torch.equal(y, base(x))
        with adapter.disable():
            assert torch.equal(model(x), base(x))
        assert torch.equal(model(x), y)

        assert adapter.merge() is model
        assert adapter.is_merged
        assert_composition_close(model(x), *expected)
        # torch computes otherwise with frozen weights; in place they are as before the adaptation.
        assert torch.equal(adapter.merge(inplace=False).requires_grad_()(x), model(x))
        with pytest.raises(ValueError, match="merge: expected an unmerged adapter"):
            adapter.merge()
        with pytest.raises(ValueError, match="disable: expected an unmerged adapter"):
            adapter.disable().__enter__()
        adapter.unmerge()
        assert torch.equal(model(x), y)
        for name, weight in base.named_parameters():
            assert torch.equal(dict(model.named_parameters())[name], weight)
        with pytest.raises(ValueError, match="unmerge: expected a merged adapter"):
            adapter.unmerge()


def test_fifty_merges_do_not_drift(x):
    model, base, adapter = adapted()
    model.to(torch.bfloat16), base.to(torch.bfloat16)
    randomise(adapter)
    for _ in range(50):
        adapter.merge()
        adapter.unmerge()
    for name, weight in base.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], weight)


def test_disable_restores_after_an_error(x):
    model, base, adapter = adapted()
    randomise(adapter)
    y = model(x)
    inside = []

    def fail():
        with adapter.disable():
            inside.append(model(x))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(inside[0], base(x))
    assert torch.equal(model(x), y)


def test_a_merged_copy_stands_alone(x):
    model, _, adapter = adapted()
    randomise(adapter)
    y = model(x)
    merged = adapter.merge(inplace=False)
    assert set(merged.state_dict()) == set(Tiny().state_dict())
    assert not any(isinstance(m, tcur.TProductLinear) for m in merged.modules())
    expected = by_plain_torch(adapter, x)
    assert_composition_close(y, *expected)
    assert_composition_close(merged(x), *expected)
    assert torch.equal(model(x), y)
    assert not adapter.is_merged
    plain = Tiny().eval().requires_grad_(False)  # as the copy, or torch computes otherwise
    plain.load_state_dict(merged.state_dict())
    assert torch.equal(plain(x), merged(x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_adapted_models_can_be_copied(clone, x):
    model, _, adapter = adapted()
    randomise(adapter)
    y = model(x)
    twin = clone(adapter)
    assert torch.equal(twin.model(x), y)
    randomise(twin)
    assert not torch.equal(twin.model(x), y)
    assert torch.equal(model(x), y)


def test_state_dict_round_trip(x):
    model, _, adapter = adapted()
    randomise(adapter)
    other, _, _ = adapted()
    other(x)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_a_model_moved_to_half_precision_stays_adapted(x):
    model, _, adapter = adapted(base_dtype=torch.bfloat16)
    randomise(adapter)
    model(x)  # now there is a W_eff in fp32
    model.to(torch.bfloat16)
    low = model(x.bfloat16())
    assert low.dtype == torch.bfloat16
    expected = by_plain_torch(adapter, x.bfloat16())
    assert_composition_close(low, *expected)
    assert_composition_close(adapter.merge(inplace=False)(x.bfloat16()), *expected)


@MODES
def test_checkpointed_blocks_give_the_same_gradients(mode, x):
    from torch.utils.checkpoint import checkpoint

    model, _, adapter = adapted(mode=mode)
    randomise(adapter)

    def gradients(run):
        for parameter in adapter.parameters():
            parameter.grad = None
        run().square().sum().backward()
        return [parameter.grad.clone() for parameter in adapter.parameters()]

    def with_checkpoints():
        h = model.embed(x)
        for block in model.blocks:
            h = checkpoint(block, h, use_reentrant=False)
        return model.head(h.mean(1))

    for a, b in zip(gradients(lambda: model(x)), gradients(with_checkpoints), strict=True):
        assert torch.equal(a, b)


@MODES
def test_adapted_models_compile_whole(mode, x):
    model, _, adapter = adapted(mode=mode)
    randomise(adapter)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 3):
            inputs = x[:batch].clone()
            expected = by_plain_torch(adapter, inputs)
            assert_composition_close(compiled(inputs), *expected)
            assert_composition_close(model(inputs), *expected)
            compiled(inputs).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())


@pytest.mark.parametrize("selection", [*RULES, ([0, 1], [0, 1])], ids=str)
def test_numbers_outside_of_c_and_r_must_be_finite_too(selection):
    model = Tiny()
    weight = model.blocks[2].mlp[2].weight.data
    for fault in (torch.nan, torch.inf):
        weight[-1, -1] = fault
        with pytest.raises(ValueError, match=r"stack 8x32: linears: expected finite numbers"):
            tcur.adapt(model, rank=2, selection=selection)


def test_errors_leave_the_model_as_it_was(x):
    model = Tiny().eval()
    model.blocks[2].mlp[2].weight.data[0, 0] = torch.nan
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"stack 8x32: linears: expected finite numbers"):
        tcur.adapt(model, rank=2)
    assert not hasattr(model, "tcur")
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    assert all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), state[name].nan_to_num())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": [nn.Linear(2, 2)]}, TypeError, "model: expected an nn.Module, got list"),
        ({"rank": 0}, ValueError, "targets: expected at least one nn.Linear"),
        ({"rank": 0, "targets": "mlp.0"}, ValueError, "rank: expected 1 to"),
        ({"rank": 9, "targets": "mlp.0"}, ValueError, "rank: expected 1 to"),
        ({"rank": "8"}, TypeError, "rank, mode: expected an int and a str, got '8'"),
        ({"mode": "fast"}, ValueError, "mode: expected one of"),
        ({"alpha": float("nan")}, ValueError, "alpha: expected a finite number"),
        ({"alpha": "1"}, TypeError, "alpha: expected a number, got str"),
        ({"selection": "best"}, ValueError, "selection: expected one of"),
        ({"selection": ([0, 8], [0, 1])}, ValueError, "rows: expected 0 to n1 - 1"),
        ({"targets": "nothing"}, ValueError, "targets: expected a module that matches"),
        ({"targets": "norm"}, TypeError, "targets: expected 'norm' to match nn.Linear"),
        ({"train_also": "nothing"}, ValueError, "train_also: expected parameters that match"),
        ({"train_also": [3]}, TypeError, "train_also: expected names, got int"),
    ],
)
def test_adapt_refuses(change, error, message):
    arguments = {"model": Tiny(), "rank": 2, **change}
    with pytest.raises(error, match=message):
        tcur.adapt(**arguments)


def test_adapting_twice_is_refused():
    model, _, _ = adapted()
    with pytest.raises(ValueError, match="model: expected a base model, got one that is adapted"):
        tcur.adapt(model)
