"""Slices by the gradient that they catch: a greedy rule with deflation, to compare with the others.

It chooses columns and rows of the stacked weights such that much of Σ_k w_k ‖Q_kᴴ Ĝ_k Q'_kᴴ‖² is
caught, where G is the gradient of the loss at the base and Q and Q' are the isometric factors.
Columns are chosen with all rows, rows with these columns, and columns once more with these rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tcur_kernels as tcur
from tcur_kernels.adapters.plan import make_plan
from tcur_kernels.decompose import Slices
from tcur_kernels.decompose.slices import bin_weights, half_spectrum
from tcur_kernels.operators.basis import orthonormal

from ..comparison.tasks.base import Task

#: Batches over which the gradient is averaged, and the seed of these batches.
BATCHES, SEED = 32, 1000


def gradients(task: Task, model: nn.Module, plan: tcur.Plan, seed: int) -> dict[str, Tensor]:
    """Stack name -> the gradient of its weights ``[n3, n1, n2]``, over some training batches."""
    generator = torch.Generator().manual_seed(SEED + seed)
    names = [member.module for stack in plan.stacks for member in stack.members]
    found = tcur.collect_gradients(
        model, range(BATCHES), lambda model, _: task.loss(model, generator), names
    )
    return {
        stack.name: torch.cat([found[member.module] for member in stack.members]).unflatten(
            0, (stack.n3, stack.n1)
        )
        for stack in plan.stacks
    }


class ByGradient:
    """The rule for one stack, whose gradient is given."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def __call__(
        self, stack: Slices, rank: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Chooses rows and columns."""
        weight = torch.cat([block for _, _, block in stack.blocks("weights")], 1)
        spectrum, grad = half_spectrum(weight), half_spectrum(self.gradient)
        weights = bin_weights(stack.n3)
        columns = _greedy(spectrum, grad, weights, rank)
        left = half_spectrum(orthonormal(weight[:, :, columns]))
        rows = _greedy(spectrum.mH, grad.mH @ left, weights, rank)
        turned = tcur.t_transpose(weight[:, rows])
        columns = _greedy(spectrum, grad @ half_spectrum(orthonormal(turned)), weights, rank)
        return torch.tensor(rows), torch.tensor(columns)


def _greedy(spectrum: Tensor, grad: Tensor, weights: Tensor, rank: int) -> list[int]:
    """Columns of ``spectrum`` whose span catches most of ``grad`` ``[K, n1, m]``, one by one."""
    rest, product = spectrum, grad.mH @ spectrum
    floor = 1e-10 * rest.abs().square().sum(1).mean(0)
    chosen: list[int] = []
    for _ in range(rank):
        sizes = rest.abs().square().sum(1)
        caught = torch.where(sizes > floor, product.abs().square().sum(1) / sizes, 0)
        scores = (weights[:, None] * caught).sum(0)
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        direction = rest[:, :, chosen[-1:]]
        size = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        direction = torch.where(size > 0, direction / size, 0)
        along = direction.mH @ rest
        rest = rest - direction @ along
        product = product - (grad.mH @ direction) @ along
    return chosen


def rules(
    task: Task, model: nn.Module, targets: list[str], rank: int, seed: int
) -> dict[str, ByGradient]:
    """Stack name -> the rule for it."""
    plan = make_plan(model, targets, rank)
    return {name: ByGradient(grad) for name, grad in gradients(task, model, plan, seed).items()}
