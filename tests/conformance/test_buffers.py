"""`materialize_out`: the bits of `materialize`, in a buffer, and nothing beside."""

from dataclasses import replace

import pytest
import torch

from cases import make_case, side_by_side
from tolerance import assert_close

from .backends import BESIDE, EMULATED, INTERPRETER
from .cases import EVERYWHERE, case
from .data import arguments, compute, expected, slices
from .table import CASES

#: The interpreter is too slow to compute more than two of them twice.
INTO_BUFFERS = [
    replace(each, meant_for=tuple(name for name in each.meant_for if name != INTERPRETER))
    for each in CASES
    if each.operator == "materialize_out"
]
INTO_BUFFERS += [
    case("materialize_out", 5, (6, 40, 2), meant_for=EVERYWHERE, weights=weights, counts=(3, 1, 1))
    for weights in ("layers", "beside")
]


@pytest.mark.cases(INTO_BUFFERS)
def test_the_bits_of_a_tensor_of_its_own(case, backend):
    given, run = arguments(case)[0], backend.run_case(case)
    in_place = compute(case, run, given)
    weights = given["weights"]
    if case.get("weights") == "beside":
        n2 = case.shape[1]
        weights = [part for matrix in weights for part in matrix.split(n2, 1)]
        weights = [torch.stack(weights)]
    own = {name: value for name, value in given.items() if name not in ("out", "weights")}
    w_eff = run("materialize", weights=weights, out_dtype=in_place.dtype, **own)
    assert torch.equal(in_place, w_eff.cpu())


AMONG_OTHERS = [
    case("materialize_out", n3, (7, n2, 1), meant_for=(BESIDE, EMULATED), weights="beside")
    for n3 in (5, 17, 12)
    for n2 in (1, 31, 36, 39)
]
AMONG_OTHERS.append(case("materialize_out", 6, (130, 1408, 1), meant_for=(BESIDE,)))


@pytest.mark.cases(AMONG_OTHERS)
@pytest.mark.parametrize("before", [64, 1])
def test_numbers_around_the_buffer_stay(case, backend, before):
    """The buffer is a part of a larger one, and begins at a cache line or just behind one.

    On a GPU other kernels write where an address is no multiple of a vector, so bits may differ.
    """
    given = {**arguments(case)[0]}
    out = given.pop("out")
    wide = backend.place(torch.full((before + out.numel() + 64,), 7.0, dtype=out.dtype))
    inner = wide[before:-64].view(out.shape)
    backend.run(case.operator, case.precision, **given, out=inner)
    assert_close(slices(case, inner.cpu()), *expected(case))
    assert (wide[:before] == 7).all()
    assert (wide[-64:] == 7).all()


def test_nothing_else_is_written(backend):
    """Or read out of bounds; there is no derivative by that way."""
    stack = make_case(4, 5, 6, 2)
    weights, matrices = list(stack.weight), side_by_side(stack.weight, [3, 1])
    given = dict(zip(("lateral_hat", "horizontal_hat"), stack.packed, strict=True))
    given |= {"core": stack.core, "scale": 0.5}
    errors = (RuntimeError, ValueError, TypeError)

    def write(weights, out):
        backend.run("materialize_out", weights=weights, out=backend.place(out), **given)

    for out in (torch.empty(4, 5, 6), torch.empty(119), torch.empty(240)[::2]):
        out = backend.place(out)
        before = out.fill_(7).clone()
        if out.is_contiguous() or backend.checks == "compiled":
            with pytest.raises(errors, match="out"):
                write(matrices, out)
            assert torch.equal(out, before)
    flat, last = torch.empty(120), torch.empty(5, 9)
    wrong = (matrices[:1], [*matrices, weights[0]], [matrices[0], last], [last, matrices[1]])
    for each in (*wrong, weights):
        with pytest.raises(errors):
            write(each, flat)
    with pytest.raises(errors):
        backend.run("materialize", weights=matrices, out_dtype=torch.float32, **given)
