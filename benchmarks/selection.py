"""Times the choice of slices and cores by each rule, on the stacks of a ViT-B."""

from __future__ import annotations

from collections.abc import Callable

import torch

import tcur_kernels as tcur
from tcur_kernels.decompose import Deim, HeldSlices, Leverage

from .timing import Timing, interleave

#: name -> (n3, n1, n2, rank).
CASES = {
    "vit_b_attention_slices": (48, 768, 768, 8),
    "vit_b_mlp_up_slices": (12, 3072, 768, 8),
    "vit_tiny_attention_slices": (48, 192, 192, 4),
}
YARDSTICK = "read"

#: Contender -> rule and core. Exact singular vectors are by far the slowest. For the larger stacks
#: the rules "leverage" and "deim" use the range finder.
RULES = {
    "norm": ("norm", "zero"),
    "norm2": ("norm2", "zero"),
    "leverage": (Leverage("randomized"), "zero"),
    "leverage_power_1": (Leverage("randomized", power_iterations=1), "zero"),
    "leverage_exact": (Leverage("exact"), "zero"),
    "deim": (Deim("randomized"), "zero"),
    "inverse": ("inverse", "zero"),
    "uniform": ("uniform", "zero"),
    "norm_intersection": ("norm", "intersection"),
    "norm_projection": ("norm", "projection"),
}


def measure(case: str, rounds: int) -> dict[str, Timing]:
    """Checks every contender's slices against those of the stack, then times ``tensor_cur``.

    ``read`` is one sum over the stack, since every rule but "uniform" reads it at least once. The
    exact singular vectors are by far the slowest, so they are timed separately, in at most three
    rounds.

    Raises:
        RuntimeError: C or R are not the slices at the chosen indices.
    """
    n3, n1, n2, rank = CASES[case]
    weight = torch.randn(n3, n1, n2, generator=torch.Generator().manual_seed(0)) / n2**0.5
    slices = list(weight)

    def run(name: str) -> tcur.TensorCUR:
        rule, core = RULES[name]
        return tcur.tensor_cur(HeldSlices("weight", slices), rank, rule, core)

    def check(name: str) -> None:
        d = run(name)
        right = torch.equal(d.lateral, weight[:, :, d.columns])
        if not right or not torch.equal(d.horizontal, weight[:, d.rows]):
            raise RuntimeError(f"{name} is wrong: C or R are not the chosen slices")

    read: dict[str, Callable[[], object]] = {YARDSTICK: lambda: [w.sum() for w in slices]}
    fast = {name: (lambda name=name: run(name)) for name in RULES if name != "leverage_exact"}
    slow = {"leverage_exact": lambda: run("leverage_exact")}
    for name in fast:
        check(name)
    timings = interleave({**read, **fast}, YARDSTICK, rounds)
    apart = interleave({**read, **slow}, YARDSTICK, max(2, min(rounds, 3)))
    return {**timings, "leverage_exact": apart["leverage_exact"]}
