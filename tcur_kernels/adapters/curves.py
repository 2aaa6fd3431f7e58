"""Error against rank for the stacks of a model: a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..decompose import RULES, Slices, error_curve
from ..decompose.slices import MAX_WORKSPACE
from ..decompose.tensor import as_slices
from ..files.whole import replacing
from .linear_maps import find_weights
from .plan import Plan, StackPlan
from .streaming import BaseFiles, on_meta

#: The default ranks of a curve.
RANKS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Curve:
    """The curves of one stack.

    Attributes:
        stack: its plan.
        ranks: r, ascending.
        errors: "best" and rules -> relative errors, one per rank.
    """

    stack: StackPlan
    ranks: tuple[int, ...]
    errors: dict[str, list[float]]

    def __str__(self) -> str:
        stack = self.stack
        head = f"stack {stack.name}: {stack.n3} slices of {stack.n1} x {stack.n2}, relative errors"
        lines = [head, f"{'rank':>6}{'core':>12}" + "".join(f"{n:>12}" for n in self.errors)]
        for index, rank in enumerate(self.ranks):
            errors = "".join(f"{values[index]:12.4f}" for values in self.errors.values())
            lines.append(f"{rank:6}{stack.n3 * rank * rank:12,}{errors}")
        return "\n".join(lines)


def model_curves(
    model: nn.Module,
    plan: Plan,
    ranks: Sequence[int] = RANKS,
    selections: Sequence[str] = ("norm", "deim"),
    weights: str | Path | None = None,
    max_workspace: int = MAX_WORKSPACE,
    progress: bool = False,
) -> list[Curve]:
    """Relative error against rank of every stack of a plan; see `decompose.error_curve`.

    Args:
        model: the planned model.
        plan: its stacks.
        ranks: ranks greater than min(n1, n2) of a stack are skipped for that stack.
        selections: names of rules.
        weights: for a model on the meta device, its safetensors files; see `adapt`.
        max_workspace, progress: see `tensor_cur`.

    Raises:
        ValueError: a rule is unknown, no rank fits a stack, or weights are missing.
    """
    unknown = [name for name in selections if name not in RULES]
    if unknown:
        raise ValueError(f"selections: expected some of {', '.join(RULES)}, got {unknown[0]!r}")
    missing = on_meta(model)
    if missing is not None and weights is None:
        raise ValueError(f"weights: expected the files of the model, got None ({missing} is meta)")
    files = None if weights is None else BaseFiles(model, weights, max_workspace, progress)
    found = find_weights(model)
    curves = []
    for stack in plan.stacks:
        fitting = tuple(sorted(r for r in set(ranks) if 1 <= r <= min(stack.n1, stack.n2)))
        if not fitting:
            most = min(stack.n1, stack.n2)
            raise ValueError(f"ranks: expected one of 1 to {most} for {stack.name}, got {ranks}")
        source: Slices | None = None if files is None else files.slices_of(stack, any_dtype=True)
        if source is None:
            parts = [found[member.module].tensor for member in stack.members]
            source = as_slices(stack.name, parts, max_workspace, progress, stack.n1)
        curves.append(Curve(stack, fitting, error_curve(source, fitting, selections)))
    return curves


def plot_curves(curves: Sequence[Curve], path: str | Path) -> None:
    """Writes a PNG with one panel per stack; an existing file is replaced only by a complete one.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError("a picture needs matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(4 * len(curves), 3.5), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, curve in zip(panels, curves, strict=True):
        for name, errors in curve.errors.items():
            panel.plot(curve.ranks, errors, marker="o", markersize=3, label=name)
        panel.set_xscale("log", base=2)
        panel.set_ylim(0)
        panel.set_xlabel("rank")
        panel.set_title(f"{curve.stack.name}: {curve.stack.n3} slices", fontsize=10)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("relative error")
    panels[0].legend()
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
