"""Table, pictures and list of files of the segmentation job."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # PNGs need no display

import matplotlib.pyplot as plt
import torch
from torch import nn

from plain_table import lay_out
from segmentation.evaluation import DEFINITIONS, mean, predict
from segmentation.files import whole_file
from segmentation.names import braces
from segmentation.preparation import Recipe
from segmentation.training import Report

LEGEND = """\
||U||: the Frobenius norm of the core that the layers of a stack share. It starts at 0, where the
  network computes what it did before, and tells how far training has moved from there. ||dL/dU||:
  that of its gradient, at the first and at the last step. If ||U|| stays near 0, --core-lr is too
  small; if it jumps and the loss with it, too large."""

#: Files of a run and what they are, in the order in which they are listed.
_FILES = {
    "{method}.safetensors": "what was trained, at the step with the best validation Dice; for "
    "predict.py and export.py",
    "{method}_last.safetensors": "the same at the last check",
    "{method}_state.pt": "not done: --resume goes on from here",
    "{method}.json": "losses, Dice and norms over the training; --resume skips what is done",
    "results.json": "this report, and the scores of every volume",
    "slices.png": "a slice of up to three volumes: image, truth, and what each network found",
    "curves.png": "loss, Dice, and norms of cores and gradients over the training",
    "target/dataset.json": "the datalist of the demo's volumes",
}


def table(runs: Sequence[Mapping[str, Any]], recipe: Recipe) -> str:
    """The final table; with several seeds, mean ± standard deviation over them."""

    def cell(values: Sequence[float], form: str) -> str:
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return "-"
        text = format(statistics.fmean(finite), form)
        return text if len(finite) == 1 else f"{text} ± {statistics.stdev(finite):{form}}"

    rows = [("", "Dice", "HD95 [mm]", "trained", "s/step", "peak MB", "best step")]
    notes = []
    for name in runs[0]["scores"]:
        row = [name]
        for metric, form in (("dice", ".3f"), ("hd95", ".1f")):
            row.append(cell([mean(run["scores"][name][metric]) for run in runs], form))
        report = [run["reports"].get(name) for run in runs]
        if report[0] is None:
            row += ["0", "-", "-", "-"]
        else:
            row.append(f"{report[0]['parameters']:,}")
            row.append(cell([r["seconds_per_step"] for r in report], ".2f"))
            row.append(cell([r["megabytes"] for r in report], ".0f"))
            row.append(" ".join(str(r["best_step"]) for r in report))
        rows.append(tuple(row))
        distances = [d for run in runs for d in run["scores"][name]["hd95"]]
        empty = sum(map(math.isnan, distances))
        if empty:
            notes.append(f"{name}: no HD95 in {empty} of {len(distances)} volumes")
    lines = lay_out(rows)
    if recipe.classes > 2:
        lines += ["", *_by_class(runs, recipe)]
    lines += ["", _scored_on(runs)]
    spacing = " x ".join(f"{size:g}" for size in recipe.spacing)
    lines += [*notes, DEFINITIONS.format(spacing=spacing)]
    norms = [
        f"seed {run['seed']}, {name}, {stack}: ||U|| 0 -> {norms[-1]:.3g}, ||dL/dU|| "
        f"{report['grad_norm'][stack][0]:.2g} -> {report['grad_norm'][stack][-1]:.2g}"
        for run in runs
        for name, report in run["reports"].items()
        for stack, norms in report["core_norm"].items()
    ]
    return "\n".join(lines + (["", *norms, LEGEND] if norms else []))


def _scored_on(runs: Sequence[Mapping[str, Any]]) -> str:
    """Which volumes the table is about."""
    what = f"{runs[0]['volumes']} {runs[0]['scored']} volumes" + (" a seed" if runs[1:] else "")
    if runs[0]["scored"] == "test":
        return f"Scored on {what}, by which nothing was chosen."
    return (
        f"Scored on {what}, which also chose the best step, so these numbers are too good; a "
        '"test" section would give honest ones.'
    )


def _by_class(runs: Sequence[Mapping[str, Any]], recipe: Recipe) -> list[str]:
    """A table with the Dice and the HD95 of every foreground class, over all seeds."""
    rows: list[tuple[str, ...]] = [("class", "network", "Dice", "HD95 [mm]", "volumes")]
    for number in range(1, recipe.classes):
        for name in runs[0]["scores"]:
            columns = {}
            for metric in ("dice", "hd95"):
                scores = [run["scores"][name]["by_class"][metric] for run in runs]
                columns[metric] = [volume[number - 1] for seed in scores for volume in seed]
            rows.append(
                (
                    recipe.name_of(number),
                    name,
                    f"{mean(columns['dice']):.3f}",
                    f"{mean(columns['hd95']):.1f}",
                    str(sum(not math.isnan(dice) for dice in columns["dice"])),
                )
            )
    return lay_out(rows)


def files_written(folder: Path, methods: Sequence[str]) -> str:
    """The files of a run that exist, each with what it is; alike ones in braces, as in a shell."""
    folders = [folder, *sorted(folder.glob("seed*"))]
    lines = []
    for pattern, meaning in _FILES.items():
        names = [(m, pattern.format(method=m)) for m in dict.fromkeys(methods)]
        there: dict[str, list[str]] = {}
        for one in folders:
            found = [method for method, name in names if (one / name).is_file()]
            if found:
                file = pattern.format(method=braces(found))
                there.setdefault(file, []).append(one.relative_to(folder).as_posix())
        for file, among in there.items():
            lines += [f"  {folder / braces(among) / file}", f"      {meaning}"]
    return "\n".join(["written:", *lines])


def draw_curves(reports: Mapping[str, Report], file: Path) -> None:
    """Plots loss, Dice, and for each stack the norms of core and gradient, over the training."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    for name, report in reports.items():
        window = max(1, len(report.loss) // 15)
        smooth = torch.tensor(report.loss).unfold(0, window, 1).mean(1)
        axes[0, 0].plot(range(window, len(report.loss) + 1), smooth, label=name)
        axes[0, 1].plot(list(report.dice), list(report.dice.values()), marker="o", label=name)
        for stack, norms in report.core_norm.items():
            axes[1, 0].plot(range(1, len(norms) + 1), norms, label=f"{name}, {stack}")
            gradients = report.grad_norm[stack]
            axes[1, 1].semilogy(range(1, len(gradients) + 1), gradients, linewidth=0.8)
    titles = (
        "training loss (moving mean)",
        "validation Dice",
        "||U|| per stack",
        "||dL/dU|| per stack",
    )
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    with whole_file(file) as fresh:
        figure.savefig(fresh, dpi=110)
    plt.close(figure)


def draw_slices(
    recipe: Recipe,
    models: Mapping[str, nn.Module],
    volumes: Sequence[Mapping[str, Any]],
    file: Path,
) -> None:
    """Draws the fullest slice of up to three volumes: image, truth, and every prediction."""
    count = min(3, len(volumes))
    titles = ["image", "truth", *models]
    figure, axes = plt.subplots(
        count,
        len(titles),
        figsize=(2.2 * len(titles), 2.4 * count),
        squeeze=False,
        layout="constrained",
    )
    for row, volume in zip(axes, volumes, strict=False):
        image, truth = volume["image"].as_tensor(), volume["label"].as_tensor()[0]
        at = int((truth > 0).sum((0, 1)).argmax())
        masks = [torch.zeros_like(truth), truth]
        masks += [predict(recipe, model, image).argmax(1)[0].cpu() for model in models.values()]
        for axis, title, mask in zip(row, titles, masks, strict=True):
            axis.imshow(image[0, :, :, at].T.numpy(), origin="lower", cmap="gray")
            shown = mask[:, :, at].float()
            axis.imshow(
                shown.where(shown > 0, float("nan")).T.numpy(),
                origin="lower",
                cmap="autumn",
                alpha=0.55,
                vmin=1,
                vmax=max(2, recipe.classes),
            )
            axis.set_title(title if axis in axes[0] else "", fontsize=10)
            axis.axis("off")
    with whole_file(file) as fresh:
        figure.savefig(fresh, dpi=110)
    plt.close(figure)
