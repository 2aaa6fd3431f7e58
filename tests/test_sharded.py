"""Weights sharded over processes: the same slices and cores as on one. Each test is a torchrun."""

import pytest

import torchrun


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.matrix), 3])
def test_sharded_weights_give_the_same_indices(processes):
    result = torchrun.run("sharded_selection.py", processes)
    for process in range(processes):
        assert f"process {process} of {processes}: done" in result.stderr
