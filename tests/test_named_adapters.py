"""Several adapters on one model: switched, swapped, combined, saved, each for itself."""

import copy
import math
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tcur_kernels as tcur
from models import Tiny
from plain import Plain, by_plain_torch
from tcur_kernels.adapters import fingerprint
from tolerance import assert_composition_close

ALSO = ("head", "blocks.?.norm")


@pytest.fixture
def x():
    return torch.randn(4, 7, 6)


def base_model():
    torch.manual_seed(0)
    return Tiny().eval()


def fill(adapter, seed):
    """Random cores and trained parts for the active adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def with_two(train_also=(), **kwargs):
    """Adapters "default" and "b" of one model, "default" active."""
    adapter = tcur.adapt(base_model(), rank=2, train_also=train_also, **kwargs)
    fill(adapter, 1)
    adapter.add("b")
    adapter.activate("b")
    fill(adapter, 2)
    adapter.activate("default")
    return adapter


def alone(seed, train_also=(), **kwargs):
    """The same adapter as the only one of its model."""
    adapter = tcur.adapt(base_model(), rank=2, train_also=train_also, **kwargs)
    fill(adapter, seed)
    return adapter


@pytest.mark.parametrize("train_also", [(), ALSO], ids=["cores", "more"])
@pytest.mark.parametrize("mode", ["materialized", "factored"])
def test_switching(x, train_also, mode):
    adapter = with_two(train_also, mode=mode)
    single = {"default": alone(1, train_also, mode=mode), "b": alone(2, train_also, mode=mode)}
    assert adapter.names == ("default", "b")
    for name in ("default", "b", "b", "default"):
        adapter.activate(name)
        assert adapter.active == name
        assert torch.equal(adapter.model(x), single[name].model(x))
    assert "of 'default', 1 more" in repr(adapter)


def test_a_new_adapter_starts_at_the_base_and_leaves_the_others_alone(x):
    adapter = alone(1)
    y = adapter.model(x)
    adapter.add("b")
    assert torch.equal(adapter.model(x), y)
    adapter.activate("b")
    assert torch.equal(adapter.model(x), base_model()(x))
    adapter.activate("default")
    assert torch.equal(adapter.model(x), y)


def test_only_the_active_adapter_trains(x):
    adapter = with_two(ALSO)
    adapter.activate("b")
    own = list(adapter.parameters())
    optimizers = {"b": torch.optim.Adam(own, lr=1e-2)}
    before = {n: p.detach().clone() for n, p in adapter.model.named_parameters()}
    trained = {name for name, _ in adapter.named_parameters()}
    adapter.model(x).square().sum().backward()
    optimizers["b"].step()
    for name, parameter in adapter.model.named_parameters():
        assert parameter.requires_grad == (name in trained)
        assert torch.equal(parameter, before[name]) == (name not in trained), name
    adapter.activate("default")
    adapter.activate("b")
    assert [id(p) for p in adapter.parameters()] == [id(p) for p in own]
    assert optimizers["b"].state[own[0]]


def test_switching_compiles_nothing_anew(x, tmp_path):
    adapter = with_two()
    adapter.save(tmp_path / "b", "b")
    torch._dynamo.reset()
    compiled = torch.compile(adapter.model, backend="aot_eager", fullgraph=True)
    seen = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("default", "b", "default"):
            adapter.activate(name)
            seen.append(compiled(x))
            seen[-1].sum().backward()
        adapter.load(tmp_path / "b")  # hot swap: the file's cores under the active name
        seen.append(compiled(x))
    for y, seed in zip(seen, (1, 2, 1, 2), strict=True):
        assert_composition_close(y, *by_plain_torch(alone(seed), x))


@pytest.mark.parametrize("train_also", [(), ALSO], ids=["cores", "more"])
def test_files_of_several_adapters(x, train_also, tmp_path):
    adapter = with_two(train_also)
    for name in adapter.names:
        adapter.save(tmp_path / name, name)
    for name, seed in (("default", 1), ("b", 2)):
        model = base_model()
        tcur.load_adapter(model, tmp_path / name)
        assert torch.equal(model(x), alone(seed, train_also).model(x))

    other = tcur.adapt(base_model(), rank=2, train_also=train_also)
    core = other.stacks["8x8"].core
    other.load(tmp_path / "b")
    other.load(tmp_path / "default", "first")
    assert other.names == ("default", "first")
    assert other.stacks["8x8"].core is core
    assert torch.equal(other.model(x), alone(2, train_also).model(x))
    other.load(tmp_path / "b", "first")
    other.load(tmp_path / "default", "first")
    other.activate("first")
    assert torch.equal(other.model(x), alone(1, train_also).model(x))


def test_a_swap_takes_back_what_training_moved(x, tmp_path):
    """Statistics that the file's adapter did not move are the base's again."""
    adapter = alone(1)
    adapter.save(tmp_path / "a")
    y = adapter.model(x)
    adapter.model.train()
    adapter.model(x)
    adapter.model.eval()
    assert not torch.equal(adapter.model(x), y)
    adapter.load(tmp_path / "a")
    assert torch.equal(adapter.model(x), y)


def test_state_dicts_hold_all_adapters(x):
    adapter, other = with_two(), tcur.adapt(base_model(), rank=2)
    other.add("b")
    other.model.load_state_dict(adapter.model.state_dict())
    for name in ("default", "b"):
        adapter.activate(name)
        other.activate(name)
        assert torch.equal(other.model(x), adapter.model(x))
    with pytest.raises(RuntimeError, match=r"__default"):  # which is active belongs to the keys
        tcur.adapt(base_model(), rank=2).model.load_state_dict(adapter.model.state_dict())


def test_copies_have_all_adapters(x):
    adapter = with_two()
    twin = copy.deepcopy(adapter)
    twin.activate("b")
    assert adapter.active == "default"
    assert torch.equal(adapter.model(x), alone(1).model(x))
    assert torch.equal(twin.model(x), alone(2).model(x))


def test_weighted_combinations_are_exact():
    adapter = with_two()
    adapter.combine({"default": 0.25, "b": -2.0}, "mix")
    for stack in adapter.stacks.values():
        # Powers of two: the sum alone is rounded.
        assert torch.equal(stack.core_of("mix"), 0.25 * stack.core + -2.0 * stack.core_of("b"))
    adapter.activate("mix")
    merged = dict(adapter.merge(inplace=False).named_parameters())
    base = dict(base_model().named_parameters())
    adapted = [m.module + ".weight" for stack in adapter.plan.stacks for m in stack.members]
    assert all(torch.equal(merged[name], base[name]) for name in base if name not in adapted)

    def run(models):
        """The base's weights plus the weighted sum of the updates of each adapter alone."""
        first, second = (model.parameters() for model in models)
        each = [(base[name].to(first[name].dtype), first[name], second[name]) for name in adapted]
        return [w + 0.25 * (a - w) - 2.0 * (b - w) for w, a, b in each]

    plain, double = (
        [Plain(alone(seed), dtype) for seed in (1, 2)] for dtype in (torch.float32, torch.float64)
    )
    assert_composition_close([merged[name] for name in adapted], lambda: run(plain), run(double))


def test_merging_means_the_active_one(x):
    adapter = with_two()
    adapter.activate("b")
    y = adapter.model(x)
    expected = by_plain_torch(adapter, x)
    assert_composition_close(y, *expected)
    copied = adapter.merge(inplace=False)
    assert not any("core" in name for name in copied.state_dict())
    assert_composition_close(copied(x), *expected)
    adapter.merge()
    assert_composition_close(adapter.model(x), *expected)
    with pytest.raises(ValueError, match="activate: expected an unmerged adapter, got one that is"):
        adapter.activate("default")
    adapter.activate("b")  # it is
    adapter.add("c")
    adapter.delete("default")
    adapter.unmerge()
    assert torch.equal(adapter.model(x), y)
    assert adapter.names == ("b", "c")
    assert not any("default" in name for name in adapter.model.state_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: a.add("b"), "name: expected a name that is free, got 'b'"),
        # In either basis: it tells a checkpoint's basis.
        (lambda a: a.add("indices"), "name: expected a name that is free, got 'indices'"),
        (lambda a: a.add("orthonormal_indices"), "name: expected a name that is free, got 'orth"),
        (lambda a: a.add("a b"), "name: expected an identifier, got 'a b'"),
        (lambda a: a.add(None), "name: expected an identifier, got None"),
        (lambda a: a.activate("c"), "name: expected one of default, b, got 'c'"),
        (lambda a: a.delete("c"), "name: expected one of default, b, got 'c'"),
        (lambda a: a.delete("default"), "name: expected an adapter that is not active"),
        (lambda a: a.save("x", "c"), "name: expected one of default, b, got 'c'"),
        (lambda a: a.combine({"b": 1.0}, "default"), "name: expected a name that is free"),
        (lambda a: a.combine({"c": 1.0}, "d"), "weights: expected one of default, b, got 'c'"),
        (lambda a: a.combine({}, "d"), "weights: expected finite numbers by name"),
        (lambda a: a.combine({"b": math.nan}, "d"), "weights: expected a finite number, got nan"),
        (lambda a: a.load("x", "a b"), "name: expected an identifier"),
    ],
)
def test_bad_names_and_weights(call, message):
    adapter = with_two()
    state = copy.deepcopy(adapter.model.state_dict())
    with pytest.raises(ValueError, match=message):
        call(adapter)
    assert adapter.names == ("default", "b")
    assert list(adapter.model.state_dict()) == list(state)


def test_what_does_not_add_is_not_combined():
    with pytest.raises(ValueError, match="combine: expected adapters of cores alone, got train_al"):
        with_two(ALSO).combine({"b": 1.0}, "c")


def test_files_that_do_not_fit_are_not_loaded(x, tmp_path):
    adapter = alone(1)
    y = adapter.model(x)

    def refused(message, error=ValueError, **kwargs):
        with pytest.raises(error, match=message):
            adapter.load(tmp_path / "a", **kwargs)
        assert torch.equal(adapter.model(x), y)
        assert adapter.names == ("default",)

    refused("expected an adapter file, got none", FileNotFoundError)
    for change, message in (
        ({"targets": "mlp.0"}, "got one without 8x32, 8x8"),
        ({"targets": {"a8": "attn.qkv"}}, "got other layers in stack a8"),
        ({"rank": 3}, "expected rank 2 in stack 8x8.* got 3"),
        ({"alpha": 0.5}, "expected alpha 1.0 in stack 8x8.* got 0.5"),
        ({"selection": ([0, 1], [2, 3])}, "expected rows .* in stack 8x8"),
        ({"train_also": "head"}, "expected nothing beside the cores, got head.bias, head.weight"),
    ):
        tcur.adapt(base_model(), **{"rank": 2, **change}).save(tmp_path / "a")
        refused(message)
        refused(message, name="new")
    torch.manual_seed(1)
    other = tcur.adapt(Tiny(), selection=adapter_indices(adapter), rank=2)
    other.save(tmp_path / "a")
    refused("expected an adapter of this base, got one of other weights in stack 8x8")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    refused("expected a whole safetensors file")
    alone(2).save(tmp_path / "a")
    adapter.merge()
    y = adapter.model(x)
    refused("load: expected an unmerged adapter, got one that is merged")
    adapter.load(tmp_path / "a", "b")


def adapter_indices(adapter):
    return {name: (stack.rows, stack.columns) for name, stack in adapter.stacks.items()}


def test_files_with_factors_fit_a_base_in_another_dtype(x, tmp_path):
    adapter = alone(1)
    adapter.save(tmp_path / "small")
    adapter.save(tmp_path / "whole", factors=True)
    extra = set(load_file(tmp_path / "whole")) - set(load_file(tmp_path / "small"))
    assert extra == {f"{kind}.{s}" for kind in ("lateral", "horizontal") for s in adapter.stacks}

    same = base_model()
    tcur.load_adapter(same, tmp_path / "whole")
    assert torch.equal(same(x), adapter.model(x))
    low = base_model().bfloat16()
    with pytest.raises(ValueError, match="got other weights in stack 8x8"):
        tcur.load_adapter(low, tmp_path / "small", strict=False)
    with pytest.raises(ValueError, match="strict=False loads it with the C and R it holds"):
        tcur.load_adapter(low, tmp_path / "whole")
    loaded = tcur.load_adapter(low, tmp_path / "whole", strict=False)
    for name, stack in loaded.stacks.items():
        assert torch.equal(stack.lateral, adapter.stacks[name].lateral)
        assert torch.equal(stack.core, adapter.stacks[name].core)
    # As close to the adapter in fp32 as plain torch comes in bf16.
    plain, exact = Plain(adapter, torch.bfloat16), Plain(adapter, torch.float64)(x.double())
    assert_composition_close(low(x.bfloat16()), lambda: plain(x.bfloat16()), exact)


def test_what_is_missing_is_said(tmp_path):
    alone(1, ALSO).save(tmp_path / "a")
    model = base_model()
    model.head = torch.nn.Sequential(model.head, torch.nn.Linear(5, 5))
    with pytest.raises(ValueError, match=r"model: expected head.bias of shape \[5\], got none"):
        tcur.load_adapter(model, tmp_path / "a")
    loaded = tcur.load_adapter(model, tmp_path / "a", strict=False)
    assert loaded.skipped == ("head.bias", "head.weight")
    assert loaded.missing == ("head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias")
    model = base_model()
    model.head.register_parameter("extra", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"got none of head.extra \(strict=False"):
        tcur.load_adapter(model, tmp_path / "a")
    assert tcur.load_adapter(model, tmp_path / "a", strict=False).missing == ("head.extra",)


def test_a_killed_save_leaves_the_old_file(x, tmp_path):
    path = tmp_path / "a"
    alone(1).save(path)
    old = path.read_bytes()
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(tmp_path.parent)!r})
import torch, tcur_kernels as tcur
from torch import nn
from tcur_kernels.adapters import file
whole = file.save_file
def half(tensors, path, metadata):
    whole(tensors, path, metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
file.save_file = half
adapter = tcur.adapt(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), rank=2)
adapter.save({str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == old
    model = base_model()
    tcur.load_adapter(model, path)
    assert torch.equal(model(x), alone(1).model(x))


def test_stacks_and_cores_that_would_have_one_name_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    message = r"not begin with another and two underscores, got 'a__b' beside 'a'"
    with pytest.raises(ValueError, match=message):
        tcur.adapt(model, rank=2, targets={"a": "0", "a__b": "1"})
    assert all(type(each) is nn.Linear for each in model)


def test_a_stack_counts_its_own_cores_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    adapter = tcur.adapt(model, rank=2, targets={"a": "0", "ab": "1"})
    adapter.add("second")
    assert [len(stack.storages()) for stack in adapter.stacks.values()] == [2, 2]


def test_a_base_is_hashed_once_however_many_files_are_loaded(tmp_path, monkeypatch):
    adapter = tcur.adapt(base_model(), rank=2)
    paths = [tmp_path / f"{number}.safetensors" for number in range(5)]
    for path in paths:
        adapter.save(path)
    hashed = []
    digest = fingerprint.digest
    monkeypatch.setattr(fingerprint, "digest", lambda parts: hashed.append(0) or digest(parts))
    for path in paths:
        adapter.load(path)
    adapter.stack_cores(paths)
    assert not hashed  # what `save` has hashed still holds
    with torch.no_grad():
        adapter.model.blocks[0].mlp[0].base_weight.add_(1)  # another base: other C and R
    with pytest.raises(ValueError, match="expected an adapter of this base"):
        adapter.load(paths[0])
    assert 0 < len(hashed) <= len(adapter.stacks)
