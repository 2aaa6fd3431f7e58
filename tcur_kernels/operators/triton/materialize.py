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

from dataclasses import replace

import triton
import triton.language as tl

from ..contract import MaterializeOut
from . import launch
from .contract import check_factors, expect
from .launch import wrap_triton
from .mix import mixed
from .places import Base, base_of
from .spectra import dot, split_dot


@triton.jit
def _left(
    mixed_ptr,
    plane,
    step,
    used,
    is_pair,
    i,
    c0,
    n1,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Loads columns of P, half of them from ``plane``, half from ``plane + step``.

    They are [planes, rows, PARTS]. The second half is zero if not ``is_pair``, all if not ``used``.
    """
    half: tl.constexpr = PARTS // 2
    which = tl.arange(0, PARTS) // half
    c = c0 + tl.arange(0, PARTS) % half
    at = (plane[:, None] + step * which[None, :]) * (n1 * RANKS) + c[None, :]
    at = at[:, None, :] + i[None, :, None] * RANKS
    mask = (used[:, None] & (is_pair[:, None] | (which == 0)[None, :]))[:, None, :]
    return tl.load(mixed_ptr + at, mask=mask, other=0.0)


@triton.jit
def _right(horizontal_ptr, plane, used, is_pair, c0, j, in_cols, n2, rank, PARTS: tl.constexpr):
    """Loads rows of R̂, [planes, PARTS, columns], half of ``plane``, half of ``plane + 1``."""
    half: tl.constexpr = PARTS // 2
    which = tl.arange(0, PARTS) // half
    c = c0 + tl.arange(0, PARTS) % half
    at = ((plane[:, None] + which[None, :]) * rank + c[None, :]) * n2
    mask = used[:, None] & (is_pair[:, None] | (which == 0)[None, :]) & (c < rank)[None, :]
    mask = mask[:, :, None] & in_cols[None, None, :]
    at = at[:, :, None] + j[None, None, :]
    return tl.load(horizontal_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _finish(
    base_ptr, places_ptr, out_ptr, value, l, mask, i0, j0, n1, n2, n3,
    BASE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Adds the base to ``value`` [slices, rows, columns] and writes slices ``l`` of W_eff."""
    i = tl.arange(0, value.shape[1])
    j = tl.arange(0, value.shape[2])
    inside = (i < n1 - i0)[:, None] & (j < n2 - j0)[None, :]
    inside = mask[:, None, None] & inside[None, :, :]
    if BASE == "beside":
        stride = tl.load(places_ptr + 2 * n3 + l, mask=mask, other=0) * n2
        corner = i0 * stride + j0
        within = i[None, :, None] * stride.to(tl.int32)[:, None, None] + j[None, None, :]
    else:
        corner = tl.cast(i0, tl.int64) * n2 + j0
        within = (i[:, None] * n2 + j[None, :])[None, :, :]
    if BASE != "none":
        if BASE == "stack":
            place = l * (tl.cast(n1, tl.int64) * n2)
        else:
            place = tl.multiple_of(tl.load(places_ptr + l, mask=mask, other=0), ALIGNED)
        at = (place + corner)[:, None, None] + within
        value += tl.load(base_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if BASE == "beside":  # loaded after the base: gfx942 lacks the registers to hold both places
        first = tl.load(places_ptr + n3 + l, mask=mask, other=0) * n2
    else:
        first = l * (tl.cast(n1, tl.int64) * n2)
    at = (first + corner)[:, None, None] + within
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _turned(roots_ptr, at, size, planes, acc, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """Adds roots times planes. SPLIT: the product is of split numbers, and so are the roots."""
    if SPLIT:
        lead = tl.load(roots_ptr + 2 * size + at)
        rest = tl.load(roots_ptr + 4 * size + at)
        acc = split_dot(lead, rest, planes, acc)
    else:
        acc = dot(tl.load(roots_ptr + at), planes, acc, PRECISION)
    return acc


@triton.jit
def _dense_kernel(
    base_ptr,  # [n3, n1, n2], or the first of the layers' weights [n1, n2]
    places_ptr,  # [n3] int64, for separate layers: distance of each slice from the first, in
    # elements, each a multiple of ALIGNED; for BASE "beside" see `places`
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
    i0 = tl.program_id(0) // col_blocks * ROWS
    j0 = tl.program_id(0) % col_blocks * COLS
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLS)
    in_cols = j < n2 - j0
    mixed_ptr += i0.to(tl.int64) * RANKS
    horizontal_ptr += j0
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
            right = _right(
                horizontal_ptr, re_plane, p < n3, is_pair, c0, j, in_cols, n2, rank, PARTS
            )
            planes = dot(left * sign, right, planes, PRECISION)
        inside = (l < n3)[:, None] & (p < n3)[None, :]
        at = tl.where(imag, n3 // 2 + 1, 0) + k
        table = tl.load(roots_ptr + at[None, :] * n3 + l[:, None], mask=inside, other=0.0)
        table = tl.where(imag[None, :], -table, table)
        update = dot(table, tl.reshape(planes, [BINS, ROWS * COLS]), update, PRECISION)
    _finish(
        base_ptr, places_ptr, out_ptr, tl.reshape(update, [SLICES, ROWS, COLS]), l, l < n3,
        i0, j0, n1, n2, n3, BASE, ALIGNED,
    )  # fmt: skip


@triton.jit
def _folded_tile(
    tile,  # counted from the top
    base_ptr, places_ptr, mixed_ptr, horizontal_ptr, roots_ptr, out_ptr, n1, n2, n3, rank,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr,
    BINS: tl.constexpr, SLICES: tl.constexpr,
    BASE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, MIDDLE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Computes one tile of some slices and of their mirror images."""
    col_blocks = tl.cdiv(n2, COLS)
    half = n3 // 2
    size = (half + 1) * n3
    # l goes from 0 to last. If MIDDLE, slice n3/2, its own mirror image, is computed apart.
    last = (n3 - 1) // 2 if MIDDLE else half
    i0 = tile * ROWS
    j0 = tl.program_id(0) % col_blocks * COLS
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLS)
    in_cols = j < n2 - j0
    left_ptr = mixed_ptr + tl.cast(i0, tl.int64) * RANKS
    right_ptr = horizontal_ptr + j0
    l = tl.program_id(1) * SLICES + tl.arange(0, SLICES)  # and slices n3 - l
    sign = tl.where(tl.arange(0, PARTS) < PARTS // 2, 1.0, -1.0)
    constant = tl.zeros([ROWS, COLS], tl.float32)  # bin 0
    for c0 in range(0, RANKS, PARTS):
        c = c0 + tl.arange(0, PARTS)
        mask = (c < RANKS)[None, :]
        left = tl.load(left_ptr + (i[:, None] * RANKS + c[None, :]), mask=mask, other=0.0)
        mask = (c < rank)[:, None] & in_cols[None, :]
        right = tl.load(right_ptr + (c[:, None] * n2 + j[None, :]), mask=mask, other=0.0)
        constant = dot(left, right.to(tl.float32), constant, PRECISION)
    even = tl.broadcast_to(tl.reshape(constant, [1, ROWS * COLS]), [SLICES, ROWS * COLS])
    odd = tl.zeros([SLICES, ROWS * COLS], tl.float32)
    if MIDDLE:
        middle = constant
    left_ptr += n1 * RANKS
    right_ptr += rank * n2
    plane = 2 * tl.arange(0, BINS)
    # Without a base the compiler keeps so much for this loop that it spills, too.
    for k0 in tl.range(1, half + 1, BINS, disable_licm=BASE == "none"):
        k = k0 + tl.arange(0, BINS)
        is_pair = 2 * k < n3
        re = tl.zeros([BINS, ROWS, COLS], tl.float32)
        im = tl.zeros([BINS, ROWS, COLS], tl.float32)
        for c0 in range(0, RANKS, PARTS // 2):
            used = k <= half
            right = _right(right_ptr, plane, used, is_pair, c0, j, in_cols, n2, rank, PARTS)
            left = _left(left_ptr, plane, 1, used, is_pair, i, c0, n1, RANKS, PARTS)
            re = dot(left * sign[None, None, :], right, re, PRECISION)
            left = _left(left_ptr, plane + 1, -1, is_pair, is_pair, i, c0, n1, RANKS, PARTS)
            im = dot(left, right, im, PRECISION)
        if MIDDLE:  # in slice n3/2 every cosine is 1 or -1, and every sine is 0
            middle += tl.sum(re * tl.where(k % 2 == 0, 1.0, -1.0)[:, None, None], axis=0)
        re_planes = tl.reshape(re, [BINS, ROWS * COLS])
        im_planes = tl.reshape(im, [BINS, ROWS * COLS])
        # Planes beyond the last bin are zero, and slices beyond the last are not written.
        at = tl.minimum(k, half)[None, :] * n3 + l[:, None]
        even = _turned(roots_ptr, at, size, re_planes, even, PRECISION, SPLIT)
        odd = _turned(roots_ptr + size, at, size, im_planes, odd, PRECISION, SPLIT)
        left_ptr += 2 * BINS * n1 * RANKS
        right_ptr += 2 * BINS * rank * n2
    _finish(
        base_ptr, places_ptr, out_ptr, tl.reshape(even - odd, [SLICES, ROWS, COLS]), l,
        l <= last, i0, j0, n1, n2, n3, BASE, ALIGNED,
    )  # fmt: skip
    paired = (l > 0) & (2 * l < n3)  # slices 0 and n3/2 are their own mirror images
    _finish(
        base_ptr, places_ptr, out_ptr, tl.reshape(even + odd, [SLICES, ROWS, COLS]), n3 - l,
        paired, i0, j0, n1, n2, n3, BASE, ALIGNED,
    )  # fmt: skip
    if MIDDLE:
        l_middle = half + tl.arange(0, 1)
        mask = l_middle < tl.where(tl.program_id(1) == 0, n3, 0)
        _finish(
            base_ptr, places_ptr, out_ptr, tl.reshape(middle, [1, ROWS, COLS]), l_middle, mask,
            i0, j0, n1, n2, n3, BASE, ALIGNED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["walk"])
def _folded_kernel(
    base_ptr,  # as in `_dense_kernel`
    places_ptr,
    mixed_ptr,
    horizontal_ptr,
    roots_ptr,
    out_ptr,
    n1, n2, n3, rank, walk,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr,
    BINS: tl.constexpr, SLICES: tl.constexpr,
    BASE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, MIDDLE: tl.constexpr,
    SPLIT: tl.constexpr, WALKS: tl.constexpr,
):  # fmt: skip
    """Computes ``walk`` tiles, one below the other; without WALKS just one.

    All of them need the same columns of R̂. They come from the second-level cache once, if the
    first-level cache holds them for the next tile. Nothing but ``walk`` is kept in registers from
    tile to tile: offsets that a compiler moves out of the loop would spill.
    """
    first = tl.program_id(0) // tl.cdiv(n2, COLS)
    if WALKS:
        for tile in tl.range(first * walk, first * walk + walk, disable_licm=True):
            _folded_tile(
                tile, base_ptr, places_ptr, mixed_ptr, horizontal_ptr, roots_ptr, out_ptr,
                n1, n2, n3, rank, ROWS, COLS, RANKS, PARTS, BINS, SLICES, BASE, ALIGNED, PRECISION,
                MIDDLE, SPLIT,
            )  # fmt: skip
    else:
        _folded_tile(
            first, base_ptr, places_ptr, mixed_ptr, horizontal_ptr, roots_ptr, out_ptr,
            n1, n2, n3, rank, ROWS, COLS, RANKS, PARTS, BINS, SLICES, BASE, ALIGNED, PRECISION,
            MIDDLE, SPLIT,
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
    i0 = tl.program_id(0) // col_blocks * ROWS
    j0 = tl.program_id(0) % col_blocks * COLS
    i = (i0 + tl.arange(0, ROWS)).to(tl.int64)
    j = (j0 + tl.arange(0, COLS)).to(tl.int64)
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
        base_ptr, places_ptr, out_ptr, update[None, :, :], slices, slices < n3,
        i0, j0, n1, n2, n3, BASE, ALIGNED,
    )  # fmt: skip


#: Programs that keep a device busy to the end: eight for each multiprocessor of an H100.
ENOUGH = 1024
_FORMS = {"direct": _direct_kernel, "dense": _dense_kernel, "folded": _folded_kernel}


def run(a: MaterializeOut, precision: str) -> None:
    """Launches the kernels, which write W_eff to ``out``, a contiguous tensor.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit.
        RuntimeError: a table would have to be copied in a capture, see `places`.
    """
    n3, _, rank = a.core.shape
    n1, n2 = a.lateral_hat.shape[0], a.horizontal_hat.shape[1]
    counts = _counts_of(a)
    arch = launch.arch_of(a.core.device)
    exact, precision = launch.dot_precisions(arch, precision, a.lateral_hat.dtype)
    chosen = launch.row("materialize", arch, n3)
    ranks = launch.padded(rank, launch.PART)
    if chosen.form != "direct" and max(n1, n2) * ranks * 2 * chosen.bins >= 1 << 31:
        # Offsets within the planes that a program loads at once are of 32 bits.
        most = (1 << 31) // (2 * chosen.bins)
        raise ValueError(f"core: expected r * n1 and r * n2 below {most}, got r = {rank}")
    # Above a rank of 8 the products leave too few registers to walk and to hold split roots.
    is_short = chosen.form == "folded" and ranks <= launch.PART
    is_split = is_short and precision == "3xtf32"
    planes, roots = mixed(a.lateral_hat, a.core, a.scale, arch, exact, is_split)
    base = Base(planes, planes)
    if len(a.weights) > 0:
        base = base_of(a.weights, counts, n1, n2, planes)
    kernel = _FORMS[chosen.form]
    if chosen.form == "folded" and arch == launch.NVIDIA[0] and ranks > launch.PARTS:
        chosen = replace(chosen, rows=32) if chosen.slices < 32 else replace(chosen, cols=8)
    col_blocks, tiles = triton.cdiv(n2, chosen.cols), triton.cdiv(n1, chosen.rows)
    count, extra = n3, {}
    walk: tuple[int, ...] = ()
    if chosen.form == "folded":
        # Slice n3/2 of an even n3 has no partner. If the tiles are full without it, the first one
        # computes it apart. Larger ranks leave no registers for that, so they take one more tile.
        count = (n3 + 1) // 2
        is_beside = bool(n3 % 2 == 0 and count % chosen.slices == 0 and ranks <= launch.PARTS)
        count = count if is_beside else n3 // 2 + 1
        walk = (_walk(col_blocks, tiles) if is_short else 1,)
        extra = {"MIDDLE": is_beside, "SPLIT": is_split, "WALKS": is_short}
        tiles = triton.cdiv(tiles, walk[0])
    wrap_triton(kernel)[(col_blocks * tiles, triton.cdiv(count, chosen.slices))](
        base.tensor, base.places, planes, a.horizontal_hat.contiguous(), roots, a.out,
        n1, n2, n3, rank, *walk,
        ROWS=chosen.rows, COLS=chosen.cols, RANKS=ranks, PARTS=launch.PARTS,
        BINS=chosen.bins, SLICES=chosen.slices, BASE=base.kind, ALIGNED=base.aligned,
        PRECISION=precision, **extra, num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip


def _walk(col_blocks: int, tiles: int) -> int:
    """How many tiles a program takes, one below the other: up to 8, if many programs are left."""
    return next(walk for walk in (8, 4, 2, 1) if walk == 1 or col_blocks * tiles >= ENOUGH * walk)


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
    for weight, count in zip(a.weights, counts, strict=True):
        expect("weights", weight, [n1, count * n2] if layers else [n3, n1, n2])
    return counts
