"""Names of a plan in few words, which stand for exactly the layers that are there."""

import itertools
import re

import pytest
import torch
from torch import nn

import tcur_kernels as tcur
from models import Tiny
from tcur_kernels.adapters.folding import folded
from tcur_kernels.adapters.plan import Member, StackPlan, make_plan


def unfolded(text):
    """All names that a folded one stands for, from the text alone."""
    parts = re.split(r"((?:\d+(?:-\d+)?,)*\d+(?:-\d+)?)", text)
    for index in range(1, len(parts), 2):
        runs = [run.split("-") for run in parts[index].split(",")]
        parts[index] = [str(n) for run in runs for n in range(int(run[0]), int(run[-1]) + 1)]
    choices = [[part] if isinstance(part, str) else part for part in parts]
    return {"".join(chosen) for chosen in itertools.product(*choices)}


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ([], []),
        (["head"], ["head"]),
        ([f"blocks.{i}.mlp" for i in range(12)], ["blocks.0-11.mlp"]),
        ([f"blocks.{i}.mlp" for i in (0, 1, 2, 3, 6, 7, 8, 9, 11)], ["blocks.0-3,6-9,11.mlp"]),
        ([f"h.{i}.{n}" for i in range(2) for n in "ab"], ["h.0-1.a", "h.0-1.b"]),
        (["h.2.a", "h.0.a", "h.1.a"], ["h.2,0-1.a"]),
        ([f"{i}.mlp.{j}" for i in range(3) for j in (0, 2)], ["0-2.mlp.0,2"]),
        (["0.b.0", "0.b.1", "1.b.0", "1.b.1", "2.b.0"], ["0-1.b.0-1", "2.b.0"]),
        (["0.b.1", "1.b.0"], ["0.b.1", "1.b.0"]),
        ([f"{i}.{j}.{k}" for i in (4, 5) for j in (1, 3) for k in range(3)], ["4-5.1,3.0-2"]),
        (["decoder2.conv", "decoder3.conv", "decoder.conv"], ["decoder2-3.conv", "decoder.conv"]),
        (["a.01", "a.02", "a.9", "a.10"], ["a.01", "a.02", "a.9-10"]),
        (["a.9", "a.10", "a.99", "a.100"], ["a.9-10,99-100"]),
    ],
)
def test_folding(names, wanted):
    found = folded(names)
    assert list(found) == wanted
    assert sorted(name for own in found.values() for name in own) == sorted(names)
    for text, own in found.items():
        assert own[0] == next(name for name in names if name in own)
        if not re.search(r"\b0\d", text):
            assert unfolded(text) == set(own)


def test_any_names_are_folded_to_themselves():
    """Nothing is lost or made up, whatever numbers there are."""
    generator = torch.Generator().manual_seed(0)
    every = [f"l.{i}.m{j}.n.{k}" for i in range(3) for j in range(3) for k in range(2)]
    for _ in range(300):
        chosen = torch.randperm(len(every), generator=generator)
        names = [every[i] for i in chosen[: int(chosen[0]) + 1]]
        found = folded(names)
        stood_for = [name for text in found for name in unfolded(text)]
        assert sorted(stood_for) == sorted(names)


def line_of(*members, **kwargs):
    plan = tcur.Plan((StackPlan("s", 4, 6, tuple(Member(*m) for m in members), 2, **kwargs),))
    return str(plan)


def test_layers_of_several_matrices_and_of_one():
    head = "stack s: 4 matrices of 4 x 6 share one core of 4 x 2 x 2 numbers: "
    assert line_of(("a.qkv", 3), ("b", 1)) == head + "a.qkv (3 matrices: fused q, k, v), b"
    assert line_of(("b.1", 2), ("b.0", 2)) == head + "b.1,0 (2 matrices each)"
    assert line_of(("b.0", 1), ("wide", 3)) == head + "b.0, wide (3 matrices)"
    single = "stack s: 1 matrix of 4 x 6 has a core of 1 x 2 x 2 numbers: only"
    assert line_of(("only", 1)) == single


def test_groups_come_in_the_order_of_their_first_slices():
    text = line_of(("b.1.x", 1), ("a.0", 3), ("b.0.x", 1), ("a.1", 1), ("a.2", 3))
    assert text.endswith(": b.1,0.x, a.0,2 (3 matrices each), a.1")


def test_a_way_of_running_that_was_asked_for_is_seen():
    plan = tcur.adapt(Tiny(), rank=2, mode="factored").plan
    assert str(plan).count("; factored as asked for\n") == 3
    assert plan.describe().count(", rank 2, factored as asked for\n") == 3
    usual = tcur.adapt(Tiny(), rank=2).plan
    assert "W_eff" not in str(usual)
    assert usual.describe().count(" tokens per step on, through the factors below\n") == 3


def test_each_stack_has_its_rank(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))

    targets, ranks = {"a": ["0", "1"], "b": "2"}, {"a": 3, "b": 2}
    assert [stack.rank for stack in make_plan(base(), targets, ranks).stacks] == [3, 2]
    adapter = tcur.adapt(base(), targets, ranks)
    adapter.save(tmp_path / "a")
    loaded = tcur.load_adapter(base(), tmp_path / "a")
    assert loaded.plan.stacks == adapter.plan.stacks
    assert "of 2 x 3 x 3 numbers: 0-1\n" in str(loaded.plan)
