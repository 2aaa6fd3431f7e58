"""What the kernels share: roots of unity, products at a stated precision, packed spectra.

Packed spectra are those of `reference.pack`: with a rank of r, bin k >= 1 lies in the 2r columns
(or rows) from (2k - 1) r on, its real part first, bin 0 in the r before them, and for even n3 the
last r are the real bin n3/2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(a, BITS: tl.constexpr):
    """The nearest number without the last BITS of its 24: 13 for TF32, 16 for bf16."""
    half: tl.constexpr = 1 << (BITS - 1)
    bits = (a.to(tl.int32, bitcast=True) + half) & -(2 * half)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``, sums in fp32; PRECISION as of `launch.dot_precisions`.

    "3xtf32" is three products of TF32, of the leading bits of each operand and of what they leave;
    only the product of the two rests is lost, 2^-24 of the whole. Tensor cores truncate each of
    their sums, 2^-24 of it on the average and always towards zero: a long sum there would be too
    small by as many of these as it has terms. So they sum one triple, the small products first, and
    triples are added up in fp32, which rounds.
    """
    if PRECISION == "bf16":
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    else:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        if PRECISION == "3xtf32":
            a_lead = rounded(a, 13)
            b_lead = rounded(b, 13)
            triple = tl.dot(a - a_lead, b_lead, input_precision="tf32")
            triple = tl.dot(a_lead, b - b_lead, triple, input_precision="tf32")
            acc += tl.dot(a_lead, b_lead, triple, input_precision="tf32")
        elif PRECISION == "emulated tf32":
            acc = tl.dot(rounded(a, 13), rounded(b, 13), acc, input_precision="ieee")
        elif PRECISION == "emulated bf16":
            acc = tl.dot(rounded(a, 16), rounded(b, 16), acc, input_precision="ieee")
        elif PRECISION == "tf32":
            # Handed fp32, tensor cores cut off the last 13 bits: twice the error of rounding.
            acc = tl.dot(rounded(a, 13), rounded(b, 13), acc, input_precision="tf32")
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def unit_root(m, n):
    """cos and sin of 2 pi m / n for 0 <= m < n, to one rounding of fp32.

    The angle is reduced to an eighth of a turn in integers, where Taylor's polynomials of degree
    10 and 11 are exact to fp32; a library call would have a slow path with a stack frame.
    """
    upper = 2 * m > n
    m = tl.where(upper, n - m, m)  # half a turn: the sine changes its sign
    obtuse = 4 * m > n
    twice = tl.where(obtuse, n - 2 * m, 2 * m)  # twice the reflected m: a quarter of a turn
    steep = 4 * twice > n
    # Angle / 2 pi = eighths / (4 n), at most 1/8.
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
