"""Tubal algebra: the t-product and what follows from it, in plain differentiable torch.

Kilmer & Martin, "Factorization strategies for third-order tensors", Linear Algebra and its
Applications 435 (2011). Storage is slice-first: the literature's n1 x n2 x n3 is ``[n3, n1, n2]``.
All functions accept any device and any floating dtype of 16 bits or more. For half precisions they
compute in fp32 and return the dtype of the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import outside_autocast


def t_product(a: Tensor, b: Tensor) -> Tensor:
    """t-product ``a * b``: circular convolution of the frontal slices.

    (a * b)_l = Σ_{i+j ≡ l mod n3} a_i b_j, computed slice by slice in the half spectrum.

    Args:
        a: ``[n3, n1, p]``, floating.
        b: ``[n3, p, n2]``, same dtype and device.

    Returns:
        ``[n3, n1, n2]``, contiguous, in the dtype of ``a``.

    Raises:
        TypeError: a tensor is not floating, or dtypes differ.
        ValueError: shapes do not fit, or devices differ.
    """
    check_tensor("a", a)
    check_tensor("b", b)
    if a.dtype != b.dtype:
        raise TypeError(f"b: expected the dtype of a, {a.dtype}, got {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"b: expected the device of a, {a.device}, got {b.device}")
    if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise ValueError(
            f"b: expected [n3, p, n2] with n3 = {a.shape[0]} and p = {a.shape[2]} as in a, "
            f"got {list(b.shape)}"
        )
    x, y = _computable(a), _computable(b)
    if a.shape[0] == 1:  # the matrix product, without a transform of length one
        with outside_autocast(a.device):  # like the complex product below, which autocast ignores
            return (x @ y).to(a.dtype)
    product = _spectrum(x) @ _spectrum(y)
    return _from_spectrum(product, a.shape[0]).to(a.dtype)


def t_transpose(a: Tensor) -> Tensor:
    """t-transpose: every frontal slice transposed, slices 1 … n3-1 in reverse order.

    ``[n3, n1, n2]`` -> ``[n3, n2, n1]``. In the spectrum it is the conjugate transpose of each
    slice.
    """
    check_tensor("a", a)
    with outside_autocast(a.device):  # autocast to fp16 refuses bf16
        return torch.cat([a[:1], a[1:].flip(0)]).mT.contiguous()


def t_identity(
    n: int,
    n3: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Identity of the t-product, ``[n3, n, n]``: slice 0 is the unit matrix, the rest zero."""
    for name, value in (("n", n), ("n3", n3)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected a positive integer, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value}")
        if value >= 2**63:
            raise ValueError(f"{name}: expected a positive integer below 2**63, got {value}")
    if device is not None and not isinstance(device, torch.device):
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device: expected a device of torch, got {device!r}") from error
    identity = torch.zeros(n3, n, n, dtype=dtype, device=device)
    identity[0] = torch.eye(n, dtype=dtype, device=device)
    return identity


def t_pinv(a: Tensor, rtol: float | None = None) -> Tensor:
    """Moore-Penrose inverse under the t-product: ``[n3, n1, n2]`` -> ``[n3, n2, n1]``.

    Args:
        a: floating tensor.
        rtol: singular values below ``rtol`` times the largest singular value of the whole spectrum
            count as zero. The default is ``max(n1, n2) * eps`` of the dtype that is computed in,
            and at least eps of the dtype of ``a``.
    """
    check_tensor("a", a)
    _check_rtol(rtol)
    x = _computable(a)
    if rtol is None:
        rtol = rounding(a.dtype, max(a.shape[1:]))
    # All slices share one threshold, because a slice that is zero up to rounding must not be
    # inverted.
    spectrum = _spectrum(x)
    largest = torch.linalg.matrix_norm(spectrum.detach(), ord=2).max()
    zero = torch.zeros_like(largest)  # tensors, because a Python number would wait for the device
    inverse = pseudo_inverse(spectrum, atol=rtol * largest, rtol=zero)
    return _from_spectrum(inverse, a.shape[0]).to(a.dtype)


def pseudo_inverse(a: Tensor, atol: Tensor, rtol: Tensor) -> Tensor:
    """Moore-Penrose inverse of complex matrices ``[..., n1, n2]`` -> ``[..., n2, n1]``.

    It is that of the real matrices [[X, -Y], [Y, X]] for X + iY, which have the same singular
    values, each twice. ``torch.linalg.pinv`` of complex matrices forgets to conjugate within a
    `TorchDispatchMode`, such as ``FlopCounterMode`` (torch 2.10 to 2.13).
    """
    n1, n2 = a.shape[-2:]
    top, bottom = torch.cat([a.real, -a.imag], -1), torch.cat([a.imag, a.real], -1)
    with outside_autocast(a.device):  # which reaches products of real matrices
        real = torch.linalg.pinv(torch.cat([top, bottom], -2), atol=atol, rtol=rtol)[..., :n1]
    return torch.complex(real[..., :n2, :].contiguous(), real[..., n2:, :].contiguous())


def t_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """t-SVD, reduced: ``a = u * s * t_transpose(v)``.

    With m = min(n1, n2): ``u`` [n3, n1, m] and ``v`` [n3, n2, m] have orthonormal lateral slices
    (``t_transpose(u) * u`` is the identity), ``s`` [n3, m, m] has diagonal frontal slices. The
    number of tubes of ``s`` that are not zero is the tubal rank of ``a``.

    Gradients are those of ``torch.linalg.svd``: defined for functions that do not depend on the
    signs and phases of the singular vectors, and finite for distinct singular values.
    """
    check_tensor("a", a)
    n3 = a.shape[0]
    spectrum = _spectrum(_computable(a))
    pairs = (n3 - 1) // 2
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    # Decompose the real bins as real matrices. A complex SVD may return any phase; then u and v
    # would not be spectra of real tensors.
    real_bins = [spectrum[:1].real] + ([spectrum[-1:].real] if n3 % 2 == 0 else [])
    for part in (real_bins[0], spectrum[1 : pairs + 1], *real_bins[1:]):
        u, s, vh = torch.linalg.svd(part, full_matrices=False)
        parts.append((u + 0j, torch.diag_embed(s) + 0j, vh.mH + 0j))
    u, s, v = (_from_spectrum(torch.cat(bins), n3).to(a.dtype) for bins in zip(*parts, strict=True))
    return u, s, v


def multirank(a: Tensor, rtol: float | None = None) -> Tensor:
    """Ranks of all n3 slices of the spectrum, int64 ``[n3]``, on the device of ``a``.

    Args:
        a: ``[n3, n1, n2]``, floating.
        rtol: singular values up to ``rtol`` times the largest one of the whole spectrum count as
            zero. The default is ``max(n1, n2) * eps`` of the dtype that is computed in, and at
            least eps of the dtype of ``a``.
    """
    check_tensor("a", a)
    _check_rtol(rtol)
    values = torch.linalg.svdvals(_spectrum(_computable(a)))
    if rtol is None:
        rtol = rounding(a.dtype, max(a.shape[1:]))
    ranks = (values > rtol * values.max()).sum(1)
    # Bin n3 - k is the conjugate of bin k.
    return torch.cat([ranks, ranks[1 : (a.shape[0] + 1) // 2].flip(0)])


def tubal_rank(a: Tensor, rtol: float | None = None) -> int:
    """The maximum of `multirank`, which is the smallest r for which C * U * R can be exact.

    Kilmer, Braman, Hao & Hoover, SIAM J. Matrix Anal. Appl. 34 (2013), definition 4.1.
    """
    check_tensor("a", a)
    if a.is_meta:
        raise ValueError("a: expected a tensor with values, got one on meta")
    return int(multirank(a, rtol).max())


def _spectrum(a: Tensor) -> Tensor:
    return torch.fft.rfft(a, dim=0)


def _from_spectrum(a_hat: Tensor, n3: int) -> Tensor:
    return torch.fft.irfft(a_hat, n=n3, dim=0).contiguous()


def _computable(a: Tensor) -> Tensor:
    """Casts half precisions to fp32, because FFT and LAPACK do not support them for every size."""
    return a.float() if a.dtype in (torch.float16, torch.bfloat16) else a


def rounding(dtype: torch.dtype, terms: int) -> float:
    """What rounding makes of a singular value that is zero, relative to the largest one.

    ``terms`` * eps comes from sums of so many terms in the dtype that is computed in, which is fp32
    for 16 bits. Numbers of ``dtype`` were rounded, too. These errors are independent of each other,
    so eps of ``dtype`` bounds their largest singular value, whatever the size of the matrix. For 16
    bits, ``terms`` times that eps would be 1 or more, and no singular value would be left.
    """
    computed = torch.promote_types(dtype, torch.float32)
    return max(torch.finfo(dtype).eps, terms * torch.finfo(computed).eps)


def _check_rtol(rtol: float | None) -> None:
    """Checks that it is a number of 0 or more, and finite; or None."""
    if rtol is None:
        return
    if isinstance(rtol, bool) or not isinstance(rtol, int | float):
        raise TypeError(f"rtol: expected a number or None, got {type(rtol).__name__}")
    if not 0 <= rtol <= torch.finfo(torch.float32).max:
        raise ValueError(f"rtol: expected a finite number of 0 or more, got {rtol}")


def check_tensor(name: str, a: Tensor) -> None:
    """Checks that ``a`` is a floating tensor [n3, n1, n2] of 16 bits or more."""
    if not isinstance(a, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(a).__name__}")
    if not a.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype, got {a.dtype}")
    if a.dtype.itemsize < 2:
        raise TypeError(f"{name}: expected a floating dtype of 16 bits or more, got {a.dtype}")
    if a.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {a.layout}")
    if a.ndim != 3 or 0 in a.shape:
        raise ValueError(f"{name}: expected [n3, n1, n2] with no empty axis, got {list(a.shape)}")
