"""The first step of `materialize`: P, the table of roots, and nothing of the size of W."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import wrap_triton
from .spectra import dot, rounded, unit_root

#: Rows behind the planes of P, and numbers behind the table of roots.
BEYOND = 256


@triton.jit
def _mix_kernel(
    lateral_ptr,  # [n1, q]
    core_ptr,  # [n3, r, r]
    mixed_ptr,  # [n3, n1, RANKS] out: planes of P, with columns of zeros from the rank on
    roots_ptr,  # [2, K, n3] out: cos and sin of 2 pi k l / n3; if SPLIT [6, K, n3], with the
    # leading bits of both and then the rests, as `spectra.split_dot` takes them
    n1, n3, rank, scale,
    ROWS: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr,
    ROOTS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes P_k of one bin for a block of rows, and the cosines and sines of that bin."""
    k = tl.program_id(0)
    is_pair = (k > 0) & (2 * k < n3)
    re = tl.where(k > 0, 2 * k - 1, 0)
    im_rank = tl.where(is_pair, rank, 0)  # a real bin has no imaginary part
    weight = tl.where(is_pair, 2.0, 1.0) * scale / n3
    i = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    part = tl.arange(0, PARTS)
    # A thread has many slices below, so it would compute many roots. It reads them instead, after
    # each thread has written a few. Programs of other rows write the same numbers.
    size = (n3 // 2 + 1) * n3
    cos_ptr = roots_ptr + k * n3
    sin_ptr = cos_ptr + size
    for l0 in range(0, n3, ROOTS):
        l = l0 + tl.arange(0, ROOTS)
        cos, sin = unit_root((k * l) % n3, n3)
        tl.store(cos_ptr + l, cos, mask=l < n3)
        tl.store(sin_ptr + l, sin, mask=l < n3)
        if SPLIT:
            tl.store(cos_ptr + 2 * size + l, rounded(cos, 13), mask=l < n3)
            tl.store(sin_ptr + 2 * size + l, rounded(sin, 13), mask=l < n3)
            tl.store(cos_ptr + 4 * size + l, cos - rounded(cos, 13), mask=l < n3)
            tl.store(sin_ptr + 4 * size + l, sin - rounded(sin, 13), mask=l < n3)
    tl.debug_barrier()
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
                cos = tl.load(cos_ptr + l, mask=l < n3, other=0.0)
                sin = tl.load(sin_ptr + l, mask=l < n3, other=0.0)
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


def mixed(
    lateral_hat: Tensor, core: Tensor, scale: float, arch: str, exact: str, split: bool
) -> tuple[Tensor, Tensor]:
    """Returns the planes of P, [n3, n1, ranks], and the roots as `_mix_kernel` writes them.

    Tiles reach beyond both. Numbers there may be read, and no number that is written needs them.

    Args:
        lateral_hat, core, scale: of `materialize`.
        arch: as for `launch.row`.
        exact: precision of P.
        split: whether the roots are also wanted split, for `spectra.split_dot`.
    """
    n3, _, rank = core.shape
    n1 = lateral_hat.shape[0]
    ranks = launch.padded(rank, launch.PART)
    planes = core.new_empty((n3 * n1 + BEYOND) * ranks)[: n3 * n1 * ranks].view(n3, n1, ranks)
    roots = core.new_empty((6 if split else 2) * (n3 // 2 + 1) * n3 + BEYOND)
    row = launch.row("mix", arch, n3)
    wrap_triton(_mix_kernel)[(n3 // 2 + 1, triton.cdiv(n1, row.rows))](
        lateral_hat.contiguous(), core.contiguous(), planes, roots, n1, n3, rank, scale,
        ROWS=row.rows, RANKS=ranks, PARTS=launch.PARTS, SLICES=row.slices, ROOTS=row.span,
        SPLIT=split, PRECISION=exact,
        num_warps=row.warps, num_stages=row.stages,
    )  # fmt: skip
    return planes, roots
