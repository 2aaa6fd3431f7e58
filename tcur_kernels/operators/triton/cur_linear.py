"""``cur_linear`` in Triton: computes y = x Wᵀ + b + ((x R̂ᵀ) M_lᵀ) Ĉᵀ for slice l.

The base product x Wᵀ + b is the very call that `nn.Linear` makes. No kernel here would be faster
than the vendor's, and if the core is zero, the result is that of `nn.Linear`. The products with R̂
and Ĉ are kernels of `products`, and the last one adds to the base product.

M_l applies the core between these two products. It has one block for each bin k:

    [[A, -B], [-B, -A]]  with  A + iB = scale w_k / n3 e^{2 pi i k l / n3} Û_k

and w_k is 2 for a bin that stands for the pair k and n3 - k, and 1 for a real bin. Between the
products, a token is only q = n3 * r numbers. So M_l costs little, even if every token has a core of
its own.

The transposed map is y = x W + Σ_l ((x_l Ĉ) M_l) R̂, where x_l are the features of slice l.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import CurLinear
from . import launch
from .contract import check_factors, check_tokens, expect
from .launch import wrap_triton
from .products import product
from .spectra import dot, unit_root


@triton.jit
def _turn_kernel(
    core_ptr,  # [cores, n3, r, r]
    ids_ptr,  # [batch] int64, only if IDS: the core of each row of the batch
    turned_ptr,  # [batch, slices, n3, r, r] out: planes A and B of each bin; a real bin has A alone
    cores, n3, rank, scale, slices, slice_index,
    SLICES: tl.constexpr, PARTS: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """Computes A + iB of one bin k and one slice l of a core U, as a tile of its r x r numbers.

    A + iB = scale w_k / n3 Σ_m e^{2 pi i k (l - m) / n3} U_m: the transform and the phase at once.
    """
    place = tl.program_id(0)
    k = tl.program_id(1)
    tiles = tl.cdiv(rank, PARTS)
    a = tl.program_id(2) // tiles * PARTS + tl.arange(0, PARTS)
    b = tl.program_id(2) % tiles * PARTS + tl.arange(0, PARTS)
    # An id out of range gives NaN. An error on the host would have to wait for the device.
    mend = 0.0
    if IDS:
        which = tl.load(ids_ptr + place // slices)
        known = (which >= 0) & (which < cores)
        mend = tl.where(known, 0.0, float("nan"))
        core_ptr += tl.where(known, which, 0) * n3 * rank * rank
    l = slice_index + place % slices
    square = rank * rank
    inside = (a < rank)[:, None] & (b < rank)[None, :]
    at = a[:, None] * rank + b[None, :]
    re = tl.zeros([PARTS, PARTS], tl.float32)
    im = tl.zeros([PARTS, PARTS], tl.float32)
    for m0 in range(0, n3, SLICES):
        m = m0 + tl.arange(0, SLICES)
        cos, sin = unit_root((k * (l + n3 - m)) % n3, n3)
        mask = (m < n3)[:, None, None] & inside[None, :, :]
        u = tl.load(core_ptr + (m * square)[:, None, None] + at[None, :, :], mask=mask, other=0.0)
        re += tl.sum(u * cos[:, None, None], axis=0)
        im += tl.sum(u * sin[:, None, None], axis=0)
    is_pair = (k > 0) & (2 * k < n3)
    weight = tl.where(is_pair, 2.0, 1.0) * scale / n3 + mend
    turned_ptr += (place.to(tl.int64) * n3 + tl.where(k > 0, 2 * k - 1, 0)) * square
    tl.store(turned_ptr + at, weight * re, mask=inside)
    im_rank = tl.where(is_pair, rank, 0)
    tl.store(turned_ptr + square + at, weight * im, mask=inside & (a < im_rank)[:, None])


@triton.jit
def _apply_kernel(
    z_ptr,  # [tokens, in_slices, q]
    turned_ptr,  # [batch, slices, n3, r, r]
    out_ptr,  # [tokens, out_slices, q]
    tokens,  # of a row of the batch
    n3, rank, slices, in_slices, out_slices,
    ROWS: tl.constexpr, PARTS: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes one bin of z M_lᵀ, or of Σ_l z_l M_l if TRANSPOSED, for a block of tokens."""
    k = tl.program_id(1)
    tiles = tl.cdiv(rank, PARTS)
    to = tl.program_id(2) % tiles * PARTS + tl.arange(0, PARTS)
    s_out = tl.program_id(2) // tiles
    blocks = tl.cdiv(tokens, ROWS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    within = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    t = row * tokens + within
    inside = within < tokens
    q = n3 * rank
    turned_ptr += row * slices * n3 * rank * rank
    column = tl.where(k > 0, 2 * k - 1, 0) * rank
    im_rank = tl.where((k > 0) & (2 * k < n3), rank, 0)  # a real bin has no imaginary part
    m_re = tl.zeros([ROWS, PARTS], tl.float32)
    m_im = tl.zeros([ROWS, PARTS], tl.float32)
    for s_in in range(in_slices):
        block_ptr = turned_ptr + ((s_in + s_out) * n3 * rank + column) * rank
        for c0 in range(0, rank, PARTS):
            c = c0 + tl.arange(0, PARTS)
            at = (t[:, None] * in_slices + s_in) * q + column + c[None, :]
            mask = inside[:, None] & (c < rank)[None, :]
            z_re = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
            mask = inside[:, None] & (c < im_rank)[None, :]
            z_im = tl.load(z_ptr + at + rank, mask=mask, other=0.0).to(tl.float32)
            if TRANSPOSED:
                at = c[:, None] * rank + to[None, :]
            else:
                at = to[None, :] * rank + c[:, None]
            mask = (c < rank)[:, None] & (to < rank)[None, :]
            a = tl.load(block_ptr + at, mask=mask, other=0.0)
            mask = (c < im_rank)[:, None] & (to < rank)[None, :]
            b = tl.load(block_ptr + rank * rank + at, mask=mask, other=0.0)
            m_re = dot(z_re, a, m_re, PRECISION)
            m_re = dot(-z_im, b, m_re, PRECISION)
            m_im = dot(-z_re, b, m_im, PRECISION)
            m_im = dot(-z_im, a, m_im, PRECISION)
    at = (t[:, None] * out_slices + s_out) * q + column + to[None, :]
    mask = inside[:, None] & (to < rank)[None, :]
    tl.store(out_ptr + at, m_re, mask=mask)
    mask = inside[:, None] & (to < im_rank)[None, :]
    tl.store(out_ptr + at + rank, m_im, mask=mask)


def run(a: CurLinear, precision: str) -> Tensor:
    """Launches the kernels and returns y: [..., slices * n1], or transposed [..., n2].

    It has the dtype of ``x``.

    Raises:
        TypeError, ValueError: dtypes, shapes or slices do not fit.
    """
    x, lateral_hat, horizontal_hat, slices = a.x, a.lateral_hat, a.horizontal_hat, a.slices
    n1, q = lateral_hat.shape
    n3, _, rank = a.core.shape[-3:]
    n2 = horizontal_hat.shape[1]
    tokens = math.prod(x.shape[:-1])
    check_factors(lateral_hat, horizontal_hat, n3, rank, a.core)
    check_tokens(n3, a.slice_index, slices, tokens, a.adapter_ids)
    expect("x", x, [*x.shape[:-1], slices * n1 if a.transposed else n2])
    if a.z is not None:
        expect("z", a.z, [*x.shape[:-1], q])
    base: Tensor | None = None
    if a.weight is not None:
        base = x @ a.weight if a.transposed else torch.nn.functional.linear(x, a.weight, a.bias)
        base = base.contiguous()
    arch = launch.arch_of(x.device)
    precision = "bf16" if a.bf16_operands else precision
    exact, precision = launch.dot_precisions(arch, precision, lateral_hat.dtype)
    if a.transposed:
        projected = product(x.reshape(tokens * slices, n1), lateral_hat, arch, precision)
    elif a.z is None:
        projected = product(x.reshape(tokens, x.shape[-1]), horizontal_hat.mT, arch, precision)
    else:
        projected = a.z.reshape(tokens, q).contiguous()
    mixed = _apply_core(projected, a, tokens, arch, exact)
    out_slices, features = (1, n2) if a.transposed else (slices, n1)
    right = horizontal_hat if a.transposed else lateral_hat.mT
    shape = (*x.shape[:-1], out_slices * features)
    if base is None:
        update = product(mixed, right, arch, precision)
        return update.to(x.dtype).reshape(shape)
    y = base.view(tokens * out_slices, features)
    return product(mixed, right, arch, precision, out=y).view(shape)


def _apply_core(
    projected: Tensor,  # [tokens * in_slices, q]
    a: CurLinear,
    tokens: int,
    arch: str,
    precision: str,
) -> Tensor:
    """Returns the projected tokens times M_l of their core, [tokens * out_slices, q] in fp32."""
    core, adapter_ids, slices = a.core, a.adapter_ids, a.slices
    n3, rank = core.shape[-3:-1]
    in_slices, out_slices = (slices, 1) if a.transposed else (1, slices)
    batch = 1 if adapter_ids is None else adapter_ids.shape[0]
    turned = core.new_empty(batch * slices, n3, rank, rank)
    mixed = core.new_empty(tokens * out_slices, n3 * rank)
    turn, apply = launch.row("turn", arch), launch.row("apply", arch)
    tiles, bins = triton.cdiv(rank, launch.PARTS), n3 // 2 + 1
    per_row = tokens // max(1, batch)
    programs = batch * triton.cdiv(per_row, apply.rows)
    if programs == 0:
        return mixed
    ids = core if adapter_ids is None else adapter_ids.contiguous()
    cores = 1 if adapter_ids is None else core.shape[0]
    wrap_triton(_turn_kernel)[(batch * slices, bins, tiles * tiles)](
        core.contiguous(), ids, turned, cores, n3, rank, a.scale, slices, a.slice_index,
        SLICES=turn.slices, PARTS=launch.PARTS, IDS=adapter_ids is not None,
        num_warps=turn.warps, num_stages=turn.stages,
    )  # fmt: skip
    wrap_triton(_apply_kernel)[(programs, bins, tiles * out_slices)](
        projected, turned, mixed, per_row, n3, rank, slices, in_slices, out_slices,
        ROWS=apply.rows, PARTS=launch.PARTS, TRANSPOSED=a.transposed, PRECISION=precision,
        num_warps=apply.warps, num_stages=apply.stages,
    )  # fmt: skip
    return mixed
