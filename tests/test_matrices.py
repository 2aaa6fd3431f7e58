"""How a stored tensor holds a matrix: in memory, in files, and in the words of an adapter file."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tcur_kernels.decompose import FileMatrix, open_stack
from tcur_kernels.matrices import (
    LAYOUTS,
    layout_in_file,
    layout_of_file,
    matrix_of,
    shape_of,
    stored_of,
)

#: Shape of a stored tensor and the matrix in it, by layout.
STORED = {
    "matrix": [((6, 4), (6, 4))],
    "transposed": [((4, 6), (6, 4))],
    "convolution": [((6, 2, 2), (6, 4)), ((6, 1, 2, 2), (6, 4)), ((6, 2, 1, 2, 1), (6, 4))],
    "experts": [((3, 2, 4), (6, 4))],
}
CASES = [(layout, *shapes) for layout, each in STORED.items() for shapes in each]


@pytest.mark.parametrize(("layout", "stored", "matrix"), CASES)
def test_there_and_back(layout, stored, matrix):
    tensor = torch.randn(stored)
    held = matrix_of(tensor, layout)
    assert shape_of(stored, layout) == tuple(held.shape) == matrix
    assert held.data_ptr() == tensor.data_ptr()  # no copy
    assert torch.equal(stored_of(held, layout, stored), tensor)


def test_experts_lie_below_each_other():
    tensor = torch.randn(3, 2, 4)
    assert torch.equal(matrix_of(tensor, "experts"), torch.cat([*tensor]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (4,), (4, 0), (2, 0, 3), (1, 1, 1, 1, 1, 1)])
def test_tensors_without_a_matrix(layout, shape):
    assert shape_of(shape, layout) is None


def test_two_axes_are_no_kernel():
    assert shape_of((4, 4), "convolution") is shape_of((4, 4), "experts") is None
    assert shape_of((4, 4, 4), "matrix") is shape_of((4, 4, 4), "transposed") is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_words_of_files(layout):
    assert layout_of_file(json.loads(json.dumps(layout_in_file(layout)))) == layout


def test_files_keep_their_words():
    """Files from before there were other layouts say whether a weight is transposed."""
    assert (layout_of_file(False), layout_of_file(True)) == ("matrix", "transposed")
    with pytest.raises(ValueError, match=r"layout: expected one of matrix, .*, got 'diagonal'"):
        layout_of_file("diagonal")


def test_a_stack_in_files(tmp_path):
    """Kernels and experts are read block by block like matrices."""
    kernel, experts = torch.randn(6, 2, 2), torch.randn(3, 6, 4)
    save_file({"kernel": kernel, "experts": experts}, tmp_path / "model.safetensors")
    parts = [FileMatrix("kernel", "convolution"), FileMatrix("experts", "experts")]
    slices = open_stack(tmp_path, parts, n1=6, max_workspace=2_000)
    blocks = [block for _, _, block in slices.blocks("", 0)]
    assert len(blocks) > 1
    assert torch.equal(torch.cat(blocks, 1), torch.cat([kernel.flatten(1)[None], experts]))
    with pytest.raises(ValueError, match=r"expected kernel to be a matrix \(matrix\), got"):
        open_stack(tmp_path, [FileMatrix("kernel"), FileMatrix("experts", "experts")])
    with pytest.raises(ValueError, match="layout: expected one of"):
        FileMatrix("kernel", True)
