"""One way to check any operator, or what stands for it: against float64, within the bound."""

import torch

from tcur_kernels.operators import contract, triton
from tolerance import assert_close

assert triton.INTERPRETED  # and imported, which registers its operators


def _map(function, args):
    return [
        [function(t) for t in arg]
        if isinstance(arg, list)
        else function(arg)
        if isinstance(arg, torch.Tensor) and arg.is_floating_point()
        else arg
        for arg in args
    ]


def in_float64(args):
    """The same arguments in float64, detached, dtypes that are named included."""
    args = [torch.float64 if isinstance(arg, torch.dtype) else arg for arg in args]
    return _map(lambda t: t.detach().double(), args)


def expected(name, args):
    """What plain torch gives in the dtypes at hand, and what it gives in float64."""
    op = contract.operator(name, "reference")
    return op(*args), op(*in_float64(args))


def check(name, *args, run=None):
    """fp32 arithmetic: the bound. ``run`` stands in for the operator."""
    actual = (run or contract.operator(name, "triton"))(*args)
    same, exact = expected(name, args)
    assert actual.is_contiguous()
    assert (actual.shape, actual.dtype) == (same.shape, same.dtype)
    assert_close(actual, same, exact)
    return actual
