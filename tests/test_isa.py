"""The instruction sets: every length of a transform, conversions, and the teeth of the bound.

Values of every operator under each of them are tested in `conformance`.
"""

import pytest
import torch

from cases import make_case
from tcur_kernels.operators import contract, native, reference
from tolerance import assert_close, bound, relative_error


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


@pytest.mark.parametrize("n3", [67, 101, 129, 131, 173, 197, 211, 251, 255, 257, 263, 509])
def test_sums_of_terms_of_one_sign(n3, isa):
    """A spectrum that is the same everywhere: its sines add up to much, and no term cancels."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        packed = torch.randn(3, 1, 32, 32, generator=generator).expand(3, n3, 32, 32).contiguous()
        assert_close(
            torch.ops.tcur.core_of_packed(packed, 1.0),
            reference.core_of_packed(packed, 1.0),
            reference.core_of_packed(packed.double(), 1.0),
        )


def test_a_long_sum_keeps_what_its_additions_round_off(isa):
    """A tube of 2^24 and of ones: added one after another, each of these would be lost."""
    n3 = 2039  # a prime whose transform is a table, and one sum of 1,019 terms
    core = torch.zeros(n3, 1, 1)
    core[1], core[17:1020:16] = 2.0**24, 1.0
    lateral_hat, horizontal_hat = torch.zeros(1, n3), torch.zeros(n3, 1)
    lateral_hat[0, 0] = horizontal_hat[0, 0] = 1  # of its spectrum, the sum alone
    w_eff = torch.ops.tcur.materialize([], lateral_hat, horizontal_hat, core, 1.0, torch.float32)
    exact = (core.double().sum() / n3).expand(n3, 1, 1)
    assert relative_error(w_eff, exact) < 2 * torch.finfo(torch.float32).eps


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
    runnable = ", ".join(native.runnable_isas())
    with pytest.raises(ValueError, match=f"name: expected one of {runnable}, got avx1024"):
        native.force("avx1024")


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
