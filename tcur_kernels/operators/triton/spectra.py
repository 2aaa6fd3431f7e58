"""What the kernels share: roots of unity, and products of a stated precision.

The kernels read and write packed half spectra, as `reference.pack` makes them. A packed half
spectrum has n3 planes of real numbers. A factor of rank r has r columns (or rows) for each plane.
Plane 0 is bin 0. Planes 2k - 1 and 2k are the real and the imaginary part of bin k. For even n3,
the last plane is bin n3/2. Bins 0 and n3/2 are real. Every other bin stands for the pair of bins k
and n3 - k, which are conjugate.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(a, BITS: tl.constexpr):
    """Rounds fp32 numbers to the nearest ones whose last BITS of 24 are zero.

    BITS is 13 for TF32 and 16 for bf16.
    """
    half: tl.constexpr = 1 << (BITS - 1)
    bits = (a.to(tl.int32, bitcast=True) + half) & -(2 * half)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def split_dot(a_lead, a_rest, b, acc):
    """Returns ``acc + a @ b`` for an ``a`` that is split already, see "3xtf32" in `dot`."""
    b_lead = rounded(b, 13)
    triple = tl.dot(a_rest, b_lead, input_precision="tf32")
    triple = tl.dot(a_lead, b - b_lead, triple, input_precision="tf32")
    return acc + tl.dot(a_lead, b_lead, triple, input_precision="tf32")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Returns ``acc + a @ b``, summed in fp32; PRECISION is one of `launch.dot_precisions`.

    "3xtf32" splits each operand into its 11 leading bits, which TF32 holds, and the rest. It
    computes three of the four products in TF32. It leaves out the product of the two rests, which
    is at most 2^-22 of the whole, and a rest may lose its last bit, at most 2^-23 of the operand.

    Tensor cores truncate each of their sums towards zero. On average this takes away 2^-24 of the
    sum, and in a long sum these errors add up. So tensor cores sum only the three products of
    one pair of tiles, the small ones first. These sums are then added up in fp32, which rounds.
    """
    if PRECISION == "bf16":
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    else:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        if PRECISION == "3xtf32":
            a_lead = rounded(a, 13)
            acc = split_dot(a_lead, a - a_lead, b, acc)
        elif PRECISION == "emulated tf32":
            acc = tl.dot(rounded(a, 13), rounded(b, 13), acc, input_precision="ieee")
        elif PRECISION == "emulated bf16":
            acc = tl.dot(rounded(a, 16), rounded(b, 16), acc, input_precision="ieee")
        elif PRECISION == "tf32":
            # Tensor cores would cut off the last 13 bits, with twice the error of rounding.
            acc = tl.dot(rounded(a, 13), rounded(b, 13), acc, input_precision="tf32")
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def unit_root(m, n):
    """Returns cos and sin of 2 pi m / n for 0 <= m < n, with an error of about 1e-7 at most.

    The angle is reduced to an eighth of a turn in integers, so that this is exact. There, Taylor's
    polynomials of degree 10 and 11 differ from cos and sin by less than fp32 can hold. A library
    function would have a slow path that needs a stack frame.
    """
    upper = 2 * m > n
    m = tl.where(upper, n - m, m)  # at most half a turn; the sine changes its sign
    obtuse = 4 * m > n
    twice = tl.where(obtuse, n - 2 * m, 2 * m)  # m is reflected at a quarter of a turn
    steep = 4 * twice > n
    # The angle is eighths / (4 n) of a turn, at most 1/8.
    eighths = tl.where(steep, n - 2 * twice, 2 * twice)
    angle = eighths.to(tl.float32) * (1.5707963267948966 / n)
    x = angle * angle
    sine = 1.0 - x / 110.0
    sine = 1.0 - x / 72.0 * sine
    sine = 1.0 - x / 42.0 * sine
    sine = 1.0 - x / 20.0 * sine
    sine = angle * (1.0 - x / 6.0 * sine)
    cosine = 1.0 - x / 90.0
    cosine = 1.0 - x / 56.0 * cosine
    cosine = 1.0 - x / 30.0 * cosine
    cosine = 1.0 - x / 12.0 * cosine
    cosine = 1.0 - x / 2.0 * cosine
    c = tl.where(steep, sine, cosine)
    s = tl.where(steep, cosine, sine)
    return tl.where(obtuse, -c, c), tl.where(upper, -s, s)
