"""Products of tokens with the factors: z = x R̂ᵀ, p = dy Ĉ, and from q numbers back to features."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import wrap_triton
from .spectra import dot


@triton.jit
def product_kernel(
    left_ptr,  # [rows, inner], contiguous
    right_ptr,  # [inner, cols] with any strides
    out_ptr,  # [rows, cols], contiguous
    rows, inner, cols, right_inner, right_col,
    ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr,
    ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes ``out = left @ right``, or adds it to ``out`` if ADD, in fp32 and rounded once."""
    col_blocks = tl.cdiv(cols, COLS)
    t = (tl.program_id(0) // col_blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = (tl.program_id(0) % col_blocks * COLS + tl.arange(0, COLS)).to(tl.int64)
    value = tl.zeros([ROWS, COLS], tl.float32)
    for c0 in range(0, inner, INNER):
        c = (c0 + tl.arange(0, INNER)).to(tl.int64)
        mask = (t < rows)[:, None] & (c < inner)[None, :]
        left = tl.load(left_ptr + t[:, None] * inner + c[None, :], mask=mask, other=0.0)
        mask = (c < inner)[:, None] & (j < cols)[None, :]
        at = c[:, None] * right_inner + j[None, :] * right_col
        right = tl.load(right_ptr + at, mask=mask, other=0.0)
        value = dot(left, right, value, PRECISION)
    at = t[:, None] * cols + j[None, :]
    mask = (t < rows)[:, None] & (j < cols)[None, :]
    if ADD:
        value += tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=mask)


def product(
    left: Tensor, right: Tensor, arch: str, precision: str, out: Tensor | None = None
) -> Tensor:
    """Returns ``left @ right``, [rows, cols] in fp32, or adds it to ``out`` and returns that.

    Args:
        left: [rows, inner].
        right: [inner, cols], with any strides.
        arch, precision: as for `launch.row` and `spectra.dot`.
        out: [rows, cols], contiguous, of any dtype. The sum is formed in fp32 and rounded once.
    """
    rows, inner = left.shape
    cols = right.shape[1]
    add = out is not None
    if out is None:
        out = left.new_empty(rows, cols, dtype=torch.float32)
    chosen = launch.row("product", arch)
    tiles = triton.cdiv(rows, chosen.rows) * triton.cdiv(cols, chosen.cols)
    if tiles:
        wrap_triton(product_kernel)[(tiles,)](
            left.contiguous(), right, out, rows, inner, cols, right.stride(0), right.stride(1),
            ROWS=chosen.rows, COLS=chosen.cols, INNER=chosen.span, ADD=add, PRECISION=precision,
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
    return out
