"""What a layer costs the host beside its arithmetic: forward and backward in sizes next to nothing.

On a GPU the host runs ahead of the device as long as a layer's Python takes less than its kernels.
Here sizes are so small that nearly nothing but the host's work is left, and a frozen ``nn.Linear``
of the same size is the yardstick. One call goes through 1000 layers, so that milliseconds read as
microseconds of one layer, forward and backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

import tcur_kernels as tcur

from .timing import Timing, interleave

#: name -> (tokens, width, slices, rank)
CASES = {"tiny_16": (8, 16, 4, 2)}
YARDSTICK = "linear"
LAYERS = 1000
LIMIT = 1e-4


def measure(case: str, rounds: int) -> dict[str, Timing]:
    """Checks the gradients of the cores against each other, then times.

    Raises:
        RuntimeError: a gradient is wrong; nothing is timed then.
    """
    tokens, width, slices, rank = CASES[case]
    generator = torch.Generator().manual_seed(0)
    base = nn.Sequential(*(nn.Linear(width, width) for _ in range(slices))).requires_grad_(False)
    x = torch.randn(tokens, width, generator=generator, requires_grad=True)
    models: dict[str, nn.Module] = {"linear": base}
    cores = {}
    for mode in ("materialized", "factored"):
        models[mode] = copy.deepcopy(base)
        (stack,) = tcur.adapt(models[mode], rank=rank, mode=mode).stacks.values()
        with torch.no_grad():
            stack.core.copy_(1e-2 * torch.randn(stack.core.shape, generator=generator))
        cores[mode] = stack.core
    with torch.no_grad():
        cores["factored"].copy_(cores["materialized"])
    steps = {name: _step_of(model, x, LAYERS // slices) for name, model in models.items()}
    _check(models, cores, x)
    timings = interleave(steps, YARDSTICK, rounds)
    for name in cores:
        more = timings[name].median_ms - timings[YARDSTICK].median_ms
        print(f"{name}: {more:.1f} us more than nn.Linear per layer, forward and backward")
    return timings


def _step_of(model: nn.Module, x: torch.Tensor, times: int) -> Callable[[], object]:
    def run() -> None:
        for _ in range(times):
            model(x).backward(x)

    return run


def _check(models: dict[str, nn.Module], cores: dict[str, nn.Parameter], x: torch.Tensor) -> None:
    """Both ways to the gradient of the core agree."""
    grads = [torch.autograd.grad(models[name](x), core, x)[0] for name, core in cores.items()]
    error = float((grads[0] - grads[1]).norm() / grads[0].norm())
    print(f"relative difference of the gradients of the core: {error:.1e}")
    if not error < LIMIT:
        raise RuntimeError(f"gradients of the core differ by {error:.2g}")
