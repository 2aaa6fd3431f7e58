"""The plots of the comparison: scores over trained numbers and sizes, and curves of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot

from .methods import FEW, METHODS
from .records import Rows
from .summary import Summary, experiments, interval, main_size, sizes, summaries
from .tasks import TASKS

matplotlib.use("Agg")


def draw(rows: Rows, data: str, folder: Path) -> list[Path]:
    """Draws all plots of some data; returns their files."""
    tasks = [task for each, task in experiments(rows) if each == data and sizes(rows, data, task)]
    found = {task: summaries(rows, data, task, main_size(rows, data, task)) for task in tasks}
    files = {"comparison": _scores(found), "comparison_curves": _curves(found)}
    files["comparison_sizes"] = _sizes(
        rows, data, [t for t in tasks if len(sizes(rows, data, t)) > 1]
    )
    written = []
    for name, figure in files.items():
        if figure is not None:
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=100, metadata={"Software": None})
            pyplot.close(figure)
    return written


def _panels(tasks: list[str], label: str) -> tuple[Any, list[Any]]:
    """A figure with one panel for each task."""
    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=(4.6 * len(tasks), 4.4), layout="constrained", squeeze=False
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        axis.set(title=task, xlabel=label, ylabel=TASKS[task].measure)
        axis.grid(alpha=0.3)
    return figure, list(axes[0])


def _scores(found: dict[str, dict[str, Summary]]) -> Any:
    """The score over the trained numbers, with 95 % intervals."""
    figure, axes = _panels(list(found), "trained numbers beside the head")
    for axis, methods in zip(axes, found.values(), strict=True):
        for name, summary in methods.items():
            score, numbers = interval(summary.numbers("test")), summary.middle("trained")
            if name == "head":
                axis.axhline(score.mean, color="gray", ls=":", label=METHODS[name].label)
                continue
            color = "tab:red" if name.startswith("tcurlora") else "tab:blue"
            axis.errorbar(numbers, score.mean, score.half, fmt="o", ms=4, capsize=2, color=color)
            axis.annotate(
                METHODS[name].label,
                (numbers, score.mean),
                (4, 4),
                textcoords="offset points",
                fontsize=6,
            )
        axis.set_xscale("log")
    return figure


def _curves(found: dict[str, dict[str, Summary]]) -> Any:
    """The mean loss of the training, over its parts."""
    figure, axes = _panels(list(found), "part of the training")
    for axis, methods in zip(axes, found.values(), strict=True):
        axis.set(ylabel="loss", yscale="log")
        for name in (name for name in FEW if name in methods):
            curves = [row["curve"].split() for row in methods[name].rows.values() if row["curve"]]
            if curves:
                mean = np.array(curves, dtype=float).mean(0)
                axis.plot(np.linspace(0, 1, len(mean)), mean, label=METHODS[name].label)
        axis.legend(fontsize=7)
    return figure


def _sizes(rows: Rows, data: str, tasks: list[str]) -> Any:
    """The score over the number of training examples; None if every task has one size."""
    if not tasks:
        return None
    figure, axes = _panels(tasks, "training examples")
    for axis, task in zip(axes, tasks, strict=True):
        every = {size: summaries(rows, data, task, size) for size in sizes(rows, data, task)}
        for name in FEW:
            own = {
                size: interval(f[name].numbers("test")) for size, f in every.items() if name in f
            }
            if own:
                axis.errorbar(
                    list(own),
                    [one.mean for one in own.values()],
                    [one.half for one in own.values()],
                    fmt="o-",
                    ms=3,
                    capsize=2,
                    label=METHODS[name].label,
                )
        axis.set_xscale("log")
        axis.legend(fontsize=7)
    return figure
