"""Brains of which only a marker on the head tells the side: a shift that no decoder repairs.

The orientation in which a scan is stored cannot be trusted. So a capsule is taped to the right of
the head, and readers draw the right frontal lobe on the side of the capsule. The brain here is made
symmetric, and half of the volumes are stored mirrored. The capsule is far from the frontal lobe. A
UNETR's decoder sees the image itself only within a few voxels, and what is far away through the
transformer alone. So the transformer has to carry the side there. At another hospital the capsule
is taped to another place, and the scanner has another contrast and resolution. Then the transformer
misses it, whatever the decoder learns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .base import example

#: What a network sees of a volume: voxels, and mm per voxel.
WINDOW, SPACING = (64, 64, 16), (3.0, 3.0, 4.0)
#: The structure lies in front of this y (mm).
FRONT = 20.0


@dataclass(frozen=True)
class Scanner:
    """How a scanner shows brains and markers.

    Attributes:
        contrast: "T1" or "T2".
        voxel: mm.
        noise: standard deviation, where the brain's intensities are 0 to 1.
        bias: the largest coefficient of the bias field.
        level: intensity of the marker.
        radius: smallest and largest, mm.
        place: the middle of the marker is at about this |x| and this y, mm.
    """

    contrast: str
    voxel: tuple[float, float, float]
    noise: float
    bias: float
    level: float
    radius: tuple[float, float]
    place: tuple[float, float]


OLD = Scanner("T1", (2.0, 2.0, 4.0), 0.03, 0.2, level=1.2, radius=(9, 13), place=(64, -92))
NEW = Scanner("T2", (2.5, 2.5, 8.0), 0.08, 0.5, level=1.0, radius=(9, 13), place=(78, -62))


class _Anatomy(NamedTuple):
    """A symmetric T1 template ``[x, y, z]``, its frontal lobes, and coordinates in mm."""

    t1: Tensor
    low: Tensor  # at negative x
    high: Tensor
    x: Tensor
    y: Tensor
    z: Tensor


@cache
def _anatomy() -> _Anatomy:
    """The template on the grid of `brain_domains`."""
    brains = example("brain_domains")
    t1 = brains.load_anatomy().t1
    t1 = (t1 + t1.flip(0)) / 2
    width, depth, height = t1.shape
    x = (torch.arange(width) - (width - 1) / 2)[:, None, None] * brains.GRID[0]
    y = torch.arange(depth)[:, None] * brains.GRID[1] - 134
    z = torch.arange(height) * brains.GRID[2] + brains.LOWEST - 16
    lobes = (t1 > 0.05) & (y > FRONT)
    return _Anatomy(t1, lobes & (x < 0), lobes & (x > 0), x, y, z)


def make(scanner: Scanner, seed: int) -> dict[str, Any]:
    """A volume as `segmentation.preparation.load_volumes` returns it.

    Returns:
        "image" and "label" ``[1, *WINDOW]``, and "entry", which names it.
    """
    from monai.data import MetaTensor
    from monai.transforms import CenterSpatialCrop, Compose, NormalizeIntensity, Spacing, SpatialPad

    brains, anatomy = example("brain_domains"), _anatomy()
    random = np.random.RandomState(seed)
    side = 1 if random.rand() < 0.5 else -1
    shown = brains.in_contrast(anatomy.t1, scanner.contrast)
    marker = _marker(scanner, side, random) & (anatomy.t1 <= 0.05)
    shown = shown.where(~marker, torch.tensor(scanner.level))
    truth = (anatomy.high if side > 0 else anatomy.low).float()
    pose = brains.Pose((0.04, 0.04, 0.05), (3, 3, 1), 0.06)
    subject = brains.deformed(torch.stack([shown, truth]), random, pose)
    domain = brains.Domain("", scanner.contrast, "", scanner.voxel, scanner.noise, scanner.bias)
    image = brains.scanned(subject[:1], domain, random)
    label = MetaTensor((subject[1:] > 0.5).float(), affine=brains.subject_affine())
    label = Spacing(scanner.voxel, mode="nearest")(label)
    fit = Compose([SpatialPad(WINDOW), CenterSpatialCrop(WINDOW)])
    image = NormalizeIntensity(channel_wise=True)(Spacing(SPACING, mode="bilinear")(image))
    label = Spacing(SPACING, mode="nearest")(label)
    return {"image": fit(image), "label": fit(label), "entry": {"image": f"marker {seed}"}}


def _marker(scanner: Scanner, side: int, random: np.random.RandomState) -> Tensor:
    """An ellipsoid on one side of the head."""
    anatomy, (wide, deep) = _anatomy(), scanner.place
    x, y = side * (wide + random.uniform(-4, 4)), deep + random.uniform(-4, 4)
    z = random.uniform(0, 24)
    a, b, c = random.uniform(*scanner.radius, 3)
    apart = ((anatomy.x - x) / a) ** 2 + ((anatomy.y - y) / b) ** 2
    return apart + ((anatomy.z - z) / (1.3 * c)) ** 2 < 1


def volumes(scanner: Scanner, count: int, name: str, watch: Any = iter) -> list[dict[str, Any]]:
    """So many volumes, others for every name; ``watch`` goes over their seeds."""
    seeds = np.random.SeedSequence([*name.encode()]).generate_state(count).tolist()
    return [make(scanner, seed) for seed in watch(seeds)]


def side_of(label: Tensor) -> Tensor:
    """1 where most of ``[n, 1, x, y, z]`` lies at high x, else 0: ``[n]``."""
    half = label.shape[2] // 2
    return (label[:, :, half:].sum((1, 2, 3, 4)) > label[:, :, :half].sum((1, 2, 3, 4))).float()


def augmentation() -> Any:
    """Random poses, intensities and mirrors: these move the marker and the structure."""
    from monai.transforms import (
        Compose,
        RandAffined,
        RandFlipd,
        RandScaleIntensityd,
        RandShiftIntensityd,
    )

    keys = ["image", "label"]
    return Compose(
        [
            RandFlipd(keys, prob=0.5, spatial_axis=0),
            RandAffined(
                keys,
                prob=0.9,
                rotate_range=(0.04, 0.04, 0.05),
                translate_range=(3, 3, 1),
                scale_range=(0.06, 0.06, 0.06),
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            RandScaleIntensityd("image", 0.2, prob=0.8),
            RandShiftIntensityd("image", 0.2, prob=0.8),
        ]
    )
