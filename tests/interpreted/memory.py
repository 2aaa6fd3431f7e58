"""What interpreted kernels may touch: the tensors that they were given, and nothing beside.

A kernel without the mask of a tail reads and writes behind its tensors. On a GPU that is an error
or a wrong number, by chance; in the interpreter it is what happens to lie there, by chance as well.
So each address is compared with the tensors of the launch. Weights of separate layers are told to a
kernel by their distance from the first: those are added by `base_of`, which makes the distances.
"""

import contextlib
from unittest import mock

import numpy
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from tcur_kernels.operators.triton import materialize


class Memory:
    """Addresses of the launch that runs, as half-open ranges of bytes."""

    def __init__(self):
        self.layers = []
        self.starts, self.ends = numpy.empty(0, numpy.uint64), numpy.empty(0, numpy.uint64)

    def allow(self, tensors):
        """The storages of these tensors are what the next accesses may touch."""
        ranges = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            ranges[storage.data_ptr()] = max(ranges.get(storage.data_ptr(), 0), storage.nbytes())
        starts = sorted(ranges)
        self.starts = numpy.array(starts, numpy.uint64)
        self.ends = numpy.array([start + ranges[start] for start in starts], numpy.uint64)

    def check(self, what, pointers, mask):
        """Raises an AssertionError if an address that counts is in no tensor."""
        addresses = pointers.data[numpy.broadcast_to(mask.data, pointers.data.shape)]
        if addresses.size == 0:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        # Most accesses are within one tensor: its ends say enough.
        low, high = addresses.min(), addresses.max()
        at = int(numpy.searchsorted(self.starts, low, "right")) - 1
        if at >= 0 and int(high) + size <= int(self.ends[at]):
            return
        at = numpy.searchsorted(self.starts, addresses, "right").astype(numpy.int64) - 1
        inside = (at >= 0) & (addresses + numpy.uint64(size) <= self.ends[numpy.maximum(at, 0)])
        assert inside.all(), f"{what} beside every tensor of the launch"


@contextlib.contextmanager
def watched():
    """Within it, kernels of the interpreter touch the tensors of their launch alone."""
    memory = Memory()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    launch, base_of = GridExecutor.__call__, materialize.base_of

    def checked_load(self, ptrs, mask, *rest):
        memory.check("a kernel reads", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def checked_store(self, ptrs, value, mask, *rest):
        memory.check("a kernel writes", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def checked_launch(self, *args, **kwargs):
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        memory.allow([*given, *memory.layers])
        return launch(self, *args, **kwargs)

    def noted_base_of(weights, *rest):
        memory.layers = list(weights)
        return base_of(weights, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", checked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", checked_store),
        mock.patch.object(GridExecutor, "__call__", checked_launch),
        mock.patch.object(materialize, "base_of", noted_base_of),
    ):
        yield
