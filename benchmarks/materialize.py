"""Times ``materialize`` into a reused buffer beside a copy of the same bytes and plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

import tcur_kernels as tcur
from tcur_kernels.operators import reference

from .baselines import S1, S2, eager
from .timing import Timing, interleave

#: name -> (n3, n1, n2, rank): the stacks of a ViT-B (MONAI's UNETR), a small one, lengths n3 with
#: few and with many prime factors, a high rank.
CASES = {
    "vit_b_attention": (48, 768, 768, 8),
    "vit_b_mlp_up": (12, 3072, 768, 8),
    "vit_b_mlp_down": (12, 768, 3072, 8),
    "vit_tiny_attention": (48, 192, 192, 4),
    "prime_47": (47, 768, 768, 8),
    "length_96": (96, 768, 768, 8),
    "prime_127": (127, 768, 768, 8),
    "rank_32": (12, 3072, 768, 32),
}
YARDSTICK = "stream"


def measure(case: str, rounds: int) -> dict[str, Timing]:
    """Checks every contender against float64, then times them.

    ``stream`` is ``torch.add(W, W, out=)``: one read and one write of the same bytes.

    Raises:
        RuntimeError: a contender is wrong; nothing is timed then.
    """
    n3, n1, n2, rank = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / rank**0.5

    weight, core = normal(n3, n1, n2), normal(n3, rank, rank)
    lateral, horizontal = normal(n3, n1, rank), normal(n3, rank, n2)
    factors = tcur.CURFactors(lateral, horizontal)
    spectra = reference.half_spectrum(lateral), reference.half_spectrum(horizontal)
    out, copy = torch.empty_like(weight), torch.empty_like(weight)
    s1, s2 = S1(weight, *spectra), S2(weight, *spectra)
    torch._dynamo.reset()
    compiled = torch.compile(eager)
    contenders: dict[str, Callable[[], torch.Tensor]] = {
        "materialize": lambda: tcur.materialize(weight, factors, core, out=out),
        "S1": lambda: s1(core),
        "S2": lambda: s2(core),
        "eager": lambda: eager(weight, *spectra, core),
        "compile": lambda: compiled(weight, *spectra, core),
    }
    _check(contenders, weight, lateral, core, horizontal)
    stream = {YARDSTICK: lambda: torch.add(weight, weight, out=copy)}
    return interleave({**stream, **contenders}, YARDSTICK, rounds)


def _check(
    contenders: dict[str, Callable[[], torch.Tensor]],
    weight: torch.Tensor,
    lateral: torch.Tensor,
    core: torch.Tensor,
    horizontal: torch.Tensor,
) -> None:
    """Compares a few rows with float64, which is cheap and enough to detect a wrong kernel."""
    rows = torch.arange(0, weight.shape[1], max(1, weight.shape[1] // 7))
    update = tcur.t_product(
        tcur.t_product(lateral[:, rows].double(), core.double()), horizontal.double()
    )
    exact = weight[:, rows].double() + update
    for name, run in contenders.items():
        error = float((run()[:, rows].double() - exact).norm() / exact.norm())
        if not error < 1e-5:
            raise RuntimeError(f"{name} is wrong: relative error {error:.2g}")
