"""The update of an adapted layer as the product of two thin matrices, which is what LoRA is.

The update of slice l is a product of real matrices, scale * Ĉ K_l R̂. Here Ĉ ``[n1, q]`` and
R̂ ``[q, n2]`` are the packed spectra of C and R, with q = n3 * r, and K_l ``[q, q]`` is made of the
core. So the update of a layer has a rank of at most q.

The update is never formed here. With the QR decompositions Ĉ = Q S and R̂ᵀ = Q' T it is Q M Q'ᵀ,
where M = scale * S K_l Tᵀ is a small matrix. Q and Q' have orthonormal columns, so the singular
values of M are those of the update. They give the best approximation of a rank, and its error. All
of this is computed in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators.factors import CURFactors
from ..operators.reference import half_spectrum, pack, unpack
from .plan import StackPlan

#: The ranks that vLLM takes as ``--max-lora-rank``.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def served_rank(rank: int) -> int | None:
    """The smallest of `SERVED_RANKS` that is at least ``rank``; None if there is none."""
    return next((served for served in SERVED_RANKS if served >= rank), None)


def check_served(argument: str, rank: int) -> int:
    """Refuses anything but one of `SERVED_RANKS`."""
    if rank not in SERVED_RANKS:
        listed = ", ".join(map(str, SERVED_RANKS))
        raise ValueError(f"{argument}: expected one of {listed}, which vLLM takes, got {rank}")
    return rank


def exact_rank(plan: StackPlan, rank: int | None = None) -> int:
    """The LoRA rank that the layers of a stack need to be exact: n3 * r, or the size of a layer.

    Args:
        plan: the stack.
        rank: the tubal rank r; by default that of the plan.
    """
    q = plan.n3 * (plan.rank if rank is None else rank)
    return max(min(q, member.slices * plan.n1, plan.n2) for member in plan.members)


def largest_exact(plan: StackPlan, lora_rank: int) -> int:
    """The largest tubal rank whose layers are exact at ``lora_rank``; 0 if there is none."""
    fits = (r for r in range(min(plan.n1, plan.n2), 0, -1) if exact_rank(plan, r) <= lora_rank)
    return next(fits, 0)


@dataclass(frozen=True, eq=False)
class Update:
    """What the updates of the layers of one stack are made of.

    Attributes:
        plan: the stack.
        factors: its C and R.
        core: ``[n3, r, r]``.
        scale: what C * U * R is multiplied by.
    """

    plan: StackPlan
    factors: CURFactors
    core: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class LayerLora:
    """The LoRA of one layer.

    Attributes:
        name: of the layer.
        a: ``[rank, in_features]``.
        b: ``[out_features, rank]``; the update is ``b @ a``.
        error: ‖update - b @ a‖_F / ‖update‖_F. It has the roundings of ``a`` and ``b`` in it, but
            not their products with each other.
    """

    name: str
    a: Tensor
    b: Tensor
    error: float


def lora_of(update: Update, rank: int, dtype: torch.dtype) -> Iterator[LayerLora]:
    """The LoRA of each layer of a stack, in the order of its slices.

    It is exact where ``rank`` is at least the rank of the layer; then zeros fill what is left.
    Otherwise it is the best approximation of that rank.

    Args:
        update: the stack.
        rank: of all layers.
        dtype: of the result, to which it is rounded once.

    Raises:
        ValueError: the core is not finite, or numbers are too large for the dtype; the message
            names the stack or the layer.
    """
    plan, core = update.plan, update.core.detach().double()
    if not torch.isfinite(core).all():
        raise ValueError(f"core: expected finite numbers in stack {plan.name}, got NaN or Inf")
    n3, r = core.shape[:2]
    q_left, s_left = torch.linalg.qr(update.factors.lateral_hat.double())
    q_right, s_right = torch.linalg.qr(update.factors.horizontal_hat.double().mT)
    left = unpack(s_left.unflatten(1, (n3, r)).movedim(1, 0))  # [n3 // 2 + 1, p, r]
    index = 0
    for member in plan.members:
        slices = range(index, index + member.slices)
        index += member.slices
        middle = torch.cat([_times_core(left, core, each) for each in slices]) @ s_right.mT
        yield _of_layer(member.module, update.scale * middle, q_left, q_right, rank, dtype)


def _times_core(left: Tensor, core: Tensor, index: int) -> Tensor:
    """S K_l ``[p, n3 * r]`` for the slice l = ``index``, from the spectrum of S.

    With V_k the spectrum of the core, shifted by l, slice l is the real part of the sum of
    Ŝ_k V_k R̂_k over the half spectrum, where pairs count twice. The real part of a product P R̂_k is
    Re P Re R̂_k - Im P Im R̂_k, and R̂ is packed as Re R̂_k and Im R̂_k: so P is packed conjugated.
    """
    n3 = core.shape[0]
    weights = torch.full((left.shape[0], 1, 1), 2 / n3, dtype=core.dtype, device=core.device)
    weights[0] = 1 / n3
    if n3 % 2 == 0:
        weights[-1] = 1 / n3
    product = left @ (weights * half_spectrum(core.roll(-index, 0)))
    return pack(product.conj().resolve_conj(), n3).movedim(0, 1).flatten(1)


def _of_layer(
    name: str, middle: Tensor, q_left: Tensor, q_right: Tensor, rank: int, dtype: torch.dtype
) -> LayerLora:
    """The LoRA of a layer with the update Q M Q'ᵀ, in which Q stands once for each slice.

    Args:
        name: of the layer.
        middle: M ``[slices * p, p']``.
        q_left, q_right: Q ``[n1, p]`` and Q' ``[n2, p']``, with orthonormal columns.
        rank, dtype: of the result.
    """
    rows, columns = middle.shape
    size, lost = float(middle.norm()), 0.0
    if rank < min(rows, columns):
        u, values, v = torch.linalg.svd(middle, full_matrices=False)
        small_b, small_a = u[:, :rank] * values[:rank], v[:rank]
        lost = float(values[rank:].norm())
    elif columns <= rows:
        small_b, small_a = middle, torch.eye(columns, dtype=middle.dtype, device=middle.device)
    else:
        small_b, small_a = torch.eye(rows, dtype=middle.dtype, device=middle.device), middle
    # Half precision has few small numbers, so the columns of B and the rows of A get one size.
    norms = small_b.norm(dim=0), small_a.norm(dim=1)
    ratio = torch.where((norms[0] > 0) & (norms[1] > 0), norms[0] / norms[1], 1).sqrt()
    blocks = (small_b / ratio).split(q_left.shape[1])
    b, a = torch.cat([q_left @ block for block in blocks]), ratio[:, None] * small_a @ q_right.mT
    rounded_b, rounded_a = b.to(dtype), a.to(dtype)
    if not (torch.isfinite(rounded_a).all() and torch.isfinite(rounded_b).all()):
        raise ValueError(f"dtype: expected one that holds the update of {name}, got {dtype}")
    error = math.hypot(lost, _distance(b, a, rounded_b.double(), rounded_a.double()))
    missing = rank - a.shape[0]
    if missing > 0:
        rounded_a = torch.nn.functional.pad(rounded_a, (0, 0, 0, missing))
        rounded_b = torch.nn.functional.pad(rounded_b, (0, missing))
    return LayerLora(
        name,
        rounded_a.cpu().contiguous(),
        rounded_b.cpu().contiguous(),
        error / size if size > 0 else 0.0,
    )


def _distance(b: Tensor, a: Tensor, rounded_b: Tensor, rounded_a: Tensor) -> float:
    """‖b a - rounded_b rounded_a‖_F, from products of thin matrices.

    It is the norm of D a + rounded_b E with small D and E, so nothing large cancels.
    """
    change_b, change_a = rounded_b - b, rounded_a - a
    square = (change_b.mT @ change_b * (a @ a.mT)).sum()
    square += (rounded_b.mT @ rounded_b * (change_a @ change_a.mT)).sum()
    square += 2 * (change_b.mT @ rounded_b * (a @ change_a.mT)).sum()
    return math.sqrt(max(float(square), 0.0))
