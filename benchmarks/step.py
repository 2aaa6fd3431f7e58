"""Times a training step through all linear layers of a ViT-B: forward and all gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .methods import METHODS, build, prepared, step_of
from .timing import Timing, interleave

#: name -> (tokens, autocast to bf16)
CASES = {
    "vit_b_216_tokens": (216, False),
    "vit_b_864_tokens": (864, False),
    "vit_b_4096_tokens": (4096, False),
    "vit_b_864_tokens_autocast": (864, True),
}
YARDSTICK = "frozen"
LIMIT = 5e-2  # detects a wrong gradient; bf16 through 72 layers has an error of 1e-2


def measure(case: str, rounds: int) -> dict[str, Timing]:
    """Compares the gradients of the cores with float64, then times steps.

    Raises:
        RuntimeError: a gradient is wrong; nothing is timed then.
    """
    tokens, autocast = CASES[case]
    base = build()
    # Under autocast tcur uses bf16 projections anyway, so tcur_bf16 would be the same.
    methods = [name for name in METHODS if not (autocast and name == "tcur_bf16")]
    models = {name: prepared(name, base) for name in methods}
    steps = {name: step_of(model, tokens, autocast) for name, model in models.items()}
    _check(models, steps, tokens)
    return interleave(steps, YARDSTICK, rounds)


def _check(
    models: dict[str, nn.Module], steps: dict[str, Callable[[], object]], tokens: int
) -> None:
    """Compares the gradients of all cores with those of the same model in float64."""
    exact = prepared("tcur", build().double())
    cores = {name: p for name, p in exact.named_parameters() if p.requires_grad}
    for contender in ("tcur", "tcur_bf16"):
        if contender not in models:
            continue
        steps[contender]()
        trained = {n: p for n, p in models[contender].named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, parameter in trained.items():
                cores[name].copy_(parameter)
        step_of(exact, tokens)()
        for name, parameter in trained.items():
            wanted, came = cores[name].grad, parameter.grad
            assert wanted is not None
            assert came is not None
            error = float((came - wanted).norm() / wanted.norm())
            print(f"{contender} {name}: relative error of the gradient {error:.1e}")
            if not error < LIMIT:
                raise RuntimeError(f"{contender}: gradient of {name} is off by {error:.2g}")
