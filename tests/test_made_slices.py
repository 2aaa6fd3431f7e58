"""Stacks of matrices that are made when they are read: the same slices, one matrix at a time."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tcur_kernels.decompose import RULES, HeldSlices
from tcur_kernels.decompose.made import MadeSlices
from tcur_kernels.decompose.slices import BYTES_PER_ELEMENT
from tcur_kernels.decompose.tensor import select_slices

N1, N2 = 12, 5


class Maker:
    """Makes copies of matrices, counts them, and refuses to make one while another is alive."""

    def __init__(self, matrices):
        self.matrices, self.count, self.latest = matrices, 0, None

    def of(self, index):
        def make():
            assert self.latest is None or self.latest.expired()
            self.count += 1
            made = self.matrices[index].clone()
            self.latest = StorageWeakRef(made.untyped_storage())
            return made

        return make

    def slices(self, **kwargs):
        makers = [self.of(index) for index in range(len(self.matrices))]
        counts = [len(matrix) // N1 for matrix in self.matrices]
        device = torch.device("cpu")
        return MadeSlices("made", makers, counts, N1, N2, torch.float32, device, **kwargs)


@pytest.fixture
def maker():
    return Maker([torch.randn(N1, N2), torch.randn(3 * N1, N2), torch.randn(N1, N2)])


#: Bytes for one row of all slices, for a few rows, and for all.
ROW = 5 * N2 * BYTES_PER_ELEMENT
WORKSPACES = [ROW, ROW + 800, 3 * ROW, 100 * ROW]


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_blocks_rows_and_columns_are_those_of_the_matrices(maker, workspace):
    held = HeldSlices("held", maker.matrices, N1)
    made = maker.slices(max_workspace=workspace)
    whole = torch.cat([matrix.unflatten(0, (-1, N1)) for matrix in maker.matrices])
    rows = 0
    for where, columns, block in made.blocks("test"):
        assert torch.equal(block, whole[:, where, columns])
        rows += block.shape[1]
    assert rows == N1
    chosen = torch.tensor([1, 4])
    assert torch.equal(made.rows(chosen), held.rows(chosen))
    assert torch.equal(made.columns(chosen), held.columns(chosen))
    made.check_finite()


@pytest.mark.parametrize("rule", RULES)
def test_rules_choose_the_same(maker, rule):
    held = HeldSlices("held", maker.matrices, N1)
    made = maker.slices(max_workspace=1 << 20)
    for one, other in zip(select_slices(held, 2, rule), select_slices(made, 2, rule), strict=True):
        if rule != "uniform":
            assert torch.equal(one, other)


def test_a_larger_workspace_makes_the_matrices_less_often(maker):
    counts = []
    for workspace in WORKSPACES:
        maker.count = 0
        for _ in maker.slices(max_workspace=workspace).blocks("test"):
            pass
        counts.append(maker.count)
    assert counts == [36, counts[1], counts[2], 3]
    assert 36 > counts[1] > counts[2] >= 3


def test_numbers_that_are_not_finite(maker):
    maker.matrices[1][20, 3] = float("nan")
    with pytest.raises(ValueError, match=r"made: expected finite numbers, got NaN or Inf"):
        maker.slices().check_finite()
    with pytest.raises(ValueError, match=rf"max_workspace: expected at least {ROW:,} bytes"):
        maker.slices(max_workspace=ROW - 1)
