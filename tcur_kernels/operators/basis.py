"""The basis in which a core is written: the chosen slices themselves, or isometric factors.

Both bases span the same updates. Frequency by frequency, Ĉ_k = Q̂_k T̂_k and R̂_k = T̂'_k Q̂'_k, where
the columns of Q̂_k and the rows of Q̂'_k are orthonormal. So C * U * R = Q * V * Q' with
V = T * U * T', and ‖Q * V * Q'‖ = ‖V‖.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..t_product import pseudo_inverse

#: "slices": C and R are the chosen slices, as published. "orthonormal": they are the isometric
#: factors of these slices.
Basis = Literal["orthonormal", "slices"]
BASES: tuple[Basis, ...] = get_args(Basis)
DEFAULT_BASIS: Basis = "orthonormal"

#: A column counts as dependent on the columns before it at a frequency if what they leave of it
#: there is at most this part of the column's norm, taken over the whole stack.
DEPENDENT = 2.0**-20

#: The most that an update may change, relative to its norm, where a core is converted.
LOST = 1e-4


def check_basis(basis: str) -> Basis:
    """Refuses anything but one of `BASES`."""
    for known in BASES:
        if basis == known:
            return known
    raise ValueError(f"basis: expected one of {', '.join(BASES)}, got {basis!r}")


def scale_of(basis: Basis, alpha: float, n1: int, n2: int, rank: int) -> float:
    """What C * U * R is multiplied by: alpha, in the orthonormal basis times √(n1 n2) / (2 r).

    Then one learning rate of Adam serves every rank and every size of the stack, and it is that of
    LoRA (docs/decomposition.md).
    """
    return alpha * math.sqrt(n1 * n2) / (2 * rank) if basis == "orthonormal" else alpha


def converted(core: Tensor, slices: tuple[Tensor, Tensor], to: Basis, factor: float) -> Tensor:
    """The core that gives in the other basis what ``core`` gives in its own, in fp64.

    With Ĉ = Q̂ T̂ and R̂ = T̂' Q̂', V = T * U * T' and U = T^+ * V * T'^+. The pseudo-inverses are those
    of scaled columns and rows, so that slices of very different norms do no harm. Directions that
    the slices do not span have no part in either core.

    Args:
        core: ``[n3, r, r]``.
        slices: the lateral ``[n3, n1, r]`` and horizontal ``[n3, r, n2]`` slices.
        to: the basis of the result; ``core`` is in the other one.
        factor: what the result is multiplied by: the ratio of the scales.

    Raises:
        ValueError: the result, rounded to the dtype of ``core``, would give another update
            (by more than `LOST`), because the slices are nearly dependent.
    """
    left, right = _triangle(slices[0]), _triangle(slices[1].mT).mT
    core_hat = torch.fft.rfft(core.double(), dim=0)
    if to == "orthonormal":
        made = left @ core_hat @ right
    else:
        made = _inverse(left) @ core_hat @ _inverse(right.mT).mT
    new = factor * torch.fft.irfft(made, n=core.shape[0], dim=0)
    if to == "slices":
        rounded = torch.fft.rfft(new.to(core.dtype).double(), dim=0) / factor
        kept = left @ _inverse(left) @ core_hat @ _inverse(right.mT).mT @ right
        lost = torch.linalg.vector_norm(left @ rounded @ right - kept)
        size = torch.linalg.vector_norm(kept)
        if lost > LOST * size:
            raise ValueError(
                f"basis: expected slices in which the core can be written in {core.dtype}, got "
                f"nearly dependent ones: the update would change by {float(lost / size):.1e} of it"
            )
    return new


def embedded(
    core: Tensor,
    slices: tuple[Tensor, Tensor],
    rows: Sequence[int],
    columns: Sequence[int],
    basis: Basis,
    factor: float,
) -> Tensor:
    """The core that gives with all slices what ``core`` gives with some of them, in fp64.

    In the basis "slices" it is the core among zeros. In the orthonormal basis it is Q_bᴴ Q_s V Q'_s
    Q'_bᴴ at every frequency, where Q_s are the isometric factors of some slices, and Q_b those of
    all.

    Args:
        core: ``[n3, s, s]``.
        slices: all lateral ``[n3, n1, r]`` and horizontal ``[n3, r, n2]`` slices.
        rows, columns: which of the horizontal and of the lateral slices ``core`` is written in.
        basis: of both cores.
        factor: what the result is multiplied by: the ratio of the scales.

    Returns:
        fp64 ``[n3, r, r]``.

    Raises:
        ValueError: the result would give another update (by more than `LOST`), because the slices
            are nearly dependent.
    """
    lateral, horizontal = slices
    own = torch.tensor(columns, device=core.device), torch.tensor(rows, device=core.device)
    if basis == "slices":
        rank = lateral.shape[2]
        whole = torch.zeros(len(core), rank, rank, dtype=torch.float64, device=core.device)
        whole[:, own[0][:, None], own[1]] = factor * core.double()
        return whole
    left, kept_left = _overlap(lateral, own[0])
    right, kept_right = _overlap(horizontal.mT, own[1])
    core_hat = torch.fft.rfft(core.double(), dim=0)
    made = left @ core_hat @ right.mT
    kept = kept_left @ core_hat @ kept_right.mT
    lost = torch.linalg.vector_norm(left.mH @ made @ right.conj() - kept)
    size = torch.linalg.vector_norm(kept)
    if lost > LOST * size:
        raise ValueError(
            f"slices: expected slices that span all that some of them span, got nearly dependent "
            f"ones: the update would change by {float(lost / size):.1e} of it"
        )
    return factor * torch.fft.irfft(made, n=core.shape[0], dim=0)


def _overlap(lateral: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Q̂_bᴴ Q̂_s of all slices and of some, and Q̂_sᴴ Q̂_s, at every frequency.

    For horizontal slices, transposed slice by slice, these are the conjugates of what stands to the
    right of a core, transposed: R̂ᵀ is the spectrum of the transposed slices.
    """
    of_all = _gram_schmidt(*_spectrum(lateral))
    of_some = _gram_schmidt(*_spectrum(lateral[:, :, own]))
    return of_all.mH @ of_some, of_some.mH @ of_some


def _triangle(lateral: Tensor) -> Tensor:
    """T̂ = Q̂ᴴ Ĉ ``[n3 // 2 + 1, r, r]`` of slices ``[n3, n, r]``."""
    spectrum, norms = _spectrum(lateral)
    return _gram_schmidt(spectrum, norms).mH @ spectrum


def _inverse(triangle: Tensor) -> Tensor:
    """X with T X = the projection onto the range of T, for T of `_triangle`."""
    sizes = torch.linalg.vector_norm(triangle, dim=1, keepdim=True)
    sizes = torch.where(sizes > 0, sizes, 1)
    scaled = triangle / sizes
    largest = torch.linalg.matrix_norm(scaled, ord=2)
    return pseudo_inverse(scaled, 1e-12 * largest, torch.zeros_like(largest)) / sizes.mT


def orthonormal(lateral: Tensor) -> Tensor:
    """Isometric lateral slices Q, which span at every frequency what the given slices span there.

    By Gram-Schmidt in fp64, in the order of the slices. A slice that depends on those before it at
    a frequency (`DEPENDENT`) becomes zero there, so that no direction is made of rounding errors.
    Multiplying a slice by a positive number changes nothing.

    Args:
        lateral: ``[n3, n, r]``.

    Returns:
        fp64, as ``lateral``; ``t_transpose(Q) * Q`` is the identity if nothing is dependent.
    """
    q_hat = _gram_schmidt(*_spectrum(lateral))
    return torch.fft.irfft(q_hat, n=lateral.shape[0], dim=0).contiguous()


def _spectrum(lateral: Tensor) -> tuple[Tensor, Tensor]:
    """The half spectrum of slices ``[n3, n, r]`` in fp64, and the norm of each over the stack."""
    wide = lateral.double()
    return torch.fft.rfft(wide, dim=0), torch.linalg.vector_norm(wide, dim=(0, 1))


def _gram_schmidt(spectrum: Tensor, norms: Tensor) -> Tensor:
    """Orthonormal or zero columns at each frequency, ``[K, n, r]`` as given."""
    basis = torch.zeros_like(spectrum)
    for index in range(spectrum.shape[2]):
        before, rest = basis[:, :, :index], spectrum[:, :, index]
        for _ in range(2):  # the second time takes off what rounding left
            rest = rest - (before @ (before.mH @ rest[:, :, None]))[:, :, 0]
        size = torch.linalg.vector_norm(rest, dim=1, keepdim=True)
        is_new = size > DEPENDENT * norms[index]
        basis[:, :, index] = torch.where(is_new, rest / size, 0)
    return basis
