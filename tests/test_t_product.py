"""Tubal algebra against the block-circulant definition."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import oracle
import tcur_kernels as tcur
from cases import N3
from tolerance import assert_close, relative_error


@pytest.mark.parametrize("n3", N3)
def test_t_product_is_the_block_circulant_product(n3):
    a = torch.randn(n3, 5, 4, dtype=torch.float64)
    b = torch.randn(n3, 4, 3, dtype=torch.float64)
    assert relative_error(tcur.t_product(a, b), oracle.t_product(a, b)) < 1e-14
    a, b = a.float(), b.float()
    assert_close(tcur.t_product(a, b), by_blocks(a, b), oracle.t_product(a, b))


def by_blocks(a, b):
    """The block-circulant product in the dtype of its arguments."""
    return (oracle.bcirc(a) @ b.flatten(0, 1)).unflatten(0, (a.shape[0], -1))


@pytest.mark.parametrize("n3", [1, 2, 3, 4, 7])
def test_t_product_derivatives(n3):
    a = torch.randn(n3, 3, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(n3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(tcur.t_product, (a, b))
    assert gradgradcheck(tcur.t_product, (a, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_t_product_of_half_precision_rounds_once(dtype):
    a, b = torch.randn(12, 5, 4).to(dtype), torch.randn(12, 4, 3).to(dtype)
    product = tcur.t_product(a, b)
    assert product.dtype == dtype
    assert torch.equal(product, tcur.t_product(a.float(), b.float()).to(dtype))
    assert_close(product, by_blocks(a.float(), b.float()).to(dtype), oracle.t_product(a, b))


@pytest.mark.parametrize("n3", N3)
def test_t_transpose(n3):
    a = torch.randn(n3, 5, 4, dtype=torch.float64)
    b = torch.randn(n3, 4, 3, dtype=torch.float64)
    assert torch.equal(tcur.t_transpose(a), oracle.t_transpose(a))
    assert torch.equal(tcur.t_transpose(tcur.t_transpose(a)), a)
    reversed_product = oracle.t_product(oracle.t_transpose(b), oracle.t_transpose(a))
    assert relative_error(tcur.t_transpose(tcur.t_product(a, b)), reversed_product) < 1e-13


@pytest.mark.parametrize("n3", N3)
def test_t_identity(n3):
    a = torch.randn(n3, 5, 4, dtype=torch.float64)
    identity = tcur.t_identity(5, n3, dtype=torch.float64)
    assert relative_error(oracle.t_product(identity, a), a) == 0
    assert relative_error(tcur.t_product(identity, a), a) < 1e-14
    assert tcur.t_identity(3, 2, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("n3", N3)
@pytest.mark.parametrize(("n1", "n2"), [(5, 3), (3, 5), (4, 4)])
def test_t_pinv_satisfies_the_penrose_equations(n3, n1, n2):
    a = torch.randn(n3, n1, n2, dtype=torch.float64)
    p = tcur.t_pinv(a)
    ap, pa = oracle.t_product(a, p), oracle.t_product(p, a)
    assert relative_error(oracle.t_product(ap, a), a) < 1e-10
    assert relative_error(oracle.t_product(pa, p), p) < 1e-10
    assert relative_error(ap, oracle.t_transpose(ap)) < 1e-9
    assert relative_error(pa, oracle.t_transpose(pa)) < 1e-9


def test_t_pinv_of_a_deficient_tensor():
    a = tcur.t_product(torch.randn(6, 5, 2).double(), torch.randn(6, 2, 5).double())
    p = tcur.t_pinv(a)
    assert relative_error(tcur.t_product(tcur.t_product(a, p), a), a) < 1e-10
    assert torch.equal(tcur.t_pinv(torch.zeros(3, 2, 4)), torch.zeros(3, 4, 2))


@pytest.mark.parametrize("n3", N3)
@pytest.mark.parametrize(("n1", "n2"), [(5, 3), (3, 5)])
def test_t_svd(n3, n1, n2):
    a = torch.randn(n3, n1, n2, dtype=torch.float64)
    u, s, v = tcur.t_svd(a)
    m = min(n1, n2)
    assert (u.shape, s.shape, v.shape) == ((n3, n1, m), (n3, m, m), (n3, n2, m))
    product = oracle.t_product(oracle.t_product(u, s), oracle.t_transpose(v))
    assert relative_error(product, a) < 1e-12
    identity = tcur.t_identity(m, n3, dtype=torch.float64)
    for q in (u, v):
        assert relative_error(oracle.t_product(oracle.t_transpose(q), q), identity) < 1e-12
    assert torch.equal(s, torch.diag_embed(torch.diagonal(s, dim1=1, dim2=2)))


def test_t_svd_and_t_pinv_are_differentiable():
    a = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(tcur.t_pinv, (a,))
    assert gradcheck(lambda x: tcur.t_svd(x)[1], (a,))


@settings(max_examples=30, deadline=None)
@given(
    n3=st.integers(1, 13),
    sizes=st.tuples(*[st.integers(1, 5)] * 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_t_product_is_associative(n3, sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b, c = (
        torch.randn(n3, *shape, dtype=torch.float64, generator=generator)
        for shape in pairwise(sizes)
    )
    left = tcur.t_product(tcur.t_product(a, b), c)
    right = tcur.t_product(a, tcur.t_product(b, c))
    scale = float(a.norm() * b.norm() * c.norm())
    assert float((left - right).norm()) < 1e-13 * scale


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 5, 1), ValueError, r"b: expected \[n3, p, n2\]"),
        (torch.ones(2, 3, 4), torch.ones(3, 4, 1), ValueError, "b: expected"),
        (torch.ones(2, 3), torch.ones(2, 3, 1), ValueError, r"a: expected \[n3, n1, n2\]"),
        (torch.ones(2, 3, 0), torch.ones(2, 0, 1), ValueError, "no empty axis"),
        (torch.ones(2, 3, 4).int(), torch.ones(2, 4, 1), TypeError, "a: expected a floating"),
        (torch.ones(2, 3, 4), torch.ones(2, 4, 1).double(), TypeError, "b: expected the dtype"),
        ([1.0], torch.ones(2, 4, 1), TypeError, "a: expected a torch.Tensor, got list"),
        (torch.ones(2, 3, 4), torch.ones(2, 4, 1, device="meta"), ValueError, "b: .* device"),
    ],
)
def test_t_product_refuses(a, b, error, message):
    with pytest.raises(error, match=message):
        tcur.t_product(a, b)


def test_the_other_functions_refuse():
    for function in (tcur.t_transpose, tcur.t_pinv, tcur.t_svd):
        with pytest.raises(TypeError, match=r"a: expected a floating dtype, got torch.int64"):
            function(torch.ones(2, 3, 4, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"a: expected \[n3, n1, n2\].*got \[3\]"):
            function(torch.ones(3))
    with pytest.raises(TypeError, match="a: expected a floating dtype of 16 bits or more"):
        tcur.t_svd(torch.ones(2, 3, 4).to(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match="n: expected a positive integer, got float"):
        tcur.t_identity(2.0, 3)
    with pytest.raises(ValueError, match="n3: expected a positive integer, got 0"):
        tcur.t_identity(2, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_counts_as_zero_is_up_to_the_dtype_that_came(dtype):
    """Singular values that may be rounding are not inverted: of sums, or of numbers in 16 bits."""
    eps = torch.finfo(dtype).eps
    zero = 5 * eps if dtype == torch.float32 else eps
    left, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    for factor, rank in ((0.3, 3), (10.0, 4)):
        values = torch.tensor([1.0, 0.9, 0.8, zero * factor], dtype=torch.float64)
        a = torch.zeros(3, 5, 4, dtype=torch.float64)
        a[0] = (left[:, :4] * values) @ right
        a = a.to(dtype)
        assert tcur.multirank(a).tolist() == [rank] * 3
        inverse = tcur.t_pinv(a)
        assert inverse.dtype == dtype
        largest = torch.linalg.matrix_norm(inverse[0].double(), ord=2)
        assert (largest > 2) == (rank == 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_axes_of_any_length_have_their_rank_in_16_bits(dtype):
    """Of 1 / eps terms and more, of which no singular value of the pretended noise is left."""
    tall, square = torch.randn(2, 1100, 3).to(dtype), torch.randn(3, 300, 300).to(dtype)
    for a, rank in ((tall, 3), (tall.mT, 3), (square, 300)):
        assert tcur.tubal_rank(a, rtol=0.0) == rank
        kept = tcur.multirank(a)  # of random square matrices some singular values are noise
        assert all(rank - 1 - rank // 50 <= each <= rank for each in kept.tolist()), kept
    low = tcur.t_product(torch.randn(2, 300, 5), torch.randn(2, 5, 300)).to(dtype)
    assert tcur.multirank(low).tolist() == [5, 5]
    inverse = tcur.t_pinv(tall).double()
    identity = tcur.t_product(inverse, tall.double())
    assert relative_error(identity, tcur.t_identity(3, 2).double()) < 8 * torch.finfo(dtype).eps
