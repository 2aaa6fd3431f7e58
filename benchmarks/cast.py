"""Compares autocast's cast of frozen fp32 weights to bf16 with writing W + C*U*R as bf16."""

from __future__ import annotations

import torch

import tcur_kernels as tcur

from .materialize import CASES as SHAPES
from .timing import Timing, interleave

CASES = {name: SHAPES[name] for name in ("vit_b_attention", "vit_b_mlp_up", "vit_b_mlp_down")}
YARDSTICK = "autocast"


def measure(case: str, rounds: int) -> dict[str, Timing]:
    """Times the cast and our kernel.

    ``autocast`` makes new tensors, as autocast does; ``copy`` writes to existing ones.

    Raises:
        RuntimeError: our bf16 weights are wrong; nothing is timed then.
    """
    n3, n1, n2, rank = CASES[case]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n1, n2, generator=generator) for _ in range(n3)]
    factors = tcur.CURFactors(
        torch.stack([w[:, :rank] for w in weights]), torch.stack([w[:rank] for w in weights])
    )
    core = 1e-2 * torch.randn(n3, rank, rank, generator=generator)
    out = torch.empty(n3, n1, n2, dtype=torch.bfloat16)
    kept = torch.empty_like(out)

    def materialize() -> torch.Tensor:
        return tcur.materialize(weights, factors, core, out=out)

    exact = tcur.materialize(weights, factors, core)
    error = float((materialize().float() - exact).norm() / exact.norm())
    if not error < 2.0**-8:
        raise RuntimeError(f"materialize to bf16 is wrong: relative error {error:.2g}")
    contenders = {
        YARDSTICK: lambda: [weight.to(torch.bfloat16) for weight in weights],
        "copy": lambda: [k.copy_(w) for k, w in zip(kept, weights, strict=True)],
        "materialize": materialize,
    }
    return interleave(contenders, YARDSTICK, rounds)
