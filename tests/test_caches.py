"""Tiles for caches of any size, the panels that factors keep, and tasks that threads share."""

import pytest
import torch

import tcur_kernels as tcur
from cases import make_case
from tcur_kernels.operators import layout, native, reference
from tolerance import assert_close

KIB = 1024


@pytest.fixture
def force():
    """`native.force`, undone afterwards."""
    isa, cache = native.chosen_isa(), native.second_level_cache()
    yield native.force
    native.force(isa, cache)


#: n3, n1, n2, rank: one or several rows of blocks in a tile, the last one not whole; rows and
#: columns that are not whole blocks; a length by levels, by two factors, by a convolution.
SHAPES = [(48, 21, 300, 8), (12, 70, 513, 32), (96, 9, 64, 4), (127, 18, 130, 5), (5, 130, 1, 1)]


@pytest.mark.parametrize("kib", [1, 64, 256, 512, 1024, 65536])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_cache_of_any_size_gives_the_same(isa, force, shape, kib):
    force(l2_cache=kib * KIB)
    case = make_case(*shape)
    exact, grad = case.double(), torch.randn_like(case.weight)
    assert_close(
        tcur.materialize(case.weight, case.factors, case.core, 0.5),
        reference.materialize(case.weight, *case.spectra, case.core, 0.5),
        reference.materialize(exact.weight, *exact.spectra, exact.core, 0.5),
    )
    assert_close(
        torch.ops.tcur.core_grad_dense(grad, *case.packed),
        reference.core_grad_dense(grad, *case.spectra),
        reference.core_grad_dense(grad.double(), *exact.spectra),
    )


def test_the_cache_of_this_machine_is_found_and_told():
    assert tcur.build_info()["cpu"]["l2_cache"] == native.second_level_cache()
    assert 64 * KIB <= native.second_level_cache() <= 1024**3


@pytest.mark.parametrize("bytes_", [0, -1])
def test_a_cache_without_room_is_refused(bytes_):
    with pytest.raises(ValueError, match=f"bytes: expected a positive number, got {bytes_}"):
        native.force(l2_cache=bytes_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_panels_are_those_of_the_kernels(isa, dtype):
    """Panels from Python and those that a kernel makes itself give the same bits."""
    materialize, core_grad_dense = torch.ops.tcur.materialize, torch.ops.tcur.core_grad_dense
    for n3, n1, n2, rank in SHAPES:
        case = make_case(n3, n1, n2, rank, dtype=dtype)
        grad, panels = torch.randn_like(case.weight), case.factors.panels()
        products, gradients = (
            [run(*arguments, given) for given in (panels, None, panels.roll(1, 1))]
            for run, arguments in (
                (materialize, ([], *case.packed, case.core, 1.0, dtype)),
                (core_grad_dense, (grad, *case.packed)),
            )
        )
        for by_panels, without, by_others in (products, gradients):
            assert torch.equal(by_panels, without)
            assert not torch.equal(by_panels, by_others)  # they are what is read


def test_panels_are_made_once(isa):
    factors = make_case(6, 10, 40, 2).factors
    panels = factors.panels()
    assert factors.panels() is panels
    core = torch.zeros(6, 2, 2, requires_grad=True)
    tcur.cur_product(factors, core).sum().backward()
    assert factors.panels() is panels
    assert factors.to("meta").panels() is None


def test_panels_of_another_instruction_set_are_not_read(force):
    """They are made anew: by the factors, and by a kernel that is given them all the same."""
    case = make_case(6, 10, 64, 2)
    factors = case.factors
    for isa in native.runnable_isas():
        force(isa=isa)
        kept = factors.panels()
        assert kept.shape[2] == native.strip_columns(torch.float32)
        made = torch.ops.tcur.materialize([], *case.packed, case.core, 1.0, torch.float32)
        for columns in (4, 8, 16, 32, 64):
            given = layout.panels(factors.horizontal_hat, columns)
            arguments = (*case.packed, case.core, 1.0, torch.float32, given)
            assert torch.equal(torch.ops.tcur.materialize([], *arguments), made)


@pytest.mark.parametrize("damage", [lambda p: p.double(), lambda p: p.mT.contiguous().mT])
def test_panels_that_kernels_cannot_read_are_refused(damage):
    case = make_case(6, 10, 64, 2)
    with pytest.raises(RuntimeError, match="panels"):
        torch.ops.tcur.core_grad_dense(case.weight, *case.packed, damage(case.factors.panels()))


def test_bits_do_not_depend_on_threads(isa):
    """Which thread takes a task is a matter of chance; what it computes is not."""
    case = make_case(12, 200, 130, 4)
    grad, before = torch.randn_like(case.weight), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2, 7):
            torch.set_num_threads(threads)
            w_eff = tcur.materialize(case.weight, case.factors, case.core)
            results.append((w_eff, torch.ops.tcur.core_grad_dense(grad, *case.packed)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
