"""What the benchmarks of serving share: layers, adapters with random cores, and a check of rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import tcur_kernels as tcur

#: Largest relative error of a row against the same model in float64 with its adapter alone.
LIMIT = 1e-5


class Block(nn.Module):
    """The linear layers of a transformer block of any width; q, k, v share their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., width] to the same shape."""
        x = x + self.out(self.query(x) + self.key(x) + self.value(x))
        return x + self.down(self.up(x))


def layers(width: int, blocks: int) -> nn.Module:
    """Frozen blocks; the same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(blocks))).requires_grad_(False)


def random_cores(adapter: tcur.Adapter, generator: torch.Generator) -> dict[str, Tensor]:
    """Cores of one adapter, by stack name."""
    return {
        name: 1e-2 * torch.randn(stack.core.shape, generator=generator)
        for name, stack in adapter.stacks.items()
    }


@torch.no_grad()
def file_of(
    base: nn.Module, path: Path, generator: torch.Generator, **how: object
) -> tuple[Path, tcur.Adapter]:
    """An adapter of a copy of ``base`` with random cores, and its file."""
    adapter = tcur.adapt(copy.deepcopy(base), **how)  # type: ignore[arg-type]
    for name, core in random_cores(adapter, generator).items():
        adapter.stacks[name].core.copy_(core)
    adapter.save(path)
    return path, adapter


def without_gradients(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same, as a server runs it."""

    def served() -> Tensor:
        with torch.no_grad():
            return run()

    return served


def check(name: str, y: Tensor, wanted: Sequence[Tensor]) -> None:
    """Compares rows or sequences with what they should be, in float64.

    Raises:
        RuntimeError: one is off by more than `LIMIT`.
    """
    for index, (own, exact) in enumerate(zip(y, wanted, strict=True)):
        error = float((own - exact).norm() / exact.norm())
        if not error < LIMIT:
            raise RuntimeError(f"{name}: row {index} is off by {error:.2g}")
