"""The cores of a stack: who holds them, which of them train, and what a fork does to their lock."""

import os

import pytest
import torch
from torch import nn

import tcur_kernels as tcur
from tcur_kernels import processes
from tcur_kernels.layers import rows
from tcur_kernels.layers.base import is_here
from tolerance import relative_error


def make_stack(out_features=6):
    linears = [nn.Linear(9, out_features).requires_grad_(False) for _ in range(3)]
    return tcur.TProductStack(linears, rank=2)


def test_only_a_child_gets_new_locks():
    stack = make_stack()
    assert stack in processes._told
    lock = stack._lock
    stack.was_forked(False)
    assert stack._lock is lock
    stack.was_forked(True)
    assert stack._lock is not lock


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_does_not_wait_for_a_lock_of_its_parent():
    stack = make_stack()
    with stack._lock:  # in the child nobody lets go of it
        child = os.fork()
        if child == 0:
            os._exit(0 if stack._lock.acquire(timeout=5) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_child_counts_the_batches_of_its_own_thread():
    everywhere = rows._Everywhere()
    everywhere.add(2)
    assert everywhere in processes._told
    assert everywhere.is_open
    everywhere.was_forked(False)
    assert everywhere.is_open
    everywhere.was_forked(True)  # this thread has none
    assert not everywhere.is_open


def test_a_core_is_set_where_it_is_held():
    stack, holder = make_stack(), nn.Module()
    stack.hand_over(holder, "mine")
    assert stack.core is holder.mine
    other = nn.Parameter(torch.ones_like(holder.mine))
    stack.core = other
    assert holder.mine is other
    assert stack.core is other
    assert "core" not in stack.__dict__


def test_a_core_that_is_added_is_frozen():
    stack = make_stack()
    stack.add_core("second")
    added = stack.core_of("second")
    assert not added.requires_grad
    assert not added.any()
    assert stack.core.requires_grad


def test_weights_without_numbers_are_not_here():
    stack = make_stack()
    assert all(map(is_here, stack.places))
    stack.layers[0].to("meta")
    assert [is_here(place) for place in stack.places] == [False, True, True]
    freed = make_stack()  # as FSDP1 does
    freed.places[1].base.untyped_storage().resize_(0)
    freed.places[2].base.data = freed.places[2].base.data.flatten()
    assert [is_here(place) for place in freed.places] == [True, False, False]


def test_numbers_that_are_looked_at_are_those_of_their_own_slice(monkeypatch):
    """A number of another slice would seem to have changed, and all would be compared each time."""
    linears = [nn.Linear(9, rows).requires_grad_(False) for rows in (6, 18, 6)]
    stack = tcur.TProductStack(linears, rank=2)
    x = torch.randn(2, 9)
    stack.layers[1](x)

    def suspect(*_):
        raise AssertionError("nothing has changed")

    monkeypatch.setattr(type(stack.base), "suspect", suspect)
    assert len(stack.base._samples) >= 9
    for _ in range(2 * len(stack.base._samples)):
        assert stack.base._looks_the_same()


def test_weights_redrawn_past_their_version_are_suspected():
    stack, x = make_stack(), torch.randn(2, 9)
    stack.layers[0](x)
    for place in stack.places:
        place.base.data.normal_()
    assert not stack.base._looks_the_same()
    assert stack.base.is_unsure
    stack.layers[0](x)
    weights = torch.stack([place.base.detach() for place in stack.places])
    assert torch.equal(stack.factors.slices[0], weights[:, :, list(stack.columns)])


def test_other_indices_are_other_slices():
    stack, x = make_stack(), torch.randn(2, 9)
    chosen = [each for each in range(6) if each not in stack.rows][:2]
    columns = [each for each in range(9) if each not in stack.columns][:2]
    stack.base.choose(chosen, columns)
    stack.layers[0](x)
    weights = torch.stack([place.base.detach() for place in stack.places])
    assert torch.equal(stack.factors.slices[0], weights[:, :, columns])
    assert torch.equal(stack.factors.slices[1], weights[:, chosen])


def test_w_eff_of_a_build_that_failed_is_not_used(monkeypatch):
    """Its buffer holds the numbers of another core than the one it was last kept for."""
    linears = [nn.Linear(9, 6).requires_grad_(False) for _ in range(3)]
    stack, x = tcur.TProductStack(linears, rank=2, mode="materialized"), torch.randn(2, 9)
    first, second = torch.randn(2, *stack.core.shape)
    with torch.no_grad():
        stack.core.copy_(first)
        wanted = stack.layers[1](x)
        stack.core.copy_(second)

        def put(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(type(stack._kept), "put", put)
            with pytest.raises(KeyboardInterrupt):
                stack.layers[1](x)
        stack.core.copy_(first)
        assert torch.equal(stack.layers[1](x), wanted)


def make_materialized(**how):
    linears = [nn.Linear(9, 6, **how).requires_grad_(False) for _ in range(3)]
    stack = tcur.TProductStack(linears, rank=2, mode="materialized")
    nn.init.normal_(stack.core)
    return stack


def test_a_weight_is_read_anew_after_its_base_changed():
    stack, x = make_materialized(), torch.randn(2, 9)
    layer = stack.layers[1]
    with torch.no_grad():
        layer(x)
        layer.base_weight.copy_(torch.randn(6, 9))
        read = layer.weight + 0.0  # before anything else looks at the base
        update = stack.scale * tcur.cur_product(stack.factors, stack.core)[1]
        assert relative_error(read, layer.base_weight.double() + update) < 1e-6


def test_w_eff_that_somebody_asked_for_is_not_used_in_16_bits():
    """Its rounding loses small updates, so "auto" goes through the factors in any case."""
    linears = [nn.Linear(9, 6, dtype=torch.bfloat16).requires_grad_(False) for _ in range(3)]
    stack, x = tcur.TProductStack(linears, rank=2), torch.randn(40, 9).bfloat16()
    nn.init.normal_(stack.core, std=1e-3)
    with torch.no_grad():
        wanted = stack.layers[1](x)
        stack.effective(torch.bfloat16)
        assert torch.equal(stack.layers[1](x), wanted)


def test_a_base_that_a_merged_layer_loads_is_merged():
    """Without an adapter around it, the next call finds out."""
    stack, x = make_materialized(), torch.randn(2, 9)
    stack.merge()
    layer, weight = stack.layers[1], torch.randn(6, 9)
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(6)})
    with torch.no_grad():
        y = layer(x)
        update = stack.scale * tcur.cur_product(stack.factors, stack.core)[1]
    assert relative_error(y, x.double() @ (weight + update).double().T) < 1e-6
