"""Two small segmentation domains made from one real brain, as 3D NIfTI files on disk.

nilearn contains the MNI152 T1 template with its grey- and white-matter maps, so nothing is
downloaded. Every subject is an axial slab of that brain with its own random pose, size and smooth
deformation. A domain defines how a scanner shows the brain (contrast, bias field, noise, voxel
size) and which structure its readers drew. Structures are cut from the tissue maps by MNI
coordinates before the deformation, so they follow the anatomy, not the voxel grid. The tissue alone
does not identify them, since left and right, or front and back, look alike close up.

This file alone writes both domains, each with a Decathlon-style ``dataset.json``::

    python examples/brain_domains.py --output runs/brains --seed 0
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    CenterSpatialCrop,
    Rand3DElastic,
    RandBiasField,
    Spacing,
    SpatialPad,
)
from nilearn import datasets
from torch import Tensor
from tqdm import tqdm

from tcur_kernels.files.whole import replacing

GRID = (2.0, 2.0, 4.0)  # mm, the grid on which subjects are made
SLAB = (96, 96, 16)  # voxels that the scanner covers: 192 x 192 x 64 mm
LOWEST = -20.0  # mm, MNI z of the first slice of the slab


@dataclass(frozen=True)
class Domain:
    """What the scanner shows and which structure the readers drew."""

    name: str
    contrast: Literal["T1", "T2"]
    structure: str  # key of `structures`
    spacing: tuple[float, float, float]  # mm
    noise: float  # standard deviation, where the brain's intensities are 0 to 1
    bias: float  # largest coefficient of the bias field


SOURCE = Domain("source", "T1", "left frontal grey matter", (2.0, 2.0, 4.0), 0.03, 0.2)
TARGET = Domain("target", "T2", "right posterior grey matter", (2.5, 2.5, 8.0), 0.08, 0.5)


@dataclass(frozen=True)
class Pose:
    """How much subjects differ: rotations in radians, translations in voxels, relative sizes."""

    rotate: tuple[float, float, float]
    translate: tuple[float, float, float]
    scale: float


WIDE = Pose((0.08, 0.08, 0.3), (8, 8, 2), 0.12)


class Anatomy(NamedTuple):
    """The template on the subjects' grid, with a margin around the slab to deform into."""

    t1: Tensor  # 0 to 1
    structures: dict[str, Tensor]  # masks


Subject = tuple[str, int]  # section, number in it
#: Wraps the subjects while they are made; gets a label, the subjects, and their number.
Track = Callable[[str, Sequence[Subject], int], Iterable[Subject]]


def with_bar(label: str, subjects: Sequence[Subject], count: int) -> Iterable[Subject]:
    """Shows the progress as a bar."""
    return tqdm(subjects, desc=label, total=count, ncols=100)


@cache
def load_anatomy() -> Anatomy:
    """Template and structures from nilearn's maps, at 2 x 2 x 4 mm."""
    loaders = (
        datasets.load_mni152_template,
        datasets.load_mni152_gm_template,
        datasets.load_mni152_wm_template,
    )
    images = [load(resolution=2) for load in loaders]
    affine = images[0].affine
    first = round((LOWEST - affine[2, 3]) / affine[2, 2]) - 8  # eight 2 mm slices of margin
    slices = slice(first, first + 2 * SLAB[2] + 16, 2)
    t1, grey, white = (torch.tensor(im.get_fdata()[:, :, slices]).float() for im in images)
    x = (torch.arange(t1.shape[0]) * affine[0, 0] + affine[0, 3])[:, None, None]
    y = (torch.arange(t1.shape[1]) * affine[1, 1] + affine[1, 3])[:, None]
    grey, white = (grey > 0.5) & (t1 > 0.05), white > 0.5
    structures = {
        "left grey matter": grey & (x < 0),
        "left frontal grey matter": grey & (x < 0) & (y > 5),
        "right posterior grey matter": grey & (x > 0) & (y < -40),
        "right white matter": white & (x > 0),
    }
    return Anatomy(t1, structures)


def make_subject(domain: Domain, seed: int) -> tuple[MetaTensor, MetaTensor]:
    """Image and label of one subject, on the domain's voxel grid."""
    anatomy = load_anatomy()
    random = np.random.RandomState(seed)
    shown = in_contrast(anatomy.t1, domain.contrast)
    subject = deformed(torch.stack([shown, anatomy.structures[domain.structure].float()]), random)
    image = scanned(subject[:1], domain, random)
    label = MetaTensor((subject[1:] > 0.5).float(), affine=subject_affine())
    return image, Spacing(domain.spacing, mode="nearest")(label)


def in_contrast(t1: Tensor, contrast: Literal["T1", "T2"]) -> Tensor:
    """The template as a contrast shows it, 0 to about 1."""
    if contrast == "T1":
        return t1
    # dark white matter, brighter grey matter, bright fluid
    return (1.05 - t1).clamp(min=0) ** 0.8 * (t1 > 0.05)


def deformed(volumes: Tensor, random: np.random.RandomState, pose: Pose = WIDE) -> Tensor:
    """The volumes ``[n, *template]`` in one random pose and shape, cut to ``[n, *SLAB]``."""
    deform = Rand3DElastic(
        sigma_range=(5, 8),
        magnitude_range=(60, 140),
        prob=1,
        rotate_range=pose.rotate,
        translate_range=pose.translate,
        scale_range=(pose.scale,) * 3,
        padding_mode="zeros",
    )
    deform.set_random_state(int(random.randint(2**31)))
    room = SpatialPad([n + 8 for n in volumes.shape[1:3]] + [volumes.shape[3]])
    return CenterSpatialCrop(SLAB)(deform(room(volumes))).as_tensor()


def scanned(volume: Tensor, domain: Domain, random: np.random.RandomState) -> MetaTensor:
    """What the domain's scanner makes of ``[1, *SLAB]``: bias field, voxel size and noise."""
    bias = RandBiasField(coeff_range=(0, domain.bias), prob=1)
    bias.set_random_state(int(random.randint(2**31)))
    image = MetaTensor(bias(volume).as_tensor(), affine=subject_affine())
    image = Spacing(domain.spacing, mode="bilinear")(image)
    image += domain.noise * torch.from_numpy(random.standard_normal(image.shape)).float()
    return image


def subject_affine() -> Tensor:
    """Of the grid on which subjects are made."""
    return torch.diag(torch.tensor([*GRID, 1.0], dtype=torch.float64))


def write_domain(
    folder: Path, domain: Domain, counts: Mapping[str, int], seed: int, track: Track = with_bar
) -> Path:
    """Writes ``counts[section]`` subjects per section and the datalist.

    Different seeds, domains and sections give different subjects. ``track`` shows the progress.

    Returns:
        The path of the datalist JSON.
    """
    datalist: dict[str, object] = {
        "name": f"brain slabs, {domain.name} domain",
        "description": f"{domain.contrast}, {domain.structure}",
        "modality": {"0": domain.contrast},
        "labels": {"0": "background", "1": domain.structure},
    }
    entropy = [seed, *domain.name.encode()]
    seeds = iter(np.random.SeedSequence(entropy).generate_state(sum(counts.values())).tolist())
    entries: dict[str, list[dict[str, str]]] = {section: [] for section in counts}
    subjects = [(section, number) for section in counts for number in range(counts[section])]
    for section, number in track(f"{domain.name} volumes", subjects, len(subjects)):
        entry = {}
        volumes = zip(("image", "label"), make_subject(domain, next(seeds)), strict=True)
        for kind, volume in volumes:
            file = folder / f"{kind}s" / f"{section}_{number:02d}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            kept = np.float32 if kind == "image" else np.uint8
            voxels = volume[0].numpy().astype(kept)
            with replacing(file) as fresh:
                nib.save(nib.Nifti1Image(voxels, volume.affine.numpy()), fresh)
            entry[kind] = str(file.relative_to(folder))
        entries[section].append(entry)
    path = folder / "dataset.json"
    with replacing(path) as fresh:
        fresh.write_text(json.dumps({**datalist, **entries}, indent=1))
    return path


def main() -> None:
    """Writes both domains."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/brains"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training", type=int, default=24, help="volumes per domain")
    parser.add_argument("--validation", type=int, default=8, help="volumes per domain")
    args = parser.parse_args()
    for domain in (SOURCE, TARGET):
        counts = {"training": args.training, "validation": args.validation}
        print(write_domain(args.output / domain.name, domain, counts, args.seed))


if __name__ == "__main__":
    main()
