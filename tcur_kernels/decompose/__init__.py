"""Tensor CUR: selection rules, cores, and stacks that are read block by block."""

from ..files.shards import Shards
from .cores import CORES
from .curve import error_curve
from .files import FileMatrix, FileSlices, open_stack
from .matrix import MatrixCUR, matrix_cur
from .modewise import ModewiseCUR, modewise_cur
from .rules import RULES, Deim, Inverse, Leverage, Norm, Norm2, Selection, Uniform
from .sharded import ShardedSlices
from .slices import HeldSlices, Slices
from .tensor import TensorCUR, tensor_cur

__all__ = [
    "CORES",
    "RULES",
    "Deim",
    "FileMatrix",
    "FileSlices",
    "HeldSlices",
    "Inverse",
    "Leverage",
    "MatrixCUR",
    "ModewiseCUR",
    "Norm",
    "Norm2",
    "Selection",
    "ShardedSlices",
    "Shards",
    "Slices",
    "TensorCUR",
    "Uniform",
    "error_curve",
    "matrix_cur",
    "modewise_cur",
    "open_stack",
    "tensor_cur",
]
