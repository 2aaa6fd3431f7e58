"""The tables of docs/decomposition.md, and the plot of accuracies over rates."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, stdev

import matplotlib
from matplotlib import pyplot

from tcur_kernels.files.whole import replacing

from ..comparison.tasks.base import ROOT
from ..documents import fill
from . import records
from .experiment import METHODS, MORE, NAMES, RANKS, SEARCH, chosen, rates_of

matplotlib.use("Agg")
PAGES = (ROOT / "docs" / "decomposition.md",)
PLOT = ROOT / "docs" / "plots" / "conditioning.png"

#: The rate that the documents recommend, and the method that others are compared with.
RATE, OURS = 1e-3, "cores:orthonormal:norm:8"

Rows = dict[records.Key, dict[str, str]]


def write() -> list[Path]:
    """Writes the tables between their marks, and draws the plot. Returns the written files.

    Raises:
        ValueError: no page has the marks of a table.
    """
    rows = {records.key(row): row for row in records.read()}
    return [*fill(tables(rows), PAGES), _plot(rows)]


def tables(rows: Rows) -> dict[str, str]:
    """Name of the mark -> Markdown table."""
    return {
        "conditioning_methods": _methods(rows),
        "conditioning_rates": _rates(rows),
    }


def _methods(rows: Rows) -> str:
    """Every method of every task at the rate of its search, and its difference from ours."""
    lines = [
        "| task | method | numbers | rate | accuracy | difference |",
        "|---|---|---|---|---|---|",
    ]
    for task in NAMES:
        ours = _tests(rows, task, OURS)
        for method in METHODS:
            own = _tests(rows, task, method)
            if own is None or ours is None:
                continue
            rate = chosen(rows, task, method)
            spread = [a - b for a, b in zip(own, ours, strict=True)]
            apart = f"{mean(spread):+.3f} ± {stdev(spread) / math.sqrt(len(spread)):.3f}"
            cells = [
                task,
                said(method),
                f"{int(rows[task, method, rate, 0]['trained']):,}",
                "–" if method == "head" else f"{rate:g}",
                f"{mean(own):.3f} ± {stdev(own):.3f}",
                "–" if method == OURS else apart,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rates(rows: Rows) -> str:
    """For cores of every rank: the best rate, the recommended one, and three times that."""
    lines = [
        f"| task | basis | rank | best rate | accuracy | at {RATE:g} | at {3 * RATE:g} |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in NAMES:
        named = [
            (basis, str(rank), f"cores:{basis}:norm:{rank}")
            for basis in ("orthonormal", "slices")
            for rank in RANKS[task]
        ]
        for basis, rank, method in [*named, ("LoRA", "1", "lora:1"), ("LoRA", "8", "lora:8")]:
            curve = _curve(rows, task, method)
            if curve is None:
                continue
            best = max(curve, key=lambda rate: curve[rate])
            cells = [task, basis, rank, f"{best:g}"]
            cells += [f"{curve[rate]:.3f}" for rate in (best, RATE, 3 * RATE)]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append(f"| {task} | head alone | – | – | {_head(rows, task)} | – | – |")
    return "\n".join(lines) + "\n"


def _head(rows: Rows, task: str) -> str:
    """The accuracy of the head alone, seed 0."""
    row = rows.get((task, "head", 0.0, 0))
    return "–" if row is None else f"{float(row['test']):.3f}"


def _tests(rows: Rows, task: str, method: str) -> list[float] | None:
    """The test accuracies of all seeds at the rate of the search; None if some are missing."""
    every = [(task, method, rate, seed) for rate in rates_of(task, method) for seed in SEARCH]
    if any(key not in rows for key in every):
        return None
    keys = [(task, method, chosen(rows, task, method), seed) for seed in (*SEARCH, *MORE)]
    return [float(rows[key]["test"]) for key in keys] if all(k in rows for k in keys) else None


def _curve(rows: Rows, task: str, method: str) -> dict[float, float] | None:
    """Rate -> test accuracy of seed 0; None if some are missing."""
    keys = {rate: (task, method, rate, 0) for rate in rates_of(task, method)}
    if any(key not in rows for key in keys.values()):
        return None
    return {rate: float(rows[key]["test"]) for rate, key in keys.items()}


def said(method: str) -> str:
    """A method in words."""
    kind, *options = method.split(":")
    if kind == "head":
        return "head alone"
    if kind == "full":
        return "all weights"
    if kind == "lora":
        return f"LoRA r = {options[0]}"
    basis, rule, rank, *stacks = options
    return f'cores r = {rank}, {basis}, "{rule}"' + (", a stack a layer" if stacks else "")


def _plot(rows: Rows) -> Path:
    """Accuracy over the learning rate, a line for each rank, a panel for each task and basis."""
    figure, axes = pyplot.subplots(
        2, len(NAMES), figsize=(4 * len(NAMES), 6.5), layout="constrained", sharey="col"
    )
    for column, task in enumerate(NAMES):
        for row, basis in enumerate(("orthonormal", "slices")):
            axis = axes[row][column]
            for rank in RANKS[task]:
                curve = _curve(rows, task, f"cores:{basis}:norm:{rank}")
                if curve is not None:
                    axis.plot(list(curve), list(curve.values()), "o-", ms=3, label=f"r = {rank}")
            head = rows.get((task, "head", 0.0, 0))
            if head is not None:
                axis.axhline(float(head["test"]), color="gray", ls=":", label="head alone")
            axis.set(title=f"{task}, {basis}", xscale="log", xlabel="learning rate")
            axis.grid(alpha=0.3)
        axes[0][column].legend(fontsize=7)
        axes[0][column].set_ylabel("test accuracy")
        axes[1][column].set_ylabel("test accuracy")
    with replacing(PLOT) as fresh:
        figure.savefig(fresh, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    return PLOT
