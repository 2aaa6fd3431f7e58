"""The specification itself, proved against the block-circulant definition in float64."""

import pytest
import torch

import oracle
from cases import N3, make_case
from tcur_kernels.operators import reference
from tolerance import relative_error

LIMIT = 1e-12


@pytest.mark.parametrize("n3", N3)
def test_pack_and_unpack_are_inverse(n3):
    a = torch.randn(n3, 3, 2, dtype=torch.float64)
    a_hat = reference.half_spectrum(a)
    planes = reference.pack(a_hat, n3)
    assert planes.shape == a.shape
    assert torch.equal(reference.unpack(planes), a_hat)
    assert relative_error(reference.from_half_spectrum(a_hat, n3), a) < LIMIT


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("n3", N3)
def test_the_gradient_of_packing_is_unpacked(n3, columns):
    """Wherever in memory it lies."""
    a_hat = reference.half_spectrum(torch.randn(n3, 1, columns, dtype=torch.float64))
    a_hat.requires_grad_()
    grad = torch.randn(n3, 1, columns, dtype=torch.float64)
    for laid_out in (grad, grad.movedim(0, -1).contiguous().movedim(-1, 0)):
        (found,) = torch.autograd.grad(reference.pack(a_hat, n3), a_hat, laid_out)
        assert torch.equal(found, reference.unpack(grad))


@pytest.mark.parametrize("n3", N3)
def test_products(n3):
    case = make_case(n3, 5, 6, 3, torch.float64)
    exact = oracle.cur_product(case.lateral, case.core, case.horizontal)
    lateral_hat, horizontal_hat = case.spectra
    product = reference.cur_product(lateral_hat, case.core, horizontal_hat)
    assert product.is_contiguous()
    assert relative_error(product, exact) < LIMIT
    w_eff = reference.materialize(case.weight, lateral_hat, horizontal_hat, case.core, 0.5)
    assert relative_error(w_eff, case.weight + 0.5 * exact) < LIMIT


@pytest.mark.parametrize("n3", N3)
def test_core_gradient_of_a_dense_gradient(n3):
    case = make_case(n3, 5, 6, 3, torch.float64)
    grad = torch.randn_like(case.weight)
    core = case.core.clone().requires_grad_()
    (exact,) = torch.autograd.grad(
        oracle.cur_product(case.lateral, core, case.horizontal), core, grad
    )
    assert relative_error(reference.core_grad_dense(grad, *case.spectra), exact) < LIMIT
    transposes = oracle.t_transpose(case.lateral), oracle.t_transpose(case.horizontal)
    formula = oracle.t_product(oracle.t_product(transposes[0], grad), transposes[1])
    assert relative_error(formula, exact) < LIMIT


@pytest.mark.parametrize("n3", N3)
@pytest.mark.parametrize("slices", [1, 3])
def test_linear_and_its_gradients(n3, slices):
    if slices > n3:
        slices = n3
    case = make_case(n3, 5, 6, 3, torch.float64)
    core = case.core.clone().requires_grad_()
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    first = n3 - slices
    w_eff = oracle.w_eff(case.weight, case.lateral, core, case.horizontal, 0.7)
    exact = torch.nn.functional.linear(x, w_eff[first:].reshape(slices * 5, 6))
    grad_y = torch.randn_like(exact)
    exact_x, exact_core = torch.autograd.grad(exact, (x, core), grad_y)

    weight = case.weight[first:].reshape(slices * 5, 6)
    args = (*case.spectra, case.core, first, slices, 0.7)
    y = reference.cur_linear(x.detach(), weight, None, *args)
    assert relative_error(y, exact.detach()) < LIMIT
    x_grad = grad_y @ weight + reference.slice_update_transposed(grad_y, *args)
    assert relative_error(x_grad, exact_x) < LIMIT
    core_grad = 0.7 * reference.core_grad_tokens(
        x.detach(), grad_y, *case.spectra, n3, first, slices
    )
    assert relative_error(core_grad, exact_core) < LIMIT


def test_autograd_through_the_reference_agrees_with_its_own_formulas():
    case = make_case(7, 5, 6, 3, torch.float64)
    core = case.core.clone().requires_grad_()
    grad = torch.randn_like(case.weight)
    lateral_hat, horizontal_hat = case.spectra
    product = reference.cur_product(lateral_hat, core, horizontal_hat)
    (by_autograd,) = torch.autograd.grad(product, core, grad)
    by_formula = reference.core_grad_dense(grad, lateral_hat, horizontal_hat)
    assert relative_error(by_autograd, by_formula) < LIMIT
