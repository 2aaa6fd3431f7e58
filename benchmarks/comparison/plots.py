"""The plots of the comparison: scores over trained numbers and sizes, and curves of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.text import Text

from tcur_kernels.files.whole import replacing

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
            with replacing(written[-1]) as fresh:
                figure.savefig(fresh, dpi=100, metadata={"Software": None})
            pyplot.close(figure)
    return written


def _panels(tasks: list[str], label: str) -> tuple[Any, list[Any]]:
    """A figure with one panel for each task, two beside each other."""
    rows = (len(tasks) + 1) // 2
    columns = min(len(tasks), 2)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(6 * columns, 4.5 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    for axis, task in zip(axes.flat, tasks, strict=False):
        axis.set(title=task, xlabel=label, ylabel=TASKS[task].measure)
        axis.grid(alpha=0.3)
    return figure, list(axes.flat[: len(tasks)])


def with_all_seeds(methods: dict[str, Summary]) -> dict[str, Summary]:
    """Without methods of which fewer seeds are done: their intervals would hide the others."""
    seeds = {name: len(one.rows) + one.diverged for name, one in methods.items()}
    return {name: one for name, one in methods.items() if seeds[name] == max(seeds.values())}


def _scores(found: dict[str, dict[str, Summary]]) -> Any:
    """The score over the trained numbers, with 95 % intervals."""
    figure, axes = _panels(list(found), "trained numbers beside the head")
    points = []
    for axis, methods in zip(axes, found.values(), strict=True):
        named = []
        for name, summary in with_all_seeds(methods).items():
            score, numbers = interval(summary.numbers("test")), summary.middle("trained")
            if name == "head":
                axis.axhline(score.mean, color="gray", ls=":", label=METHODS[name].label)
                continue
            color = "tab:red" if name.startswith("tcurlora") else "tab:blue"
            axis.errorbar(numbers, score.mean, score.half, fmt="o", ms=4, capsize=2, color=color)
            named.append((numbers, score.mean, METHODS[name].label))
        axis.set_xscale("log")
        least, most = axis.get_xlim()
        axis.set_xlim(least, most * (most / least) ** 0.3)  # room for names
        points.append(named)
    figure.draw_without_rendering()  # from here on every place is final
    for axis, named in zip(axes, points, strict=True):
        _name(axis, named)
    return figure


def _name(axis: Any, points: list[tuple[float, float, str]]) -> None:
    """Writes names to the right of points, each where it lies on no other name."""
    placed: list[Any] = []
    for x, y, name in sorted(points, key=lambda point: -point[1]):
        text = axis.annotate(
            name,
            (x, y),
            (8, 0),
            textcoords="offset points",
            fontsize=7,
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "gray", "shrinkA": 0},
        )
        for shift in (sign * 9 * step for step in range(len(points)) for sign in (1, -1)):
            text.set_position((8, shift))
            text.update_positions(axis.figure.canvas.get_renderer())
            box = Text.get_window_extent(text)  # without its line
            if not any(box.overlaps(other) for other in placed):
                break
        placed.append(box)


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
