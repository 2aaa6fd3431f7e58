"""The same bits at every run, and by any number of threads."""

import pytest
import torch

from tolerance import assert_close

from .cases import EVERYWHERE, case
from .data import arguments, compute, expected

SUMS = [
    case("materialize", 12, (75, 300, 4), meant_for=("beside",)),
    case("core_grad_dense", 12, (75, 300, 4), meant_for=("beside",)),
    case("core_grad_dense", 3, (6, 20, 2), meant_for=EVERYWHERE),
    case("core_grad_tokens", 3, (6, 20, 2), meant_for=EVERYWHERE, tokens=(600,), first=1),
    case("core_grad_tokens", 3, (6, 20, 2), meant_for=EVERYWHERE, tokens=(600,), packed=True),
    case("core_of_packed", 12, (3, 3, 3), meant_for=EVERYWHERE, count=48),
]


@pytest.mark.cases(SUMS)
def test_the_same_bits_at_every_run(case, backend):
    given, run = arguments(case)[0], backend.run_case(case)
    assert torch.equal(compute(case, run, given), compute(case, run, given))


@pytest.mark.cases([each for each in SUMS if each.operator != "core_grad_tokens"])
def test_the_same_bits_by_any_number_of_threads(case, backend):
    if backend.isa is None:
        pytest.skip("has no threads of its own on the CPU")
    by_threads(lambda: compute(case, backend.run_case(case), arguments(case)[0]))


@pytest.mark.parametrize("rows", [1, 64])
def test_sums_over_tokens_by_any_number_of_threads(backend, rows):
    """Small integers: the product dy Ĉ, which is torch's, has no rounding to differ in."""
    if backend.isa is None:
        pytest.skip("has no threads of its own on the CPU")
    q = 12 * 5
    given = {
        "x": torch.randn(64, 300, q),
        "grad_y": torch.randint(-3, 4, (64, 300, 11)).float(),
        "lateral_hat": torch.randint(-3, 4, (11, q)).float(),
        "horizontal_hat": None,
        "n3": 12,
        "slice_index": 7,
        "slices": 1,
        "adapter_ids": torch.randint(40, (rows,)),
        "adapters": 40,
    }
    by_threads(lambda: backend.run("core_grad_tokens", **given))


UPDATED = [case("cur_linear", 3, (300, 20, 2), meant_for=("beside",), tokens=(300,), first=1)]


@pytest.mark.cases(UPDATED)
def test_an_update_that_several_threads_add(case, backend):
    """More numbers than one thread takes."""
    threads, (same, exact) = torch.get_num_threads(), expected(case)
    try:
        torch.set_num_threads(3)
        actual = compute(case, backend.run_case(case), arguments(case)[0])
    finally:
        torch.set_num_threads(threads)
    assert_close(actual.cpu(), same, exact)


def by_threads(run):
    """Asserts the same bits with one, two and three threads."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[1:])
