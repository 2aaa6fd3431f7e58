"""``materialize`` in Triton: computes W_eff in one pass over the weights of all slices.

Slice l of W_eff is W_l + Σ_k Re(e^{2 pi i k l / n3} P_k R̂_k) with P_k = scale w_k / n3 Ĉ_k Û_k. The
sum is over the n3 // 2 + 1 bins k. The weight w_k is 2 if bin k stands for the pair k and n3 - k,
and 1 for a real bin. A small kernel makes P first. Then every program owns a tile of rows and
columns, and only the result leaves it. It first computes A_k + i B_k = P_k R̂_k for some bins:

    A_k = [Re P, -Im P] [Re R̂; Im R̂]    B_k = [Im P, Re P] [Re R̂; Im R̂]

These products have an inner size of 2r, so a rank of 8 fills the 16 that a product takes at least.
Then the program multiplies A and B by the matrix of the inverse DFT. At the end, it adds the base
weights and rounds once. Each base weight is read once, and each number of W_eff is written once.

The table of `launch` chooses one of three forms by n3:

- ``direct``: for a few slices. A program computes a tile of one slice as one product of inner size
  q = n3 r. The phases multiply P.
- ``dense``: n3 is padded to the tile. The transform is one product with the whole matrix.
- ``folded``: x_l = E_l - O_l and x_{n3-l} = E_l + O_l, where E sums the cosines and O the sines.
  Together they have half the multiplications. If n3 is a power of two, the bins fill the tiles,
  because bin 0 is computed apart. For the same reason, slice n3/2 may be computed apart.

In the last two, a program computes all slices of its tile, or some of them if tubes are long.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import MaterializeOut
from ..factors import check_floating
from . import launch
from .contract import check_factors, expect
from .launch import wrap_triton
from .spectra import dot, unit_root


@triton.jit
def _mix_kernel(
    lateral_ptr,  # [n1, q]
    core_ptr,  # [n3, r, r]
    mixed_ptr,  # [n3, n1, RANKS] out: planes of P, with columns of zeros from the rank on
    roots_ptr,  # [2, K, n3] out: cos and sin of 2 pi k l / n3
    n1, n3, rank, scale,
    ROWS: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes P_k of one bin for a block of rows, and the cosines and sines of that bin."""
    k = tl.program_id(0)
    is_pair = (k > 0) & (2 * k < n3)
    re = tl.where(k > 0, 2 * k - 1, 0)
    im_rank = tl.where(is_pair, rank, 0)  # a real bin has no imaginary part
    weight = tl.where(is_pair, 2.0, 1.0) * scale / n3
    i = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    part = tl.arange(0, PARTS)
    for b0 in range(0, RANKS, PARTS):
        b = b0 + part
        p_re = tl.zeros([ROWS, PARTS], tl.float32)
        p_im = tl.zeros([ROWS, PARTS], tl.float32)
        for a0 in range(0, rank, PARTS):
            a = a0 + part
            inside = (a < rank)[:, None] & (b < rank)[None, :]
            u_re = tl.zeros([PARTS, PARTS], tl.float32)
            u_im = tl.zeros([PARTS, PARTS], tl.float32)
            for l0 in range(0, n3, SLICES):
                l = l0 + tl.arange(0, SLICES)
                cos, sin = unit_root((k * l) % n3, n3)
                at = (l[:, None, None] * rank + a[None, :, None]) * rank + b[None, None, :]
                mask = (l < n3)[:, None, None] & inside[None, :, :]
                u = tl.load(core_ptr + at, mask=mask, other=0.0)
                u_re += tl.sum(u * cos[:, None, None], axis=0)
                u_im -= tl.sum(u * sin[:, None, None], axis=0)
            at = i[:, None] * (n3 * rank) + re * rank + a[None, :]
            mask = (i < n1)[:, None] & (a < rank)[None, :]
            c_re = tl.load(lateral_ptr + at, mask=mask, other=0.0).to(tl.float32)
            mask = (i < n1)[:, None] & (a < im_rank)[None, :]
            c_im = tl.load(lateral_ptr + at + rank, mask=mask, other=0.0).to(tl.float32)
            p_re = dot(c_re, u_re, p_re, PRECISION)
            p_re = dot(-c_im, u_im, p_re, PRECISION)
            p_im = dot(c_re, u_im, p_im, PRECISION)
            p_im = dot(c_im, u_re, p_im, PRECISION)
        at = (re * n1 + i[:, None]) * RANKS + b[None, :]
        padded = (b < RANKS)[None, :]
        tl.store(mixed_ptr + at, weight * p_re, mask=(i < n1)[:, None] & padded)
        rows = tl.where(is_pair, n1, 0)
        mask = (i < rows)[:, None] & padded
        tl.store(mixed_ptr + at + n1 * RANKS, weight * p_im, mask=mask)
    if tl.program_id(1) == 0:
        bins = n3 // 2 + 1
        for l0 in range(0, n3, SLICES):
            l = l0 + tl.arange(0, SLICES)
            cos, sin = unit_root((k * l) % n3, n3)
            tl.store(roots_ptr + k * n3 + l, cos, mask=l < n3)
            tl.store(roots_ptr + (bins + k) * n3 + l, sin, mask=l < n3)


@triton.jit
def _left(
    mixed_ptr, plane, step, used, is_pair, i, c0, n1, RANKS: tl.constexpr, PARTS: tl.constexpr
):
    """Loads columns of P, half of them from ``plane``, half from ``plane + step``.

    They are [planes, rows, PARTS]. The second half is zero if not ``is_pair``, all if not ``used``.
    """
    half: tl.constexpr = PARTS // 2
    which = tl.arange(0, PARTS) // half
    c = c0 + tl.arange(0, PARTS) % half
    at = (plane[:, None] + step * which[None, :]).to(tl.int64) * n1
    at = (at[:, None, :] + i[None, :, None]) * RANKS + c[None, None, :]
    mask = (used[:, None] & (is_pair[:, None] | (which == 0)[None, :]))[:, None, :]
    return tl.load(mixed_ptr + at, mask=mask & (i < n1)[None, :, None], other=0.0)


@triton.jit
def _right(horizontal_ptr, plane, used, is_pair, c0, j, n2, rank, PARTS: tl.constexpr):
    """Loads rows of R̂, [planes, PARTS, columns], half of ``plane``, half of ``plane + 1``."""
    half: tl.constexpr = PARTS // 2
    which = tl.arange(0, PARTS) // half
    c = c0 + tl.arange(0, PARTS) % half
    at = ((plane[:, None] + which[None, :]) * rank + c[None, :]).to(tl.int64) * n2
    mask = used[:, None] & (is_pair[:, None] | (which == 0)[None, :]) & (c < rank)[None, :]
    mask = mask[:, :, None] & (j < n2)[None, None, :]
    at = at[:, :, None] + j[None, None, :]
    return tl.load(horizontal_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _finish(
    base_ptr, places_ptr, out_ptr, update, l, mask, i, j, n1, n2, n3,
    ROWS: tl.constexpr, COLS: tl.constexpr, BASE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Adds the base to ``update`` [slices, ROWS * COLS] and writes slices ``l`` of W_eff."""
    slices: tl.constexpr = update.shape[0]
    value = tl.reshape(update, [slices, ROWS, COLS])
    inside = mask[:, None, None] & (i < n1)[None, :, None] & (j < n2)[None, None, :]
    if BASE == "beside":
        stride = tl.load(places_ptr + 2 * n3 + l, mask=mask, other=0) * n2
        within = i[None, :, None] * stride[:, None, None] + j[None, None, :]
    else:
        within = i[None, :, None] * n2 + j[None, None, :]
    if BASE != "none":
        if BASE == "stack":
            place = l.to(tl.int64) * n1 * n2
        else:
            place = tl.multiple_of(tl.load(places_ptr + l, mask=mask, other=0), ALIGNED)
        w = tl.load(base_ptr + (place[:, None, None] + within), mask=inside, other=0.0)
        value += w.to(tl.float32)
    if BASE == "beside":  # loaded after the base: gfx942 lacks the registers to hold both places
        first = tl.load(places_ptr + n3 + l, mask=mask, other=0) * n2
    else:
        first = l.to(tl.int64) * n1 * n2
    at = first[:, None, None] + within
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dense_kernel(
    base_ptr,  # [n3, n1, n2], or the first of the layers' weights [n1, n2]
    places_ptr,  # [n3] int64, for separate layers: distance of each slice from the first, in
    # elements, each a multiple of ALIGNED; for BASE "beside" see `_places_beside`
    mixed_ptr,  # [n3, n1, RANKS]: planes of P
    horizontal_ptr,  # [q, n2]
    roots_ptr,  # [2, K, n3]: cosines and sines
    out_ptr,  # [n3, n1, n2], or the matrices of W_eff one after the other
    n1, n2, n3, rank,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr,
    BINS: tl.constexpr, SLICES: tl.constexpr,
    BASE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    col_blocks = tl.cdiv(n2, COLS)
    i = (tl.program_id(0) // col_blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = (tl.program_id(0) % col_blocks * COLS + tl.arange(0, COLS)).to(tl.int64)
    l = tl.program_id(1) * SLICES + tl.arange(0, SLICES)
    first_half = tl.arange(0, PARTS) < PARTS // 2
    update = tl.zeros([SLICES, ROWS * COLS], tl.float32)
    for p0 in range(0, n3, BINS):  # BINS planes: a pair has two
        p = p0 + tl.arange(0, BINS)
        k = (p + 1) // 2
        is_pair = (k > 0) & (2 * k < n3)
        imag = (p % 2 == 0) & is_pair
        re_plane = tl.where(imag, p - 1, p)
        to_partner = tl.where(imag, -1, 1)[:, None]
        sign = tl.where(first_half[None, :] | imag[:, None], 1.0, -1.0)[:, None, :]
        planes = tl.zeros([BINS, ROWS, COLS], tl.float32)
        for c0 in range(0, RANKS, PARTS // 2):
            # A = Re P Re R̂ - Im P Im R̂, and B = Im P Re R̂ + Re P Im R̂.
            left = _left(mixed_ptr, p, to_partner, p < n3, is_pair, i, c0, n1, RANKS, PARTS)
            right = _right(horizontal_ptr, re_plane, p < n3, is_pair, c0, j, n2, rank, PARTS)
            planes = dot(left * sign, right, planes, PRECISION)
        inside = (l < n3)[:, None] & (p < n3)[None, :]
        at = tl.where(imag, n3 // 2 + 1, 0) + k
        table = tl.load(roots_ptr + at[None, :] * n3 + l[:, None], mask=inside, other=0.0)
        table = tl.where(imag[None, :], -table, table)
        update = dot(table, tl.reshape(planes, [BINS, ROWS * COLS]), update, PRECISION)
    _finish(
        base_ptr, places_ptr, out_ptr, update, l, l < n3, i, j, n1, n2, n3, ROWS, COLS, BASE,
        ALIGNED,
    )  # fmt: skip


@triton.jit
def _folded_kernel(
    base_ptr,  # as in `_dense_kernel`
    places_ptr,
    mixed_ptr,
    horizontal_ptr,
    roots_ptr,
    out_ptr,
    n1, n2, n3, rank,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr,
    BINS: tl.constexpr, SLICES: tl.constexpr,
    BASE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, MIDDLE: tl.constexpr,
):  # fmt: skip
    col_blocks = tl.cdiv(n2, COLS)
    i = (tl.program_id(0) // col_blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = (tl.program_id(0) % col_blocks * COLS + tl.arange(0, COLS)).to(tl.int64)
    l = tl.program_id(1) * SLICES + tl.arange(0, SLICES)  # and slices n3 - l
    half = n3 // 2
    # l goes from 0 to last. If MIDDLE, slice n3/2, its own mirror image, is computed apart.
    last = (n3 - 1) // 2 if MIDDLE else half
    sign = tl.where(tl.arange(0, PARTS) < PARTS // 2, 1.0, -1.0)
    constant = tl.zeros([ROWS, COLS], tl.float32)  # bin 0
    for c0 in range(0, RANKS, PARTS):
        c = c0 + tl.arange(0, PARTS)
        mask = (i < n1)[:, None] & (c < RANKS)[None, :]
        left = tl.load(mixed_ptr + i[:, None] * RANKS + c[None, :], mask=mask, other=0.0)
        mask = (c < rank)[:, None] & (j < n2)[None, :]
        at = c.to(tl.int64)[:, None] * n2 + j[None, :]
        right = tl.load(horizontal_ptr + at, mask=mask, other=0.0).to(tl.float32)
        constant = dot(left, right, constant, PRECISION)
    even = tl.broadcast_to(tl.reshape(constant, [1, ROWS * COLS]), [SLICES, ROWS * COLS])
    odd = tl.zeros([SLICES, ROWS * COLS], tl.float32)
    if MIDDLE:
        middle = constant
    for k0 in range(1, half + 1, BINS):
        k = k0 + tl.arange(0, BINS)
        is_pair = 2 * k < n3
        re = tl.zeros([BINS, ROWS, COLS], tl.float32)
        im = tl.zeros([BINS, ROWS, COLS], tl.float32)
        for c0 in range(0, RANKS, PARTS // 2):
            right = _right(horizontal_ptr, 2 * k - 1, k <= half, is_pair, c0, j, n2, rank, PARTS)
            left = _left(mixed_ptr, 2 * k - 1, 1, k <= half, is_pair, i, c0, n1, RANKS, PARTS)
            re = dot(left * sign[None, None, :], right, re, PRECISION)
            left = _left(mixed_ptr, 2 * k, -1, is_pair, is_pair, i, c0, n1, RANKS, PARTS)
            im = dot(left, right, im, PRECISION)
        if MIDDLE:  # in slice n3/2 every cosine is 1 or -1, and every sine is 0
            middle += tl.sum(re * tl.where(k % 2 == 0, 1.0, -1.0)[:, None, None], axis=0)
        re_planes = tl.reshape(re, [BINS, ROWS * COLS])
        im_planes = tl.reshape(im, [BINS, ROWS * COLS])
        inside = (l <= last)[:, None] & (k <= half)[None, :]
        at = roots_ptr + k[None, :] * n3 + l[:, None]
        cos = tl.load(at, mask=inside, other=0.0)
        sin = tl.load(at + (half + 1) * n3, mask=inside, other=0.0)
        even = dot(cos, re_planes, even, PRECISION)
        odd = dot(sin, im_planes, odd, PRECISION)
    _finish(
        base_ptr, places_ptr, out_ptr, even - odd, l, l <= last, i, j, n1, n2, n3, ROWS, COLS,
        BASE, ALIGNED,
    )  # fmt: skip
    paired = (l > 0) & (2 * l < n3)  # slices 0 and n3/2 are their own mirror images
    _finish(
        base_ptr, places_ptr, out_ptr, even + odd, n3 - l, paired, i, j, n1, n2, n3,
        ROWS, COLS, BASE, ALIGNED,
    )  # fmt: skip
    if MIDDLE:
        l_middle = half + tl.arange(0, 1)
        mask = l_middle < tl.where(tl.program_id(1) == 0, n3, 0)
        _finish(
            base_ptr, places_ptr, out_ptr, tl.reshape(middle, [1, ROWS * COLS]), l_middle, mask,
            i, j, n1, n2, n3, ROWS, COLS, BASE, ALIGNED,
        )  # fmt: skip


@triton.jit
def _direct_kernel(
    base_ptr,  # as in `_dense_kernel`
    places_ptr,
    mixed_ptr,
    horizontal_ptr,
    roots_ptr,
    out_ptr,
    n1, n2, n3, rank,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr,
    BINS: tl.constexpr, SLICES: tl.constexpr,
    BASE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes a tile of one slice l: the base plus one product of inner size q with R̂."""
    col_blocks = tl.cdiv(n2, COLS)
    i = (tl.program_id(0) // col_blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = (tl.program_id(0) % col_blocks * COLS + tl.arange(0, COLS)).to(tl.int64)
    l = tl.program_id(1)
    update = tl.zeros([ROWS, COLS], tl.float32)
    for c0 in range(0, n3 * RANKS, PARTS):
        # Re(e P) for planes of real parts, -Im(e P) for imaginary ones; e = e^{2 pi i k l / n3}.
        p = (c0 + tl.arange(0, PARTS)) // RANKS
        c = (c0 + tl.arange(0, PARTS)) % RANKS
        k = (p + 1) // 2
        imag = (p > 0) & (p % 2 == 0)
        partner = tl.where(2 * k < n3, tl.where(imag, p - 1, tl.where(p > 0, p + 1, p)), p)
        cos = tl.load(roots_ptr + k * n3 + l, mask=p < n3, other=0.0)
        sin = tl.load(roots_ptr + (n3 // 2 + 1 + k) * n3 + l, mask=p < n3, other=0.0)
        mask = (i < n1)[:, None] & (p < n3)[None, :]
        own_at = (p[None, :] * n1 + i[:, None]) * RANKS + c[None, :]
        own = tl.load(mixed_ptr + own_at, mask=mask, other=0.0)
        other_at = (partner[None, :] * n1 + i[:, None]) * RANKS + c[None, :]
        other = tl.load(mixed_ptr + other_at, mask=mask, other=0.0)
        left = tl.where(imag, -cos, cos)[None, :] * own - sin[None, :] * other
        mask = ((p < n3) & (c < rank))[:, None] & (j < n2)[None, :]
        at = (p * rank + c).to(tl.int64)[:, None] * n2 + j[None, :]
        right = tl.load(horizontal_ptr + at, mask=mask, other=0.0).to(tl.float32)
        update = dot(left, right, update, PRECISION)
    slices = l + tl.arange(0, 1)
    _finish(
        base_ptr, places_ptr, out_ptr, tl.reshape(update, [1, ROWS * COLS]), slices, slices < n3,
        i, j, n1, n2, n3, ROWS, COLS, BASE, ALIGNED,
    )  # fmt: skip


_FORMS = {"direct": _direct_kernel, "dense": _dense_kernel, "folded": _folded_kernel}


class _Base(NamedTuple):
    """The base weights, as the kernels take them."""

    tensor: Tensor  # the stack, or the first layer's weight
    places: Tensor  # of slices in separate layers, see `_table`
    # "stack", one tensor; "layers", a matrix for each slice; "beside", some hold several slices
    kind: str = "none"
    aligned: int = 1  # every place is a multiple of it, so a thread can load that many at once


def run(a: MaterializeOut, precision: str) -> None:
    """Launches the kernels, which write W_eff to ``out``, a contiguous tensor.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit.
        RuntimeError: a table would have to be copied in a capture, see `_table`.
    """
    n3, _, rank = a.core.shape
    n1, n2 = a.lateral_hat.shape[0], a.horizontal_hat.shape[1]
    counts = _counts_of(a)
    arch = launch.arch_of(a.core.device)
    exact, precision = launch.dot_precisions(arch, precision, a.lateral_hat.dtype)
    ranks = launch.padded(rank, launch.PART)
    mixed = a.core.new_empty(n3, n1, ranks)
    roots = a.core.new_empty(2, n3 // 2 + 1, n3)
    mix = launch.row("mix", arch, n3)
    wrap_triton(_mix_kernel)[(n3 // 2 + 1, triton.cdiv(n1, mix.rows))](
        a.lateral_hat.contiguous(), a.core.contiguous(), mixed, roots, n1, n3, rank, a.scale,
        ROWS=mix.rows, RANKS=ranks, PARTS=launch.PARTS, SLICES=mix.slices, PRECISION=exact,
        num_warps=mix.warps, num_stages=mix.stages,
    )  # fmt: skip
    base = _Base(mixed, mixed)
    if len(a.weights) > 0:
        base = _base_of(a.weights, counts, n1, n2, mixed)
    chosen = launch.row("materialize", arch, n3)
    kernel = _FORMS[chosen.form]
    tiles = triton.cdiv(n1, chosen.rows) * triton.cdiv(n2, chosen.cols)
    count, extra = n3, {}
    if chosen.form == "folded":
        # Slice n3/2 of an even n3 has no partner. If the tiles are full without it, the first one
        # computes it apart. Larger ranks leave no registers for that, so they take one more tile.
        count = (n3 + 1) // 2
        is_beside = bool(n3 % 2 == 0 and count % chosen.slices == 0 and ranks <= launch.PARTS)
        count = count if is_beside else n3 // 2 + 1
        extra = {"MIDDLE": is_beside}
    wrap_triton(kernel)[(tiles, triton.cdiv(count, chosen.slices))](
        base.tensor, base.places, mixed, a.horizontal_hat.contiguous(), roots, a.out,
        n1, n2, n3, rank,
        ROWS=chosen.rows, COLS=chosen.cols, RANKS=ranks, PARTS=launch.PARTS,
        BINS=chosen.bins, SLICES=chosen.slices, BASE=base.kind, ALIGNED=base.aligned,
        PRECISION=precision, **extra, num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip


def _counts_of(a: MaterializeOut) -> list[int]:
    """Checks shapes and dtypes; returns how many slices each weight holds, or [1] for a stack."""
    n3, _, rank = a.core.shape
    n1, n2 = a.lateral_hat.shape[0], a.horizontal_hat.shape[1]
    check_factors(a.lateral_hat, a.horizontal_hat, n3, rank, a.core)
    layers = len(a.weights) > 0 and a.weights[0].ndim == 2
    counts = [max(1, weight.shape[-1] // max(1, n2)) if layers else 1 for weight in a.weights]
    if len(a.weights) > 0 and sum(counts) != (n3 if layers else 1):
        raise ValueError(f"weights: expected {n3 if layers else 1}, got {sum(counts)}")
    is_flat = layers and len(counts) < n3
    expect("out", a.out, [n3 * n1 * n2] if is_flat else [n3, n1, n2])
    check_floating("out", a.out)
    for weight, count in zip(a.weights, counts, strict=True):
        expect("weights", weight, [n1, count * n2] if layers else [n3, n1, n2])
        if weight.dtype != a.weights[0].dtype:
            raise TypeError(f"weights: expected {a.weights[0].dtype}, got {weight.dtype}")
        check_floating("weights", weight)
    return counts


def _base_of(
    weights: Sequence[Tensor], counts: Sequence[int], n1: int, n2: int, unused: Tensor
) -> _Base:
    layers, beside = weights[0].ndim == 2, len(counts) < sum(counts)
    if layers and not all(weight.is_contiguous() for weight in weights):
        # Kernels read contiguous weights, so these must be copied. Within one tensor the distances
        # are the same in every call, so `_table` does not keep a table for every copy.
        if beside:
            copy = torch.cat([weight.flatten() for weight in weights])
            parts = copy.split([weight.numel() for weight in weights])
            weights = [part.view(n1, -1) for part in parts]
        else:
            weights, layers = [torch.stack(list(weights))], False
    base = weights[0].contiguous()
    if not layers:
        return _Base(base, unused, "stack")
    addresses = [weight.data_ptr() for weight in weights]
    size = base.element_size()
    distances = tuple((address - addresses[0]) // size for address in addresses)
    aligned = 16 // size if all(address % 16 == 0 for address in addresses) else 1
    if not beside:
        return _Base(base, _table(distances, base.device), "layers", aligned)
    places = _places_beside(distances, counts, n1, n2)
    return _Base(base, _table(places, base.device), "beside", math.gcd(aligned, n2))


def _places_beside(
    distances: Sequence[int], counts: Sequence[int], n1: int, n2: int
) -> tuple[int, ...]:
    """Returns where each slice lies, for layers that hold ``counts`` slices side by side.

    The result is three rows of n3 numbers. The first is the distance of each slice from the first
    layer's weight, in elements. The second is where the slice begins in W_eff, in units of n2. The
    third is how many slices its layer holds, which is the distance of its rows, in units of n2.
    """
    places: list[tuple[int, int, int]] = []
    for distance, count in zip(distances, counts, strict=True):
        matrix = len(places) * n1
        places += [(distance + s * n2, matrix + s, count) for s in range(count)]
    return tuple(itertools.chain(*zip(*places, strict=True)))


@cache
def _table(places: tuple[int, ...], device: torch.device) -> Tensor:
    """Copies `_places_beside`, or distances alone, to the device as int64, and keeps the copy.

    The copy depends on these numbers alone, so it never becomes wrong. It is never freed, because a
    captured graph may read it as long as the process lives. It takes 8 bytes a number, once for
    each set of weights that stays where it is.

    Raises:
        RuntimeError: the copy would have to be made while a CUDA graph is captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "weights: expected layers whose addresses are on the device already, as after one call "
            "before the capture of a CUDA graph, got layers that are seen in a capture first"
        )
    return torch.tensor(places, dtype=torch.int64, device=device)
