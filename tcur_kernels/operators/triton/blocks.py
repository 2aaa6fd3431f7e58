"""The last steps of every gradient of a core: ∂Û of each bin, and its transform back.

`core_grad_tokens` and `core_grad_dense` both end in a sum over rows t, for every bin k:

    ∂Û_k = Σ_t conj(left_t)ᵀ conj(right_t)

where left_t and right_t are the r complex numbers of bin k in row t. From tokens, left is dy Ĉ and
right is x R̂ᵀ, and slice l adds its sum times e^{-2 pi i k l / n3}. From a dense gradient G, left is
Ĉ and right is the conjugate of Ĝ_k R̂_kᴴ. The whole product leftᵀ right has q x q numbers, q = n3 r.
Only its blocks of 2r x 2r on the diagonal are computed, one for each bin.

The first kernel cuts the rows into blocks, and every block writes its own partial sum. A second
kernel adds the partial sums in order. The shapes alone determine the blocks, and there are no
atomics, so every run gives the same bits. The second kernel also transforms the sum back, or it
leaves ∂Û packed. The packed ∂Û of a stack's layers are later added up and transformed together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import wrap_triton
from .spectra import dot, unit_root


@triton.jit
def _rows_of_plane(
    ptr, t, in_rows, stride, column, c, width
):  # fmt: skip
    """Loads columns ``c`` of one plane at rows ``t``: [rows, parts].

    They are zero from column ``width`` on, and where a row is not in ``in_rows``.
    """
    mask = in_rows[:, None] & (c < width)[None, :]
    at = t[:, None] * stride + (column + c)[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def diagonal_blocks_kernel(
    left_ptr,  # [left_rows, slices, n3 * left_step]: planes of left_step columns
    right_ptr,  # [rows, n3 * right_step]
    partial_ptr,  # [groups * blocks of a group * slices, n3, r, r] out
    left_rows,  # row t of the right goes with row t % left_rows of the left
    rows,  # of a group, which has sums of its own
    n3, rank, left_step, right_step, slices, slice_index,
    SPAN: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the partial sum of a tile of ∂Û_k, for one bin, one slice and one block of rows."""
    block = tl.program_id(0)
    k = tl.program_id(1)
    tiles = tl.cdiv(rank, PARTS)
    a = tl.program_id(2) // tiles * PARTS + tl.arange(0, PARTS)
    b = tl.program_id(2) % tiles * PARTS + tl.arange(0, PARTS)
    s = block % slices
    pieces = tl.cdiv(rows, SPAN)
    group = block // slices // pieces
    start = block // slices % pieces * SPAN
    plane = tl.where(k > 0, 2 * k - 1, 0)
    im_rank = tl.where((k > 0) & (2 * k < n3), rank, 0)  # a real bin has no imaginary part
    left_stride = slices * n3 * left_step
    left_column = s * n3 * left_step + plane * left_step
    right_column = plane * right_step
    re = tl.zeros([PARTS, PARTS], tl.float32)
    im = tl.zeros([PARTS, PARTS], tl.float32)
    for t0 in range(start, tl.minimum(start + SPAN, rows), ROWS):
        within = t0 + tl.arange(0, ROWS)
        inside = within < rows
        t = group.to(tl.int64) * rows + within
        from_left = t % left_rows
        l_re = _rows_of_plane(left_ptr, from_left, inside, left_stride, left_column, a, rank)
        l_im = _rows_of_plane(
            left_ptr, from_left, inside, left_stride, left_column + left_step, a, im_rank
        )
        right_stride = n3 * right_step
        r_re = _rows_of_plane(right_ptr, t, inside, right_stride, right_column, b, rank)
        r_im = _rows_of_plane(
            right_ptr, t, inside, right_stride, right_column + right_step, b, im_rank
        )
        re = dot(tl.trans(l_re), r_re, re, PRECISION)
        re = dot(tl.trans(-l_im), r_im, re, PRECISION)
        im = dot(tl.trans(-l_re), r_im, im, PRECISION)
        im = dot(tl.trans(-l_im), r_re, im, PRECISION)
    # These rows belong to slice l, which adds its sum times e^{-2 pi i k l / n3}.
    cos, sin = unit_root((k * (slice_index + s)) % n3, n3)
    turned_re = cos * re + sin * im
    turned_im = cos * im - sin * re
    at = ((block * n3 + plane).to(tl.int64) * rank + a)[:, None] * rank + b[None, :]
    mask = (a < rank)[:, None] & (b < rank)[None, :]
    tl.store(partial_ptr + at, turned_re, mask=mask)
    mask = (a < im_rank)[:, None] & (b < rank)[None, :]
    tl.store(partial_ptr + at + rank * rank, turned_im, mask=mask)


@triton.jit
def core_of_partials_kernel(
    partial_ptr,  # [blocks, n3, r * r]
    ids_ptr,  # [groups] int64, only if IDS: the core that a group belongs to
    core_ptr,  # [cores, n3, r * r] out
    scale, blocks, blocks_of_group, n3, square,
    SLICES: tl.constexpr, PLANES: tl.constexpr, COLS: tl.constexpr, IDS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of a core in order, and transforms ∂Û back along the slices."""
    which = tl.program_id(0)
    l = tl.program_id(1) * SLICES + tl.arange(0, SLICES)
    e = tl.program_id(2) * COLS + tl.arange(0, COLS)
    core = tl.zeros([SLICES, COLS], tl.float32)
    for p0 in range(0, n3, PLANES):
        p = p0 + tl.arange(0, PLANES)
        mask = (p < n3)[:, None] & (e < square)[None, :]
        at = p[:, None].to(tl.int64) * square + e[None, :]
        total = tl.zeros([PLANES, COLS], tl.float32)
        for block in range(blocks):
            if IDS:
                own = tl.load(ids_ptr + block // blocks_of_group) == which
                mask = (p < tl.where(own, n3, 0))[:, None] & (e < square)[None, :]
            total += tl.load(partial_ptr + at, mask=mask, other=0.0)
            at += n3 * square
        k = (p + 1) // 2
        is_pair = (k > 0) & (2 * k < n3)
        imag = (p % 2 == 0) & is_pair
        cos, sin = unit_root((k[None, :] * l[:, None]) % n3, n3)
        table = tl.where(imag[None, :], -sin, cos) * tl.where(is_pair, 2.0, 1.0)[None, :] / n3
        # If this were written as a sum of products, Triton 3.6 would compute it in TF32.
        core = dot(table, total, core, PRECISION)
    mask = (l < n3)[:, None] & (e < square)[None, :]
    at = (which.to(tl.int64) * n3 + l)[:, None] * square + e[None, :]
    tl.store(core_ptr + at, scale * core, mask=mask)


@triton.jit
def sum_of_partials_kernel(
    partial_ptr,  # [blocks, size]
    packed_ptr,  # [size] out
    blocks, size,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums, ROWS of them at a time, and leaves ∂Û packed."""
    e = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, blocks, ROWS):
        block = first + tl.arange(0, ROWS)
        mask = (block < blocks)[:, None] & (e < size)[None, :]
        at = block[:, None].to(tl.int64) * size + e[None, :]
        total += tl.load(partial_ptr + at, mask=mask, other=0.0)
    tl.store(packed_ptr + e, tl.sum(total, axis=0), mask=e < size)


def core_gradient(
    left: Tensor,  # [left_rows, slices * n3 * left_step]
    right: Tensor,  # [rows, n3 * right_step]
    n3: int,
    rank: int,
    slice_index: int,
    slices: int,
    arch: str,
    precision: str,
    adapter_ids: Tensor | None = None,
    adapters: int = 1,
    packed: bool = False,
) -> Tensor:
    """Returns the gradient of the core, [n3, r, r] in fp32, from ``left`` and ``right`` as above.

    Args:
        left, right: planes of left_step and right_step columns. The first r of them are used.
        n3, rank: sizes.
        slice_index, slices: the consecutive slices that a row of ``left`` holds.
        arch, precision: as for `launch.row` and `spectra.dot`.
        adapter_ids: int64 [groups]. The rows are then groups of equal length, and each belongs to
            the core of its id. The result is [adapters, n3, r, r].
        adapters: number of cores.
        packed: whether to return packed ∂Û, [n3, r, r], instead. Not with ``adapter_ids``.
    """
    groups = 1 if adapter_ids is None else adapter_ids.shape[0]
    rows = right.shape[0] // max(1, groups)
    blocks = launch.row("diagonal_blocks", arch)
    tiles = triton.cdiv(rank, launch.PARTS)
    blocks_of_group = slices * triton.cdiv(rows, blocks.span)
    count = groups * blocks_of_group
    partial = right.new_empty(count, n3, rank, rank, dtype=torch.float32)
    if count:
        wrap_triton(diagonal_blocks_kernel)[(count, n3 // 2 + 1, tiles * tiles)](
            left, right, partial, left.shape[0], rows, n3, rank,
            left.shape[1] // (slices * n3), right.shape[1] // n3, slices, slice_index,
            SPAN=blocks.span, ROWS=blocks.rows, PARTS=launch.PARTS, PRECISION=precision,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    if packed:
        return _sum_of_partials(partial, arch)
    how = (1.0, arch, precision)
    if adapter_ids is None:
        return core_of_partials(partial, *how)
    return core_of_partials(partial, *how, adapter_ids.contiguous(), adapters, blocks_of_group)


def core_of_partials(
    partial: Tensor,  # [blocks, n3, r, r], contiguous
    scale: float,
    arch: str,
    precision: str,
    ids: Tensor | None = None,
    cores: int = 1,
    blocks_of_id: int = 1,
) -> Tensor:
    """Returns ``scale`` times the gradient whose packed ∂Û is the sum of ``partial``: [n3, r, r].

    With ``ids``, each core has a sum of its own, and the result is [cores, n3, r, r]. An id says
    which core the next ``blocks_of_id`` blocks belong to.
    """
    blocks, n3, rank, _ = partial.shape
    row = launch.row("core_of_partials", arch)
    core = partial.new_empty((n3, rank, rank) if ids is None else (cores, n3, rank, rank))
    grid = (cores, triton.cdiv(n3, row.slices), triton.cdiv(rank * rank, row.cols))
    if cores:
        wrap_triton(core_of_partials_kernel)[grid](
            partial, partial if ids is None else ids, core,
            scale, blocks, blocks_of_id, n3, rank * rank,
            SLICES=row.slices, PLANES=row.bins, COLS=row.cols, IDS=ids is not None,
            PRECISION=precision,
            num_warps=row.warps, num_stages=row.stages,
        )  # fmt: skip
    return core


def _sum_of_partials(partial: Tensor, arch: str) -> Tensor:
    """Adds up ``partial`` [blocks, n3, r, r] and returns packed ∂Û, [n3, r, r]."""
    row = launch.row("sum_of_partials", arch)
    packed = partial.new_empty(partial.shape[1:])
    size = packed.numel()
    wrap_triton(sum_of_partials_kernel)[(triton.cdiv(size, row.cols),)](
        partial, packed, partial.shape[0], size,
        ROWS=row.rows, COLS=row.cols,
        num_warps=row.warps, num_stages=row.stages,
    )  # fmt: skip
    return packed
