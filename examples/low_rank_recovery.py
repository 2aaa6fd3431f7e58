"""A brain, recovered exactly from a few of its rows and columns.

The MNI152 template is a tensor of axial slices ``[n3, n1, n2]``; it comes with nilearn, so nothing
is downloaded. The truncated t-SVD reduces it to tubal rank r. It then equals C * U * R with r
lateral and r horizontal slices *exactly*, up to rounding, so the rest of it need never be measured.
The template itself has full rank. For it, r lateral and r horizontal slices give an approximation,
which is shown beside the best one of that rank.

    python examples/low_rank_recovery.py [--rank 12] [--selection deim] [--output runs/low_rank]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tcur_kernels as tcur
from tcur_kernels.decompose import RULES
from tcur_kernels.files.whole import replacing


def brain(resolution: int) -> Tensor:
    """The template at a resolution in mm, fp64 ``[slices, rows, columns]`` in 0 … 1, cropped."""
    from nilearn.datasets import load_mni152_template

    volume = np.asarray(load_mni152_template(resolution=resolution).dataobj, dtype=np.float64)
    box = np.ix_(*(np.flatnonzero((volume > 0).any(axis)) for axis in ((1, 2), (0, 2), (0, 1))))
    tensor = torch.from_numpy(np.ascontiguousarray(volume[box].transpose(2, 1, 0)))
    return tensor / tensor.max()


def truncated(a: Tensor, rank: int) -> Tensor:
    """The best approximation of tubal rank ``rank``: the truncated t-SVD (Kilmer & Martin 2011)."""
    u, s, v = tcur.t_svd(a)
    left = tcur.t_product(u[:, :, :rank], s[:, :rank, :rank])
    return tcur.t_product(left, tcur.t_transpose(v[:, :, :rank].contiguous()))


def recover(measured: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """C * U * R, computed only from the given rows and columns of ``measured``."""
    lateral, horizontal = measured[:, :, columns], measured[:, rows]
    core = tcur.t_pinv(lateral[:, rows])
    return tcur.t_product(tcur.t_product(lateral, core), horizontal)


def main() -> None:
    """Recovers, prints the errors, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument("--selection", choices=RULES, default="deim")
    parser.add_argument("--resolution", type=int, default=2, help="of the template, in mm")
    parser.add_argument("--output", type=Path, default=Path("runs/low_rank"))
    args = parser.parse_args()

    whole = brain(args.resolution)
    exact = truncated(whole, args.rank)
    chosen = tcur.tensor_cur(exact, args.rank, args.selection)
    recovered = recover(exact, chosen.rows, chosen.columns)
    of_whole = tcur.tensor_cur(whole, args.rank, args.selection, "projection")

    n3, n1, n2 = whole.shape
    seen = 1 - (1 - args.rank / n1) * (1 - args.rank / n2)
    norm, best = whole.norm(), exact - whole
    print(f"{n3} slices of {n1} x {n2}; {args.rank} rows and columns by {args.selection!r}")
    print(f"seen: {100 * seen:.1f} % of the numbers")
    print(f"tubal rank {tcur.tubal_rank(exact, 1e-9)} of the truncated brain, {n1} x {n2} slices")
    print(f"truncated brain, recovered: relative error {chosen.relative_error(exact):.1e}")
    print(f"the brain itself: {of_whole.relative_error(whole):.3f}, best {best.norm() / norm:.3f}")

    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "low_rank_recovery.png"
    panels = {
        "truncated brain": exact,
        f"what is seen of it ({100 * seen:.0f} %)": masked(exact, chosen.rows, chosen.columns),
        f"recovered: {chosen.relative_error(exact):.0e}": recovered,
        "the brain itself": whole,
        f"C * U * R of it: {of_whole.relative_error(whole):.2f}": of_whole.reconstruct(),
        f"best of rank {args.rank}: {best.norm() / norm:.2f}": exact,
    }
    draw(panels, path)
    print(f"picture: {path}")


def masked(a: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Only the chosen rows and columns; the rest is NaN, which is drawn in blue."""
    seen = torch.full_like(a, torch.nan)
    seen[:, rows] = a[:, rows]
    seen[:, :, columns] = a[:, :, columns]
    return seen


def draw(panels: dict[str, Tensor], path: Path) -> None:
    """Draws one axial slice of every tensor."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colours = colormaps["gray"].with_extremes(bad="lightsteelblue")  # what nobody measured
    figure = Figure(figsize=(9, 7), layout="constrained")
    for axes, (title, tensor) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        axes.imshow(tensor[len(tensor) // 2].flip(0).numpy(), cmap=colours, vmin=0, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=110)


if __name__ == "__main__":
    main()
