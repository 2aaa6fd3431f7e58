"""One way to check any operator: against float64, within the bound or the promise."""

import torch

from tcur_kernels.operators import contract, triton
from tolerance import PROMISE, assert_close, relative_error

assert triton.INTERPRETED  # and imported, which registers its operators

LANGUAGE = {"ieee": "triton", "tf32": "triton_tf32", "bf16": "triton"}


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


def check_promise(name, precision, factors, before, *after):
    """Arithmetic at a precision: the promise. Arguments around the two packed spectra."""
    args = [*before, *factors.packed(precision), *after]
    actual = contract.operator(name, LANGUAGE[precision])(*args)
    _, exact = expected(name, [*before, *factors.packed(), *after])
    error = relative_error(actual, exact)
    assert error <= PROMISE[precision], f"{error:.3g} with {precision}"
    if precision != "ieee":
        assert error > PROMISE["ieee"] / 10, "operands were not rounded at all"
