"""What the kernels share, on its own: in a sum of products such errors would be small."""

import numpy
import pytest
import torch
import triton
import triton.language as tl

from tcur_kernels.operators.triton.spectra import rounded, unit_root

SIZE = 128


@triton.jit
def _round(a_ptr, out_ptr, BITS: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, rounded(tl.load(a_ptr + at), BITS))


@triton.jit
def _roots(cos_ptr, sin_ptr, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    cos, sin = unit_root(at % n, n)
    tl.store(cos_ptr + at, cos)
    tl.store(sin_ptr + at, sin)


@pytest.mark.parametrize("bits", [13, 16])
def test_rounded_to_the_nearest_with_fewer_bits(bits):
    a, out = torch.randn(SIZE), torch.empty(SIZE)
    _round[(1,)](a, out, BITS=bits, SIZE=SIZE)
    mantissa, exponent = numpy.frexp(a.double().numpy())
    digits = 24 - bits
    wanted = numpy.ldexp(numpy.round(numpy.ldexp(mantissa, digits)), exponent - digits)
    assert torch.equal(out.double(), torch.from_numpy(wanted))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 48, 97, 128])
def test_roots_of_unity(n):
    """Within 1e-7, as the docstring says."""
    cos, sin = torch.empty(SIZE), torch.empty(SIZE)
    _roots[(1,)](cos, sin, n, SIZE=SIZE)
    angle = 2 * torch.pi * (torch.arange(SIZE, dtype=torch.float64) % n) / n
    assert (cos - angle.cos()).abs().max() <= 1e-7
    assert (sin - angle.sin()).abs().max() <= 1e-7
