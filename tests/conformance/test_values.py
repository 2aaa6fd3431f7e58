"""Values of every operator in every language against float64, within the bound or the promise."""

import pytest
import torch

from tolerance import (
    PROMISE,
    assert_close,
    assert_composition_close,
    assert_sum_close,
    relative_error,
)

from .calls import plain
from .data import arguments, compute, expected, lengths, norm_of_terms
from .table import CASES

#: Operators whose results are of those sizes that the promise of a precision is about.
UPDATE = ("materialize", "materialize_out")


@pytest.mark.cases(CASES)
def test_values(case, backend):
    same, exact = expected(case)
    actual = compute(case, backend.run_case(case), given_of(case)).cpu()
    assert actual.is_contiguous()
    if same is not None:
        assert (actual.shape, actual.dtype) == (same.shape, same.dtype)
    if case.precision == "ieee" or case.operator == "core_of_packed":
        check_bound(case, backend, actual, same, exact)
    else:
        check_promise(case, backend, actual, exact)


def given_of(case):
    return arguments(case)[0]


def check_bound(case, backend, actual, same, exact):
    """Arithmetic as exact as torch's at the same dtype, which is fp32 where factors are."""
    if case.factors == torch.float32 and same.dtype == torch.float64:
        actual, same = actual.float(), same.float()
    if exact.numel() == 1 and case.get("way") in ("z", "dense"):
        # A product comes before. Of one number torch's own error may be none by chance.
        given = given_of(case)
        assert_composition_close(actual, lambda: plain(case.operator, **given), exact)
    elif case.is_reduction and backend.sums_in_blocks:
        assert_sum_close(actual, same, exact, norm_of_terms(case), lengths(case))
    else:
        assert_close(actual, same, exact)
    is_update = case.operator in UPDATE and case.get("weights") == "none"
    if is_update and actual.dtype in (torch.float32, torch.float64):
        assert relative_error(actual, exact) <= PROMISE["ieee"]


def check_promise(case, backend, actual, exact):
    """Arithmetic with rounded operands; where nothing is rounded, it is not done at all."""
    error = relative_error(actual, exact)
    assert error <= PROMISE[case.precision], f"relative error {error:.3g} of {case.precision}"
    if backend.rounds and case.elements == (torch.float32,) and case.get("way") != "ones":
        assert error > PROMISE["ieee"] / 10, "operands were not rounded at all"
