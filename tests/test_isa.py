"""Every compiled instruction-set variant, forced; threads; the suite's own teeth."""

import pytest
import torch

from cases import counts_of, flat, make_case, side_by_side
from tcur_kernels import _cpu
from tcur_kernels.operators import contract, reference
from tolerance import assert_close, bound, relative_error

#: n3 that meet every branch of the DFTs: no pair, one line, one codelet, two with an odd and an
#: even outer length, levels with full blocks of lines and a rest, even lengths by levels.
N3 = (1, 2, 3, 5, 8, 13, 45, 48, 94, 97)


@pytest.fixture(params=_cpu.compiled_isas())
def isa(request):
    if request.param not in _cpu.runnable_isas():
        pytest.skip(f"this processor has no {request.param}")
    before = _cpu.chosen_isa()
    _cpu.use_isa(request.param)
    yield request.param
    _cpu.use_isa(before)


@pytest.mark.parametrize("n3", N3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_variant_is_right(isa, n3, dtype):
    case = make_case(n3, 11, 150, 5, dtype)
    w_eff = torch.ops.tcur.materialize([case.weight], *case.packed, case.core, 0.5, dtype)
    exact = reference.materialize(
        case.double().weight, *case.double().spectra, case.double().core, 0.5
    )
    same = reference.materialize(case.weight, *case.spectra, case.core, 0.5)
    assert_close(w_eff, same, exact)
    counts = counts_of(n3)
    if len(counts) < n3:
        out = torch.empty(w_eff.numel(), dtype=dtype)
        matrices = side_by_side(case.weight, counts)
        torch.ops.tcur.materialize_out(matrices, *case.packed, case.core, 0.5, out=out)
        assert torch.equal(out, flat(side_by_side(w_eff, counts)))

    grad = torch.randn_like(case.weight)
    exact = reference.core_grad_dense(grad.double(), *case.double().spectra)
    same = reference.core_grad_dense(grad, *case.spectra)
    assert_close(torch.ops.tcur.core_grad_dense(grad, *case.packed), same, exact)

    x, grad_y = torch.randn(70, 150, dtype=dtype), torch.randn(70, 11, dtype=dtype)
    exact = reference.core_grad_tokens(
        x.double(), grad_y.double(), *case.double().spectra, n3, n3 - 1
    )
    same = reference.core_grad_tokens(x, grad_y, *case.spectra, n3, n3 - 1)
    tokens = torch.ops.tcur.core_grad_tokens(x, grad_y, *case.packed, n3, n3 - 1, 1)
    assert_close(tokens, same, exact)

    args = (n3, n3 - 1, 1, None, 1, True)
    packed = torch.ops.tcur.core_grad_tokens(x, grad_y, *case.packed, *args)
    same = reference.core_grad_tokens(x, grad_y, *case.spectra, *args)
    tokens = (x.double(), grad_y.double())
    assert_close(packed, same, reference.core_grad_tokens(*tokens, *case.double().spectra, *args))
    parts = torch.randn(3, n3, 5, 5, dtype=dtype)
    exact = reference.core_of_packed(parts.double(), 0.7)
    same = reference.core_of_packed(parts, 0.7)
    assert_close(torch.ops.tcur.core_of_packed(parts, 0.7), same, exact)

    args = (case.core, n3 - 1, 1, 0.5)
    y = torch.ops.tcur.cur_linear(x, None, None, *case.packed, *args, False)
    exact_args = (case.double().core, n3 - 1, 1, 0.5)
    exact = reference.slice_update(x.double(), *case.double().spectra, *exact_args)
    assert_close(y, reference.slice_update(x, *case.spectra, *args), exact)


def test_every_length_is_transformed_right(isa):
    """All lengths that codelets make and some others, both ways, in a block that is not whole."""
    primes = (67, 71, 73, 79, 89, 97, 101, 109, 113, 127)
    neither = (17, 85, 121, 136)
    for n3 in (
        *range(1, 17),
        *primes,
        *neither,
        *(a * b for b in range(2, 10) for a in range(9, 17)),
    ):
        case = make_case(n3, 3, 5, 1)
        exact, grad = case.double(), torch.randn_like(case.weight)
        assert_close(
            torch.ops.tcur.materialize([], *case.packed, case.core, 1.0, torch.float32),
            reference.materialize(None, *case.spectra, case.core, 1.0),
            reference.materialize(None, *exact.spectra, exact.core, 1.0),
        )
        assert_close(
            torch.ops.tcur.core_grad_dense(grad, *case.packed),
            reference.core_grad_dense(grad, *case.spectra),
            reference.core_grad_dense(grad.double(), *exact.spectra),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_variant_rounds_as_torch_does(isa, dtype):
    """Base and result in half precision: with a zero core, conversions alone are left."""
    case = make_case(3, 5, 133, 2)
    case.core.zero_()
    case.weight *= 10.0 ** torch.randint(-9, 5, case.weight.shape)
    out = torch.ops.tcur.materialize([case.weight], *case.packed, case.core, 0.5, dtype)
    assert torch.equal(out, case.weight.to(dtype))
    half = case.weight.to(dtype)
    back = torch.ops.tcur.materialize([half], *case.packed, case.core, 0.5, torch.float32)
    assert torch.equal(back, half.float())


def test_an_unknown_variant_is_refused():
    runnable = ", ".join(_cpu.runnable_isas())
    with pytest.raises(ValueError, match=f"name: expected one of {runnable}, got avx1024"):
        _cpu.use_isa("avx1024")


def test_results_do_not_depend_on_the_number_of_threads():
    case = make_case(12, 75, 300, 4)
    grad = torch.randn_like(case.weight)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                [
                    torch.ops.tcur.materialize(
                        [case.weight], *case.packed, case.core, 0.5, torch.float32
                    ),
                    torch.ops.tcur.core_grad_dense(grad, *case.packed),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "damage",
    [
        lambda y: torch.zeros_like(y),
        lambda y: y + 1e-5 * y.abs().mean(),
        lambda y: y.index_fill(2, torch.tensor([y.shape[2] - 1]), 0.0),
        lambda y: torch.where(torch.arange(y.numel()).view_as(y) == 17, float("nan"), y),
        lambda y: y.flip(0),
        lambda y: y * (1 + 1e-5),
    ],
    ids=["zero", "offset", "lost column", "one nan", "reversed slices", "scaled"],
)
def test_a_broken_kernel_would_fail(damage):
    """The bound has teeth: small damage of each kind exceeds it."""
    case = make_case(7, 9, 40, 3)
    exact = reference.cur_product(
        case.double().spectra[0], case.double().core, case.double().spectra[1]
    )
    same = reference.cur_product(case.spectra[0], case.core, case.spectra[1])
    good = contract.operator("materialize")([], *case.packed, case.core, 1.0, torch.float32)
    assert_close(good, same, exact)
    assert relative_error(damage(good), exact) > bound(same, exact)
    with pytest.raises(AssertionError):
        assert_close(damage(good), same, exact)
