"""``materialize_out``: writes W_eff of all slices into a buffer. It has no derivative."""

from __future__ import annotations

import torch

from .. import contract
from ..contract import Materialize, MaterializeOut, Operator
from . import materialize
from .given import check_materialize_out


def _fake(a: MaterializeOut) -> None:
    """Returns nothing, as the operator does."""


def _plain(a: MaterializeOut) -> None:
    all_slices = Materialize(*a[:5], a.out.dtype)
    if not a.weights or a.weights[0].ndim == 3 or len(a.weights) == a.core.shape[0]:
        a.out.copy_(materialize.plain(all_slices))
        return
    # Some weights hold several slices side by side: so do the matrices of W_eff.
    each = [weight.split(a.horizontal_hat.shape[1], 1) for weight in a.weights]
    slices = [part for parts in each for part in parts]
    w_eff = materialize.plain(all_slices._replace(weights=slices))
    if a.out.shape != (w_eff.numel(),):
        raise RuntimeError(f"tcur: out must be flat, [{w_eff.numel()}], got {list(a.out.shape)}")
    matrices = [torch.cat([*part], 1).flatten() for part in w_eff.split([*map(len, each)])]
    a.out.copy_(torch.cat(matrices))


contract.add(
    Operator(
        "materialize_out",
        MaterializeOut,
        check=check_materialize_out,
        fake=_fake,
        plain=_plain,
        flops=materialize.flops,
    )
)
