"""Convolutions in a batch of many adapters: every row as if its adapter were the only one."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tcur_kernels as tcur
from plain import Plain
from tolerance import assert_composition_close, assert_equal_in_float64, same_mathematics

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

    merged, exact = [], []
    for own in cores:
        for name, stack in adapter.stacks.items():
            stack.core.data.copy_(own[name])
        merged.append(adapter.merge(inplace=False))
        exact.append(Plain(adapter, torch.float64))
    for stack in adapter.stacks.values():
        stack.core.data.zero_()

    def run(models, x):
        return torch.cat([models[i](row[None]) for row, i in zip(x, ids, strict=True)])

    return lambda: run(merged, x), run(exact, x.double())


@pytest.mark.parametrize(
    ("ids", "compiled"),
    [([2, 0, 2, 1], False), ([1, 1, 1, 1], False), ([2], False), ([2, 0, 2, 1], True)],
    ids=str,
)
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
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 6, (2, 3))).double(), torch.randn(2, 3, 5, 4).double()
    adapter = tcur.adapt(model, "0", rank=2)
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
    message = r"adapter_ids: expected one id for each row .* of tokens, \[2, 3\]"
    with (
        adapter.batch(stacked, torch.zeros(2, 3, dtype=torch.int64), per="token"),
        pytest.raises(ValueError, match=message),
    ):
        model(x[:2])


def test_adapters_of_other_slices(rows, tmp_path):
    """Groups with C and R of their own, a row without an adapter, and rows that repeat."""
    model, adapter, cores, x = rows
    plain = adapter.merge(inplace=False)  # the cores are still zero
    other = tcur.adapt(copy.deepcopy(plain), "*", rank=3, selection="leverage")
    for stack in other.stacks.values():
        stack.core.data.normal_()
    other.save(tmp_path / "other")
    grouped = adapter.stack_groups([*cores, tmp_path / "other"])
    assert len(grouped.groups) == 2
    merged, exact = other.merge(inplace=False), Plain(other, torch.float64)
    for ids, repeat in (([3, 1, -1, 3], None), ([3, 0], "each"), ([1, 3], "all"), ([3], None)):
        times = len(x) // len(ids)
        whole = ids * times if repeat == "all" else [one for one in ids for _ in range(times)]
        with torch.no_grad(), adapter.batch(grouped, torch.tensor(ids), repeat=repeat):
            y = model(x)
        for row, one in enumerate(whole):
            own = x[row : row + 1]
            if one == 3:
                with torch.no_grad():
                    wanted = lambda own=own: merged(own), exact(own.double())
            elif one == -1:
                assert torch.equal(y[row : row + 1], plain(own))
                continue
            else:
                wanted = alone(adapter, cores, [one], own)
            assert_composition_close(y[row : row + 1], *wanted)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with (
        adapter.batch(grouped, torch.tensor([3, 1, 0, 0])),
        pytest.raises(RuntimeError, match="expected adapters of the same slices where a convolut"),
    ):
        compiled(x)


def test_gradients_of_groups_reach_no_other(rows, tmp_path):
    """A gradient of x is that of each row's own adapter."""
    model, adapter, cores, x = rows
    grouped, x = adapter.stack_groups(cores), x.requires_grad_()
    with adapter.batch(grouped, torch.tensor([0, 1, 2, 0])):
        loss(model(x)).backward()
    with adapter.batch(adapter.stack_cores(cores), torch.tensor([0, 1, 2, 0])):
        (wanted,) = torch.autograd.grad(loss(model(x)), x)
    assert torch.equal(x.grad, wanted)


def test_the_weight_of_a_batch_is_not_read(rows):
    model, adapter, cores, _ = rows
    with adapter.batch(adapter.stack_cores(cores), torch.tensor([0, 1, 2, 0])):
        with pytest.raises(RuntimeError, match="weight: expected a layer that is called"):
            model[0].weight + 1
        with adapter.disable():
            assert torch.equal(model[0].weight, model[0].base_weight)


def loss(y):
    return y.square().sum()
