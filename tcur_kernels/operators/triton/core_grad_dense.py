"""``core_grad_dense`` in Triton: computes Cᵀ*G*Rᵀ, the adjoint of `materialize`, and reads G once.

In the Fourier domain, this is ∂Û_k = Ĉ_kᴴ Ĝ_k R̂_kᴴ for every bin k. The kernels here compute
Y_k = Ĝ_k R̂_kᴴ, which has r columns. Then `blocks` computes Ĉ_kᴴ Y_k, a sum over the n1 rows and
over the spans of columns, and transforms it back.

A program owns a block of rows of G and walks over a span of its columns, one tile after the other.
There are two forms:

- ``folded``: the program transforms the tile of all slices, by products with the matrix of the DFT.
  Slices l and n3 - l have the same cosines and opposite sines. So cosines multiply G_l + G_{n3-l},
  sines multiply G_l - G_{n3-l}, and the products have half the size. The program multiplies the
  result by R̂_kᴴ and adds it to Y_k. If a tube has more bins than one program takes, several
  programs side by side share the tile through the second-level cache.
- ``direct``: for a few slices, G is not transformed. The phases multiply R̂ instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import CoreGradDense
from . import launch
from .blocks import core_gradient
from .contract import check_factors, expect
from .launch import wrap_triton
from .spectra import dot, unit_root


@triton.jit
def _direct_kernel(
    grad_ptr,  # [n3, n1, n2]
    horizontal_ptr,  # [q, n2]
    y_ptr,  # [spans, n1, n3 * RANKS] out: planes Re Y_k and -Im Y_k
    n1, n2, n3, rank,
    ROWS: tl.constexpr, COLS: tl.constexpr, SPAN: tl.constexpr, RANKS: tl.constexpr,
    PARTS: tl.constexpr, BINS: tl.constexpr, SLICES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes BINS columns of conj(Y_k) = Σ_l G_l (e^{2 pi i k l / n3} R̂_k)ᵀ for one span.

    The real and imaginary parts of R̂_k are rows of their own, and so give columns of their own.
    """
    i = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    start = tl.program_id(2) * SPAN
    c = tl.program_id(0) * BINS + tl.arange(0, BINS)
    p = c // RANKS
    part = c % RANKS
    k = (p + 1) // 2
    is_pair = (k > 0) & (2 * k < n3)
    imag = (p % 2 == 0) & is_pair
    partner = tl.where(imag, p - 1, p + 1)
    used = (p < n3) & (part < rank)
    y = tl.zeros([ROWS, BINS], tl.float32)
    for l in range(n3):
        cos, sin = unit_root((k * l) % n3, n3)
        other_sin = tl.where(imag, sin, -sin)
        for j0 in range(start, tl.minimum(start + SPAN, n2), COLS):
            j = (j0 + tl.arange(0, COLS)).to(tl.int64)
            mask = (i < n1)[:, None] & (j < n2)[None, :]
            at = (l * n1 + i)[:, None] * n2 + j[None, :]
            g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            mask = used[None, :] & (j < n2)[:, None]
            at = (p * rank + part).to(tl.int64)[None, :] * n2 + j[:, None]
            own = tl.load(horizontal_ptr + at, mask=mask, other=0.0).to(tl.float32)
            mask = mask & is_pair[None, :]
            at = (partner * rank + part).to(tl.int64)[None, :] * n2 + j[:, None]
            other = tl.load(horizontal_ptr + at, mask=mask, other=0.0).to(tl.float32)
            right = cos[None, :] * own + other_sin[None, :] * other
            y = dot(g, right, y, PRECISION)
    at = (tl.program_id(2).to(tl.int64) * n1 + i)[:, None] * (n3 * RANKS) + c[None, :]
    tl.store(y_ptr + at, y, mask=(i < n1)[:, None] & (p < n3)[None, :])


@triton.jit
def _horizontal(horizontal_ptr, plane, used, j, c, n2, rank):
    """Loads R̂ᵀ of some planes, [planes, columns, parts]. Planes that are not ``used`` are zero."""
    at = (plane[:, None] * rank + c[None, :]).to(tl.int64)[:, None, :] * n2 + j[None, :, None]
    mask = (used[:, None] & (c < rank)[None, :])[:, None, :] & (j < n2)[None, :, None]
    return tl.load(horizontal_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _folded_kernel(
    grad_ptr,  # as in `_direct_kernel`
    horizontal_ptr,
    y_ptr,
    n1, n2, n3, rank,
    ROWS: tl.constexpr, COLS: tl.constexpr, SPAN: tl.constexpr, RANKS: tl.constexpr,
    PARTS: tl.constexpr, BINS: tl.constexpr, SLICES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes PARTS columns of conj(Y_k) of BINS bins, for one span.

    The bins start at bin 1. The programs of the first bins also compute bin 0.
    """
    rank_tiles: tl.constexpr = RANKS // PARTS
    half = n3 // 2
    k = 1 + tl.program_id(0) // rank_tiles * BINS + tl.arange(0, BINS)
    c = tl.program_id(0) % rank_tiles * PARTS + tl.arange(0, PARTS)
    i = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    start = tl.program_id(2) * SPAN
    y_re = tl.zeros([BINS, ROWS, PARTS], tl.float32)
    y_im = tl.zeros([BINS, ROWS, PARTS], tl.float32)  # -Im Y
    y_zero = tl.zeros([ROWS, PARTS], tl.float32)
    for j0 in range(start, tl.minimum(start + SPAN, n2), COLS):
        j = (j0 + tl.arange(0, COLS)).to(tl.int64)
        inside = (i < n1)[:, None] & (j < n2)[None, :]
        re = tl.zeros([BINS, ROWS * COLS], tl.float32)
        im = tl.zeros([BINS, ROWS * COLS], tl.float32)  # -Im of the transform
        total = tl.zeros([SLICES, ROWS, COLS], tl.float32)
        for l0 in range(0, half + 1, SLICES):
            l = l0 + tl.arange(0, SLICES)
            within = i[None, :, None] * n2 + j[None, None, :]
            at = (l.to(tl.int64) * n1 * n2)[:, None, None] + within
            mask = (l <= half)[:, None, None] & inside[None, :, :]
            near = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            paired = (l > 0) & (2 * l < n3)  # slices 0 and n3/2 are their own mirror images
            at = ((n3 - l).to(tl.int64) * n1 * n2)[:, None, None] + within
            mask = paired[:, None, None] & inside[None, :, :]
            far = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            total += near + far
            cos, sin = unit_root((k[:, None] * l[None, :]) % n3, n3)
            even = tl.reshape(near + far, [SLICES, ROWS * COLS])
            odd = tl.reshape(near - far, [SLICES, ROWS * COLS])
            re = dot(cos, even, re, PRECISION)
            im = dot(sin, odd, im, PRECISION)
        g_re = tl.reshape(re, [BINS, ROWS, COLS])
        g_im = tl.reshape(im, [BINS, ROWS, COLS])
        # Y = (g_re - i g_im)(r_re - i r_im), so Re Y = g_re r_re - g_im r_im and
        # -Im Y = g_re r_im + g_im r_re.
        r_re = _horizontal(horizontal_ptr, 2 * k - 1, k <= half, j, c, n2, rank)
        y_re = dot(g_re, r_re, y_re, PRECISION)
        y_im = dot(g_im, r_re, y_im, PRECISION)
        r_im = _horizontal(horizontal_ptr, 2 * k, 2 * k < n3, j, c, n2, rank)
        y_re = dot(-g_im, r_im, y_re, PRECISION)
        y_im = dot(g_re, r_im, y_im, PRECISION)
        mask = (j < n2)[:, None] & (c < rank)[None, :]
        r_at = c.to(tl.int64)[None, :] * n2 + j[:, None]
        r_zero = tl.load(horizontal_ptr + r_at, mask=mask, other=0.0)
        y_zero = dot(tl.sum(total, axis=0), r_zero, y_zero, PRECISION)
    at = (tl.program_id(2).to(tl.int64) * n1 + i)[:, None] * (n3 * RANKS) + c[None, :]
    rows = (i < n1)[:, None]
    if tl.program_id(0) < rank_tiles:
        tl.store(y_ptr + at, y_zero, mask=rows)
    at = at[None, :, :] + ((2 * k - 1) * RANKS)[:, None, None]
    tl.store(y_ptr + at, y_re, mask=rows[None, :, :] & (k <= half)[:, None, None])
    tl.store(y_ptr + at + RANKS, y_im, mask=rows[None, :, :] & (2 * k < n3)[:, None, None])


_FORMS = {"direct": _direct_kernel, "folded": _folded_kernel}


def run(a: CoreGradDense, precision: str) -> Tensor:
    """Launches the kernels and returns the gradient of the core, [n3, r, r] in fp32.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit.
    """
    grad, lateral_hat, horizontal_hat = a[:3]
    n3, n1, n2 = grad.shape
    rank = lateral_hat.shape[1] // n3
    check_factors(lateral_hat, horizontal_hat, n3, rank, None)
    expect("grad", grad, [n3, lateral_hat.shape[0], horizontal_hat.shape[1]])
    arch = launch.arch_of(grad.device)
    exact, precision = launch.dot_precisions(arch, precision, lateral_hat.dtype)
    # Ranks are columns of a product here. Their number may be 8, which an inner size may not be.
    parts = launch.PART if rank <= launch.PART else launch.PARTS
    ranks = launch.padded(rank, parts)
    chosen = launch.row("core_grad_dense", arch, n3)
    bins = chosen.bins
    if chosen.form == "direct":
        programs = triton.cdiv(n3 * ranks, bins)
    else:
        if ranks > launch.PART:
            bins //= 2  # wider accumulators leave registers for half the bins
        programs = max(1, triton.cdiv(n3 // 2, bins)) * (ranks // parts)
    spans = triton.cdiv(n2, chosen.span)
    y = lateral_hat.new_empty(spans * n1, n3 * ranks, dtype=torch.float32)
    wrap_triton(_FORMS[chosen.form])[(programs, triton.cdiv(n1, chosen.rows), spans)](
        grad.contiguous(), horizontal_hat.contiguous(), y, n1, n2, n3, rank,
        ROWS=chosen.rows, COLS=chosen.cols, SPAN=chosen.span, RANKS=ranks, PARTS=parts,
        BINS=bins, SLICES=chosen.slices, PRECISION=precision,
        num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    left = lateral_hat.contiguous()
    return core_gradient(left, y, n3, rank, 0, 1, arch, exact)
