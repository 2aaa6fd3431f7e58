"""Table and pictures of the segmentation example."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # PNGs need no display

import matplotlib.pyplot as plt
import torch
from monai.data import CacheDataset
from torch import nn

from plain_table import lay_out
from segmentation_training import Report, mean, predict


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The final table; with several seeds, mean ± standard deviation over them."""

    def cell(values: Sequence[float], form: str) -> str:
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return "-"
        text = format(statistics.fmean(finite), form)
        return text if len(finite) == 1 else f"{text} ± {statistics.stdev(finite):{form}}"

    rows = [("", "Dice", "HD95 [mm]", "trained", "s/step", "peak MB")]
    notes = []
    for name in runs[0]["scores"]:
        row = [name]
        for metric, form in (("dice", ".3f"), ("hd95", ".1f")):
            row.append(cell([mean(run["scores"][name][metric]) for run in runs], form))
        report = [run["reports"].get(name) for run in runs]
        if report[0] is None:
            row += ["0", "-", "-"]
        else:
            row.append(f"{report[0]['parameters']:,}")
            row.append(cell([r["seconds_per_step"] for r in report], ".2f"))
            row.append(cell([r["megabytes"] for r in report], ".0f"))
        rows.append(tuple(row))
        distances = [d for run in runs for d in run["scores"][name]["hd95"]]
        empty = sum(map(math.isnan, distances))
        if empty:
            notes.append(f"{name}: nothing found in {empty} of {len(distances)} volumes, no HD95")
    lines = lay_out(rows)
    for run in runs:
        for name, report in run["reports"].items():
            for stack, norms in report["core_norm"].items():
                gradient = report["grad_norm"][stack]
                notes.append(
                    f"seed {run['seed']}, {name}, {stack}: ||U|| 0 -> {norms[-1]:.3g}, "
                    f"||dL/dU|| {gradient[0]:.2g} -> {gradient[-1]:.2g}"
                )
    return "\n".join(lines + notes)


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
        "held-out Dice",
        "||U|| per stack",
        "||dL/dU|| per stack",
    )
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_slices(
    args: argparse.Namespace, models: Mapping[str, nn.Module], volumes: CacheDataset, file: Path
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
        masks += [predict(args, model, image).argmax(1)[0].cpu() for model in models.values()]
        for axis, title, mask in zip(row, titles, masks, strict=True):
            axis.imshow(image[0, :, :, at].T.numpy(), origin="lower", cmap="gray")
            shown = mask[:, :, at].float()
            axis.imshow(
                shown.where(shown > 0, float("nan")).T.numpy(),
                origin="lower",
                cmap="autumn",
                alpha=0.55,
                vmin=1,
                vmax=max(2, args.out_channels),
            )
            axis.set_title(title if axis in axes[0] else "", fontsize=10)
            axis.axis("off")
    figure.savefig(file, dpi=110)
    plt.close(figure)
