"""Adapters of other ranks, alphas and slices in one batch: each as if it were alone."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tcur_kernels as tcur
from models import Tiny
from plain import Plain
from tcur_kernels.adapters.install import stacks_of
from test_batch import some_cores
from tolerance import assert_composition_close, same_mathematics

BASES = ("orthonormal", "slices")


def base_model():
    torch.manual_seed(0)
    return Tiny(blocks=2).eval()


def other(tmp_path, name="small", seed=1, **how):
    """An adapter of the same base, alone on a copy of it, and its file."""
    adapter = tcur.adapt(base_model(), **how)
    torch.manual_seed(seed)
    with torch.no_grad():
        for own, stack in adapter.stacks.items():
            stack.core.copy_(some_cores(adapter, 1)[0][own])
    path = tmp_path / name
    adapter.save(path)
    return adapter, path


def alone(adapters, x):
    """``plain`` and ``exact``: each row by the model of its own adapter, or of the base (None)."""

    plain = {a: Plain(a) if a else base_model() for a in adapters}
    exact = {a: Plain(a, torch.float64) if a else base_model().double() for a in adapters}

    def by(models, x):
        return torch.cat([models[a](row[None]) for a, row in zip(adapters, x, strict=True)])

    return lambda: by(plain, x), by(exact, x.double())


@pytest.mark.parametrize("basis", BASES)
def test_a_smaller_rank_is_written_in_the_slices_of_a_larger_one(basis, tmp_path):
    how = {"basis": basis, "selection": "norm2"}  # a rule whose slices of rank 2 are among rank 3's
    adapter = tcur.adapt(base_model(), rank=3, **how)
    small, path = other(tmp_path, rank=2, **how)
    scaled, twice = other(tmp_path, "alpha", 2, rank=3, alpha=2.5, **how)
    with torch.no_grad():
        for name, stack in adapter.stacks.items():
            stack.core.copy_(some_cores(adapter, 1)[0][name])
    cores = adapter.stack_cores(["default", path, twice])
    assert cores["8x8"].shape == (3, 8, 3, 3)
    x, ids = torch.randn(4, 7, 6), torch.tensor([1, 0, 2, -1])
    with adapter.batch(cores, ids):
        y = adapter.model(x)
    assert_composition_close(y, *alone([small, adapter, scaled, None], x))


def test_slices_in_another_order_are_the_same_slices(tmp_path):
    adapter = tcur.adapt(base_model(), "blocks.*.attn.*", rank=3)
    stack = adapter.stacks["8x8"]
    turned = (stack.rows[::-1], stack.columns[::-1])
    again, path = other(tmp_path, targets="blocks.*.attn.*", rank=3, selection=turned)
    x = torch.randn(2, 7, 6)
    with adapter.batch(adapter.stack_cores([path]), torch.zeros(2, dtype=torch.int64)):
        y = adapter.model(x)
    assert_composition_close(y, *alone([again, again], x))


class Line(nn.Module):
    """One stack of one slice, whose columns the test chooses."""

    def __init__(self, weight):
        super().__init__()
        self.layer = nn.Linear(*weight.shape[::-1], bias=False, dtype=torch.float64)
        self.layer.weight.data.copy_(weight)


def test_slices_that_do_not_span_what_some_of_them_span_are_refused(tmp_path):
    """Two nearly dependent columns and a third that hides how they differ."""
    weight = torch.zeros(4, 4, dtype=torch.float64)
    weight[0] = 1
    weight[1, 0], weight[1:, 2] = 2.0**-18, torch.tensor([2.0**-19, 2.0**-20.5, 0])
    weight[3, 3] = 1
    how = {"stacks": "layer"}
    small = tcur.adapt(Line(weight), rank=2, selection=([0, 3], [1, 2]), **how)
    with torch.no_grad():
        small.stacks["layer"].core[0, 1] = 1  # the direction in which the columns differ
    small.save(tmp_path / "small")
    large = tcur.adapt(Line(weight), rank=3, selection=([0, 3, 1], [0, 1, 2]), **how)
    with pytest.raises(ValueError, match=r"slices: expected slices that span all .* would change"):
        large.stack_cores([tmp_path / "small"])


def three(tmp_path, **how):
    """A model's own adapter, one of other slices and rank, and one in the other basis."""
    adapter = tcur.adapt(base_model(), rank=3, **how)
    with torch.no_grad():
        for name, stack in adapter.stacks.items():
            stack.core.copy_(some_cores(adapter, 1)[0][name])
    leverage, first = other(tmp_path, "first", rank=4, selection="leverage", alpha=0.5)
    slices, second = other(tmp_path, "second", 2, rank=2, basis="slices")
    return adapter, [adapter, leverage, slices], ["default", first, second, first]


def test_groups_of_other_slices(tmp_path):
    adapter, models, entries = three(tmp_path)
    cores = adapter.stack_groups(entries)
    assert (cores.adapters, len(cores.groups)) == (4, 3)
    assert repr(cores) == "GroupedCores(4 adapters in 3 groups)"
    assert cores.nbytes == sum(group.nbytes for group in cores.groups)
    own, leverage, slices = models
    x = torch.randn(6, 7, 6)
    for ids, alike in (
        ([2, 1, -1, 0, 3, 1], [slices, leverage, None, own, leverage, leverage]),
        ([1], [leverage]),
        ([-1], [None]),
    ):
        x = x[: len(ids)]
        with adapter.batch(cores, torch.tensor(ids)):
            y = adapter.model(x)
        assert_composition_close(y, *alone(alike, x))
    x = torch.randn(6, 7, 6)
    with adapter.batch(cores, torch.tensor([], dtype=torch.int64)):
        assert adapter.model(x[:0]).shape == (0, 5)
    with adapter.disable():
        base = adapter.model(x)
    with adapter.batch(cores, torch.tensor([-1, 1, -1, 2, 0, 0])):
        assert torch.equal(adapter.model(x)[[0, 2]], base[[0, 2]])


def test_groups_in_half_precision_and_under_autocast(tmp_path):
    adapter, models, entries = three(tmp_path)
    cores, x, ids = adapter.stack_groups(entries[:3]), torch.randn(3, 7, 6), torch.arange(3)
    plain, exact = alone(models, x)
    autocast = torch.autocast("cpu", torch.bfloat16)
    with adapter.batch(cores, ids), autocast:
        y = adapter.model(x)
    assert_composition_close(y, autocast(plain), exact)


def test_gradients_reach_the_cores_of_all_groups(tmp_path):
    adapter, models, entries = three(tmp_path)
    cores, x, ids = adapter.stack_groups(entries[:3]), torch.randn(3, 7, 6), torch.arange(3)
    for group in cores.groups:
        for core in group.values():
            core.requires_grad_()
    with adapter.batch(cores, ids):
        adapter.model(x).square().sum().backward()

    def gradients(dtype):
        loss = lambda y: y.square().sum()  # noqa: E731
        plain = [Plain(model, dtype) for model in models]
        return lambda: tuple(
            own
            for model, row in zip(plain, x.to(dtype), strict=True)
            for own in model.with_gradients(loss, row[None])[1:]
        )

    own = tuple(core.grad[0] for group in cores.groups for core in group.values())
    assert_composition_close(own, gradients(torch.float32), gradients(torch.float64)())


class Guided(nn.Module):
    """Runs the batch twice over, as a guidance does, or each row twice."""

    def __init__(self, repeat):
        super().__init__()
        self.repeat = repeat
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        twice = torch.cat([x, x]) if self.repeat == "all" else x.repeat_interleave(2, 0)
        y = self.second(self.first(twice).relu())
        return sum(y.chunk(2)) if self.repeat == "all" else y.unflatten(0, (-1, 2)).sum(1)


def guided(tmp_path, repeat):
    """Two adapters of other slices, the first of which serves both; and their cores."""

    def made(**how):
        torch.manual_seed(0)
        adapter = tcur.adapt(Guided(repeat), **how)
        with torch.no_grad():
            adapter.stacks["6x6"].core.normal_()
        return adapter

    large, small = made(rank=3), made(rank=2, selection="leverage")
    small.save(tmp_path / "a")
    more = {"6x6": torch.randn(2, 3, 3)}
    return large, small, large.stack_groups(["default", tmp_path / "a", more])


@pytest.mark.parametrize("repeat", ["all", "each"])
def test_rows_of_groups_may_repeat_and_tokens_may_have_ids(repeat, tmp_path):
    large, small, cores = guided(tmp_path, repeat)
    x, ids = torch.randn(5, 4, 6), torch.tensor([1, 0, 2, 1, 0])
    other = copy.deepcopy(large.model)
    with torch.no_grad():
        stacks_of(other)["6x6"].core.copy_(cores.groups[0]["6x6"][1])
    models = [(large.model, small.model, other)[i] for i in ids]
    wanted = torch.stack([m(row[None])[0] for m, row in zip(models, x, strict=True)])
    with large.batch(cores, ids, repeat=repeat):
        assert same_mathematics(large.model(x), wanted)
    with (
        large.batch(cores, ids),
        pytest.raises(ValueError, match="x: expected 5 rows"),
    ):
        large.model(x)
    tokens = torch.tensor([0, 1, 1, 0, -1])
    with large.batch(cores, tokens, per="token"):
        y = large.model.first(x.view(-1, 6)[:5])
    for row, model in ((0, large), (1, small), (2, small), (3, large)):
        assert same_mathematics(y[row : row + 1], model.model.first(x.view(-1, 6)[row : row + 1]))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_groups_refuse_a_checkpoint_that_loses_gradients(tmp_path):
    large, _, cores = guided(tmp_path, "each")
    x, ids = torch.randn(3, 4, 6), torch.tensor([1, 0, 1])
    cores.groups[0]["6x6"].requires_grad_()
    with large.batch(cores, ids, repeat="each"):
        with pytest.raises(RuntimeError, match="checkpoint: expected use_reentrant=False"):
            checkpoint(large.model, x, use_reentrant=True)
        checkpoint(large.model, x, use_reentrant=False).sum().backward()
    assert cores.groups[0]["6x6"].grad.any()


def test_groups_compile_whole(tmp_path):
    large, _, cores = guided(tmp_path, "each")
    x = torch.randn(3, 4, 6)
    torch._dynamo.reset()
    compiled = torch.compile(large.model, backend="aot_eager", fullgraph=True)
    with large.batch(cores, torch.tensor([1, 0, 1]), repeat="each"):
        assert same_mathematics(compiled(x), large.model(x))


def test_groups_follow_the_base(tmp_path):
    """C and R of every group are those of the weights that are there now."""
    adapter, models, entries = three(tmp_path)
    cores, x, ids = adapter.stack_groups(entries), torch.randn(3, 7, 6), torch.arange(3)
    with adapter.batch(cores, ids):
        before = adapter.model(x)
    adapter.model.train().eval()  # weights may have been swapped
    with adapter.batch(cores, ids):
        assert torch.equal(adapter.model(x), before)
        for model in {adapter, *models}:
            with torch.no_grad():
                for stack in model.stacks.values():
                    for place in stack.places:
                        place.stored.mul_(1 + torch.arange(len(place.stored))[:, None] / 10)
        y = adapter.model(x)
    wanted = torch.cat([m.model(row[None]) for m, row in zip(models, x, strict=True)])
    assert same_mathematics(y, wanted)
    assert not same_mathematics(before, wanted)


def test_groups_follow_a_base_that_was_written_past_version_counters(tmp_path):
    large, small, cores = guided(tmp_path, "each")
    x, ids = torch.randn(1, 4, 6), torch.tensor([1])
    with large.batch(cores, ids, repeat="each"):
        before = large.model(x)
    for adapter in (large, small):
        for place in adapter.stacks["6x6"].places:
            place.stored.data.mul_(1 + torch.arange(6)[:, None] / 10)
        adapter.invalidate()
    with large.batch(cores, ids, repeat="each"):
        y = large.model(x)
    assert same_mathematics(y, small.model(x))
    assert not same_mathematics(y, before)


def test_bad_files_and_groups(tmp_path):
    adapter, _, entries = three(tmp_path)
    with pytest.raises(ValueError, match=r"path: expected rows among .* go together with stack_g"):
        adapter.stack_cores(entries)
    with pytest.raises(ValueError, match="adapters: expected at least one, got none"):
        adapter.stack_groups([])
    with pytest.raises(ValueError, match=r"adapters\[1\]: expected finite numbers in stack 8x8"):
        adapter.stack_groups(["default", {"8x8": torch.full((8, 3, 3), torch.nan)}])
    _, fewer = other(tmp_path, "fewer", targets="blocks.*.attn.*", rank=2)
    for make in (adapter.stack_cores, adapter.stack_groups):
        with pytest.raises(ValueError, match=r"path: expected an adapter with the stacks of this"):
            make([fewer])
    cores = adapter.stack_groups(entries)
    with (
        pytest.raises(ValueError, match="cores: expected groups that this model made, got another"),
        copy.deepcopy(tcur.adapt(base_model(), rank=3)).batch(cores, torch.tensor([0])),
    ):
        pass
    with pytest.raises(ValueError, match=r"adapter_ids: expected -1 \(no adapter\) to 3 for 4"):
        cores.rows(adapter.stacks, torch.tensor([4])).__enter__()
    with (
        adapter.batch(cores, torch.arange(2)),
        pytest.raises(ValueError, match="x: expected rows of equal length in a batch"),
    ):
        adapter.model.blocks[0].mlp[0](nested())


def nested():
    return torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)


def test_files_of_another_base_or_with_more_than_cores_are_refused(tmp_path):
    how = {"rank": 3, "selection": "norm2"}
    adapter = tcur.adapt(base_model(), **how)
    changed = base_model()
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.5)  # which chooses the same slices
    for rank in (2, 3):
        tcur.adapt(copy.deepcopy(changed), rank=rank, selection="norm2").save(tmp_path / str(rank))
        for make in (adapter.stack_cores, adapter.stack_groups):
            with pytest.raises(ValueError, match="path: expected an adapter of this base, got one"):
                make([tmp_path / str(rank)])
    tcur.adapt(changed, rank=2, selection="leverage").save(tmp_path / "leverage")
    with pytest.raises(ValueError, match="path: expected an adapter of this base, got one"):
        adapter.stack_groups([tmp_path / "leverage"])
    moved = tcur.adapt(base_model(), **how)
    moved.model.train()(torch.randn(2, 7, 6))  # statistics of batch norms
    moved.save(tmp_path / "moved")
    with pytest.raises(
        ValueError, match=r"path: expected nothing beside the cores, .* blocks.0.norm.run"
    ):
        adapter.stack_cores([tmp_path / "moved"])
    zero = tcur.adapt(base_model(), **how, alpha=0.0)
    with pytest.raises(ValueError, match="alpha: expected a scale other than 0 in stack 8x8"):
        zero.stack_cores([other(tmp_path, **how)[1]])
    tiny = tcur.adapt(base_model(), **how, alpha=1e-45)
    with pytest.raises(ValueError, match=r"path: expected a core that torch\.float32 can"):
        tiny.stack_cores([other(tmp_path, **how)[1]])
    own = tcur.adapt(base_model(), rank=3)
    leverage = other(tmp_path, rank=2, selection="leverage")[1]
    own.merge()
    with pytest.raises(ValueError, match="stack_groups: expected an unmerged adapter, got one"):
        own.stack_groups([leverage])
