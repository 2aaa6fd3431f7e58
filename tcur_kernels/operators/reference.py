"""The mathematics in plain torch: what every kernel is checked against.

Slice-first storage: a tensor is ``[n3, n1, n2]``, a batch of frontal slices, and the discrete
Fourier transform runs along axis 0. A real tensor needs only the half spectrum,
``K = n3 // 2 + 1`` complex slices; every function here takes the factors C and R in that form
(`half_spectrum`), so that they are transformed once and used often.

It works for any floating dtype that torch's FFT supports, float64 included, on any device. It
imports nothing else of this package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def half_spectrum(a: Tensor) -> Tensor:
    """Computes the DFT along axis 0: ``[n3, n1, n2]`` real -> ``[n3 // 2 + 1, n1, n2]`` complex."""
    if 0 in a.shape:  # of no adapters; torch's FFT on the CPU refuses it
        nothing = a[: a.shape[0] // 2 + 1]
        return torch.complex(nothing, nothing)
    return torch.fft.rfft(a, dim=0)


def from_half_spectrum(a_hat: Tensor, n3: int) -> Tensor:
    """Inverts `half_spectrum`. It needs ``n3``, because an even n3 and n3 + 1 have as many bins."""
    if 0 in a_hat.shape:  # as in `half_spectrum`
        return a_hat.real.new_zeros(n3, *a_hat.shape[1:])
    # Over axis 0, irfft returns permuted strides. Callers expect a contiguous tensor.
    return torch.fft.irfft(a_hat, n=n3, dim=0).contiguous()


def pack(a_hat: Tensor, n3: int) -> Tensor:
    """Packs a half spectrum: ``[K, ...]`` complex -> ``[n3, ...]`` real planes.

    Plane 0 is bin 0. Planes 2k-1 and 2k are the real and imaginary parts of bin k. For an even n3
    the last plane is bin n3/2. Bins 0 and n3/2 are real, so these are exactly n3 real numbers.
    """
    pairs = (n3 - 1) // 2
    # Not `view_as_real`: torch's backward of it refuses a gradient that starts at an odd place.
    inner = torch.stack([a_hat[1 : pairs + 1].real, a_hat[1 : pairs + 1].imag], 1).flatten(0, 1)
    ends = [a_hat[:1].real, inner] + ([a_hat[-1:].real] if n3 % 2 == 0 else [])
    return torch.cat(ends)


def unpack(planes: Tensor) -> Tensor:
    """Inverts `pack`: ``[n3, ...]`` real planes -> ``[n3 // 2 + 1, ...]`` complex."""
    n3 = planes.shape[0]
    pairs = (n3 - 1) // 2
    inner = planes[1 : 2 * pairs + 1].unflatten(0, (pairs, 2)) if pairs else planes[:0]
    zero = torch.zeros_like(planes[:1])
    bins = [torch.complex(planes[:1], zero)]
    if pairs:
        bins.append(torch.complex(inner[:, 0].contiguous(), inner[:, 1].contiguous()))
    if n3 % 2 == 0:
        bins.append(torch.complex(planes[-1:], zero))
    return torch.cat(bins)


def cur_product(lateral_hat: Tensor, core: Tensor, horizontal_hat: Tensor) -> Tensor:
    """Computes C * U * R from spectra ``[K, n1, r]``, ``[K, r, n2]`` and a core ``[n3, r, r]``."""
    product = lateral_hat @ half_spectrum(core) @ horizontal_hat
    return from_half_spectrum(product, core.shape[0])


def materialize(
    weight: Tensor | None,
    lateral_hat: Tensor,
    horizontal_hat: Tensor,
    core: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """Computes W_eff = W + scale * C * U * R, ``[n3, n1, n2]``, in the dtype of the core."""
    update = scale * cur_product(lateral_hat, core, horizontal_hat)
    return update if weight is None else weight.to(update.dtype) + update


def core_grad_dense(grad: Tensor, lateral_hat: Tensor, horizontal_hat: Tensor) -> Tensor:
    """Computes the gradient of the core, Cᵀ * G * Rᵀ, from G = d loss / d (C * U * R)."""
    grad_hat = lateral_hat.mH @ half_spectrum(grad) @ horizontal_hat.mH
    return from_half_spectrum(grad_hat, grad.shape[0])


def core_grad_tokens(
    x: Tensor,
    grad_y: Tensor,
    lateral_hat: Tensor,
    horizontal_hat: Tensor,
    n3: int,
    slice_index: int,
    slices: int = 1,
    adapter_ids: Tensor | None = None,
    adapters: int = 1,
    packed: bool = False,
) -> Tensor:
    """Computes the gradient of the core of ``y = x (C*U*R)_lᵀ`` without any n1 x n2 gradient.

    ``x`` is [..., n2]. ``grad_y`` is [..., slices * n1]: n1 numbers for each of the slices from
    ``slice_index`` on. With z_k = x R̂_kᴴ and p_k = dy conj(Ĉ_k), slice l adds
    e^{-2πikl/n3} p_kᵀ z_k to ∂Û_k. With ``adapter_ids`` (see `slice_update`), each of the
    ``adapters`` cores gets the sum over its own tokens: [adapters, n3, r, r].

    With ``packed`` the result is ∂Û itself, [n3, r, r], in the order of `pack`. `core_of_packed`
    makes the gradient of it.
    """
    n1 = lateral_hat.shape[1]
    tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(lateral_hat.dtype)
    grads = grad_y.reshape(tokens.shape[0], slices, n1).to(lateral_hat.dtype)
    z = _rows(tokens @ horizontal_hat.mH, adapter_ids)  # [K, B, tokens / B, r]
    core_hat = torch.zeros_like(z[:, :, :0].mT @ z[:, :, :0])
    for s in range(slices):
        p = _rows(grads[:, s] @ lateral_hat.conj(), adapter_ids)
        core_hat = core_hat + _phases(lateral_hat, n3, -(slice_index + s)) * (p.mT @ z)
    if packed:
        return pack(core_hat[:, 0], n3)
    if adapter_ids is None:
        return from_half_spectrum(core_hat[:, 0], n3)
    own = core_hat.new_zeros(core_hat.shape[0], adapters, *core_hat.shape[2:])
    own = own.index_add(1, adapter_ids, core_hat)
    return from_half_spectrum(own, n3).movedim(1, 0).contiguous()


def core_of_packed(packed: Tensor, scale: float) -> Tensor:
    """Returns scale times the core with packed half spectrum Σ_m ``packed``, [m, n3, r, r]."""
    return scale * from_half_spectrum(unpack(packed.sum(0)), packed.shape[1])


def cur_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lateral_hat: Tensor,
    horizontal_hat: Tensor,
    core: Tensor,
    slice_index: int,
    slices: int = 1,
    scale: float = 1.0,
) -> Tensor:
    """Computes ``x (W_l + scale (C*U*R)_l)ᵀ + bias`` through the factors, without W_eff.

    ``weight`` is [slices * n1, n2], or None for the update alone. The result is
    [..., slices * n1].
    """
    update = slice_update(x, lateral_hat, horizontal_hat, core, slice_index, slices, scale)
    if weight is None:
        return update.to(x.dtype)
    base = torch.nn.functional.linear(x, weight, bias)
    return (base.to(update.dtype) + update).to(base.dtype)


def slice_update(
    x: Tensor,
    lateral_hat: Tensor,
    horizontal_hat: Tensor,
    core: Tensor,
    slice_index: int,
    slices: int,
    scale: float,
    adapter_ids: Tensor | None = None,
) -> Tensor:
    """Computes ``scale * x (C*U*R)_lᵀ`` for consecutive slices, in the dtype of the core.

    With ``adapter_ids``, int64 [B], there are several cores [A, n3, r, r]. The tokens of x are then
    B rows of equal length, one after the other, and row b uses core ``adapter_ids[b]``.
    """
    n3 = core.shape[-3]
    tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(lateral_hat.dtype)
    core_hat = _core_of_rows(core, adapter_ids)
    z = _rows(tokens @ horizontal_hat.mT, adapter_ids)
    weights = scale * _inverse_weights(lateral_hat, n3)
    blocks = []
    for s in range(slices):
        slice_core = weights * _phases(lateral_hat, n3, slice_index + s) * core_hat
        # Real part of the sum over the half spectrum, each pair counted twice by its weight.
        blocks.append(((z @ slice_core.mT).flatten(1, 2) @ lateral_hat.mT).sum(0).real)
    out = torch.stack(blocks, 1).to(core.dtype)
    return out.reshape(*x.shape[:-1], slices * lateral_hat.shape[1])


def slice_update_transposed(
    x: Tensor,
    lateral_hat: Tensor,
    horizontal_hat: Tensor,
    core: Tensor,
    slice_index: int,
    slices: int,
    scale: float,
    adapter_ids: Tensor | None = None,
) -> Tensor:
    """Computes ``scale * Σ_l x_l (C*U*R)_l``: [..., slices * n1] -> [..., n2]."""
    n3, n1, n2 = core.shape[-3], lateral_hat.shape[1], horizontal_hat.shape[2]
    count = math.prod(x.shape[:-1])
    tokens = x.reshape(count, slices, n1).to(lateral_hat.dtype)
    core_hat = _core_of_rows(core, adapter_ids)
    weights = scale * _inverse_weights(lateral_hat, n3)
    out = torch.zeros(count, n2, dtype=core.dtype, device=x.device)
    for s in range(slices):
        slice_core = weights * _phases(lateral_hat, n3, slice_index + s) * core_hat
        p = _rows(tokens[:, s] @ lateral_hat, adapter_ids)
        out = out + ((p @ slice_core).flatten(1, 2) @ horizontal_hat).sum(0).real
    return out.reshape(*x.shape[:-1], n2)


def _rows(projected: Tensor, adapter_ids: Tensor | None) -> Tensor:
    """Divides tokens into rows of one core each: [K, tokens, r] -> [K, B, tokens / B, r].

    Without ``adapter_ids`` all tokens are one row.
    """
    rows = 1 if adapter_ids is None else adapter_ids.shape[0]
    return projected.unflatten(1, (rows, projected.shape[1] // max(1, rows)))


def _core_of_rows(core: Tensor, adapter_ids: Tensor | None) -> Tensor:
    """Returns the half spectrum of the core of each row, [K, B, r, r]."""
    if adapter_ids is None:
        return half_spectrum(core)[:, None]
    return half_spectrum(core.movedim(0, 1)).index_select(1, adapter_ids)


def _phases(like: Tensor, n3: int, slice_index: int) -> Tensor:
    """Computes e^{2πikl/n3} for every bin k, ``[K, 1, 1, 1]``. kl is reduced modulo n3 exactly."""
    turns = torch.arange(like.shape[0], device=like.device) * slice_index % n3
    angle = turns.to(torch.float64) * (2 * math.pi / n3)
    return torch.polar(torch.ones_like(angle), angle).to(like.dtype)[:, None, None, None]


def _inverse_weights(like: Tensor, n3: int) -> Tensor:
    """Returns 1/n3 for the real bins and 2/n3 for the pairs, ``[K, 1, 1, 1]``."""
    weights = torch.full((like.shape[0],), 2.0 / n3, dtype=like.dtype, device=like.device)
    weights[0] = 1.0 / n3
    if n3 % 2 == 0:
        weights[-1] = 1.0 / n3
    return weights[:, None, None, None]
