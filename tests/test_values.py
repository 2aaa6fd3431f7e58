"""Results print in one line, and compare without raising."""

import copy
from dataclasses import replace

import pytest
import torch

import tcur_kernels as tcur
from models import Tiny
from tcur_kernels.adapters.file import read_contents


def decompositions():
    torch.manual_seed(0)
    a = torch.randn(3, 40, 40)
    yield tcur.tensor_cur(a, 5)
    yield tcur.matrix_cur(a[0], 5)
    yield tcur.modewise_cur(a, (2, 3, 3))


@pytest.mark.parametrize("made", list(decompositions()), ids=lambda made: type(made).__name__)
def test_decompositions_print_in_short_and_compare(made):
    assert len(repr(made)) < 200
    assert "[3, 5, 5]" in repr(made) or "[5, 5]" in repr(made) or "[2, 3, 3]" in repr(made)
    twin = copy.deepcopy(made)
    assert twin == made
    assert hash(twin) == hash(made)
    other = replace(made, core=made.core + 1)
    assert other != made
    assert replace(made, core=made.core.double()) != made
    assert made != 3
    assert len({made, twin, other}) == 2


def test_fields_of_any_kind_compare(tmp_path):
    adapter = tcur.adapt(Tiny(), rank=2, train_also="head")
    adapter.save(tmp_path / "a.safetensors")
    one, other = (read_contents(tmp_path / "a.safetensors") for _ in range(2))
    assert one == other
    assert len(repr(one)) < 5_000
    learned = dict(one.learned)
    (name, value), *_ = learned.items()
    assert replace(one, learned={**learned, name: value + 1}) != one
    assert replace(one, learned={}) != one
    assert replace(one, stacks=one.stacks[:1]) != one
    assert replace(one, stacks=(one.stacks[0].core, *one.stacks[1:])) != one
    assert replace(one, stacks=("x", *one.stacks[1:])) != one


def test_handles_print_in_a_few_lines():
    adapter = tcur.adapt(Tiny(blocks=9), rank=2)
    assert len(repr(adapter)) < 300
    assert repr(adapter.plan) in repr(adapter)
    assert len(str(adapter.plan)) > len(repr(adapter.plan))
    assert repr(adapter.stack_cores(["default"])).startswith("StackedCores(1 adapters")
