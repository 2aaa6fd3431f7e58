"""Pictures of a task of volumes: the best, the median and the worst test case, by some methods.

The methods are trained once more at the rate of their search, by the first seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from torch import Tensor

from tcur_kernels.files.whole import replacing

from .experiment import Plan
from .methods import METHODS, method
from .records import Rows
from .tasks import TASKS
from .tasks.volumes import Case, Volumes
from .training import train

matplotlib.use("Agg")
#: Method -> its cases, the same volumes for all.
Cases = Mapping[str, Sequence[Case]]


def draw(plan: Plan, rows: Rows, folder: Path) -> list[Path]:
    """Draws slices and surfaces for every task and method of a plan; returns the files.

    The cases are the best, the median and the worst of the last method.

    Raises:
        ValueError: a task has no volumes, or the search of a method is not done.
    """
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for name in plan.tasks:
        if not issubclass(TASKS[name], Volumes):
            known = [task for task, kind in TASKS.items() if issubclass(kind, Volumes)]
            raise ValueError(f"--tasks: expected tasks of volumes, {' '.join(known)}, got {name}")
        shown = _chosen(_cases(plan, rows, name))
        for what, figure in (("slices", _slices(shown)), ("surfaces", _surfaces(shown))):
            written.append(folder / f"comparison_{name}_{what}.png")
            with replacing(written[-1]) as fresh:
                figure.savefig(fresh, dpi=90, metadata={"Software": None})
            pyplot.close(figure)
    return written


def _cases(plan: Plan, rows: Rows, name: str) -> Cases:
    """What every method finds in the test volumes."""
    seed, found = plan.seeds[0], {}
    task = TASKS[name](plan.sources, plan.searched(name), seed)
    assert isinstance(task, Volumes)
    for each in plan.methods:
        rate = plan.chosen(name, each, rows)
        if rate is None:
            raise ValueError(f"--methods: expected those whose search is recorded, got {each}")
        found[each] = task.cases(train(task, method(each), rate, seed).model)
    return found


def _chosen(cases: Cases) -> Cases:
    """The best, the median and the worst case of the last method."""
    last = list(cases.values())[-1]
    order = sorted(range(len(last)), key=lambda number: -last[number].dice)
    numbers = [order[0], order[len(order) // 2], order[-1]]
    return {name: [own[number] for number in numbers] for name, own in cases.items()}


def _grid(cases: Cases, before: Sequence[str], **options: Any) -> tuple[Any, Any]:
    """A figure with a row for each case, and its axes."""
    titles = [*before, *(METHODS[name].label for name in cases)]
    figure, axes = pyplot.subplots(
        3,
        len(titles),
        figsize=(2.4 * len(titles), 7.2),
        layout="constrained",
        squeeze=False,
        **options,
    )
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    return figure, axes


def _slices(cases: Cases) -> Any:
    """The fullest slice of each case: image, truth, and what every method found."""
    figure, axes = _grid(cases, ("image", "truth"))
    for number, row in enumerate(axes):
        own = [each[number] for each in cases.values()]
        at = int((own[0].truth > 0).sum((0, 1)).argmax())
        masks = [None, own[0].truth, *(case.found for case in own)]
        told = ["", "", *(f"Dice {case.dice:.2f}" for case in own)]
        for axis, mask, text in zip(row, masks, told, strict=True):
            axis.imshow(own[0].image[:, :, at].T.numpy(), origin="lower", cmap="gray")
            if mask is not None and bool((mask[:, :, at] > 0).any()):
                shown = mask[:, :, at].float()
                shown = shown.where(shown > 0, float("nan"))
                axis.imshow(
                    shown.T.numpy(), origin="lower", cmap="autumn", alpha=0.55, vmin=1, vmax=2
                )
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(text, fontsize=8)
        row[0].set_ylabel(("best", "median", "worst")[number])
    return figure


def _surfaces(cases: Cases) -> Any:
    """The surface of all structures of each case, by marching cubes."""
    figure, axes = _grid(cases, ("truth",), subplot_kw={"projection": "3d"})
    for number, row in enumerate(axes):
        own = [each[number] for each in cases.values()]
        masks = [own[0].truth, *(case.found for case in own)]
        names = [("best", "median", "worst")[number], *(f"Dice {case.dice:.2f}" for case in own)]
        for axis, mask, text in zip(row, masks, names, strict=True):
            sides = [n * size for n, size in zip(mask.shape, own[0].spacing, strict=True)]
            axis.set(xlim=(0, sides[0]), ylim=(0, sides[1]), zlim=(0, sides[2]))
            axis.set_box_aspect(sides)
            axis.set_axis_off()
            axis.text2D(0.5, 0.0, text, transform=axis.transAxes, ha="center", fontsize=8)
            triangles = surface(mask, own[0].spacing)
            if len(triangles):
                axis.add_collection3d(
                    Poly3DCollection(triangles, facecolors="tab:orange", shade=True)
                )
    return figure


def surface(mask: Tensor, spacing: Sequence[float]) -> np.ndarray:
    """The surface of a mask by marching cubes: triangles ``[n, 3, 3]``, corners in mm.

    An empty mask has no triangles, nor has one without an outside.
    """
    from skimage.measure import marching_cubes

    inside = (mask > 0).float().numpy()
    if inside.min() == inside.max():
        return np.zeros((0, 3, 3))
    corners, faces, _, _ = marching_cubes(inside, 0.5, spacing=tuple(spacing))
    return corners[faces]
