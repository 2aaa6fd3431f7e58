"""Times the forward of a thousand adapters in one batch through all linear layers of a ViT-B."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import tcur_kernels as tcur
from tcur_kernels.adapters.install import stacks_of

from . import methods
from .timing import Timing, interleave

#: name -> (adapters, rows of the batch, tokens per row)
CASES = {
    "vit_b_17_tokens": (1000, 1000, 17),
    "vit_b_1_token": (1000, 1000, 1),
}
YARDSTICK = "one"
SAMPLE = 3  # rows that are checked
LIMIT = 1e-5


def measure(case: str, rounds: int) -> dict[str, Timing]:
    """Compares some rows with their adapter alone in float64, then times the batch.

    Raises:
        RuntimeError: a row is wrong, or the cores take more than 20 kB per adapter.
    """
    count, rows, tokens = CASES[case]
    base = methods.build()
    adapter = tcur.adapt(copy.deepcopy(base), rank=methods.RANK)
    generator = torch.Generator().manual_seed(1)
    cores = adapter.stack_cores([_cores(adapter, generator) for _ in range(count)])
    if cores.nbytes > 20_000 * count:
        raise RuntimeError(f"{count} adapters take {cores.nbytes / 1e6:.1f} MB")
    print(f"cores of {count} adapters: {cores.nbytes / 1e6:.1f} MB")
    ids = torch.randperm(count, generator=generator)[:rows]
    same = torch.zeros_like(ids)
    x = torch.randn(rows, tokens, methods.WIDTH, generator=generator)
    with torch.no_grad():
        for name, stack in adapter.stacks.items():
            stack.core.copy_(cores[name][0])

    def batch(chosen: Tensor) -> Callable[[], object]:
        def run() -> Tensor:
            with torch.no_grad(), adapter.batch(cores, chosen):
                y: Tensor = adapter.model(x)
                return y

        return run

    def plain(model: nn.Module) -> Callable[[], object]:
        def run() -> Tensor:
            with torch.no_grad():
                y: Tensor = model(x)
                return y

        return run

    _check(adapter, cores, ids, x, batch(ids)())
    contenders = {
        "one": plain(adapter.model),
        "one_by_factors": batch(same),
        "thousand": batch(ids),
        "frozen": plain(base),
    }
    return interleave(contenders, YARDSTICK, rounds)


def _cores(adapter: tcur.Adapter, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name: 1e-2 * torch.randn(stack.core.shape, generator=generator)
        for name, stack in adapter.stacks.items()
    }


def _check(
    adapter: tcur.Adapter, cores: Mapping[str, Tensor], ids: Tensor, x: Tensor, y: object
) -> None:
    """Compares some rows with the same model in float64 that has only their adapter."""
    assert isinstance(y, Tensor)
    exact = copy.deepcopy(adapter.model).double()
    stacks = stacks_of(exact)
    for row in torch.linspace(0, len(x) - 1, SAMPLE).long().tolist():
        with torch.no_grad():
            for name, own in cores.items():
                stacks[name].core.copy_(own[ids[row]])
            wanted = exact(x[row : row + 1].double())[0]
        error = float((y[row] - wanted).norm() / wanted.norm())
        print(f"row {row}, adapter {ids[row]}: relative error {error:.1e}")
        if not error < LIMIT:
            raise RuntimeError(f"row {row} is off by {error:.2g}")
