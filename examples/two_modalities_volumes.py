"""Brains in two modalities: a T1 and a T2 volume of each subject, on one grid.

The subjects are those of `brain_domains`. Both modalities show the same deformed brain, each with
noise and a bias field of its own. They are resampled to one grid, as is usual before a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from brain_domains import SLAB, Domain, deformed, in_contrast, load_anatomy, scanned

MODALITIES = ("T1", "T2")
SIZE = (SLAB[0] // 2, SLAB[1] // 2, SLAB[2])  # voxels of 4 mm


@dataclass(frozen=True)
class Scanner:
    """A scanner that takes both modalities, and the structures that its readers drew."""

    domain: Domain  # of which the noise, the bias and the spacing matter
    structures: tuple[str, ...]


SOURCE = Scanner(
    Domain("source", "T1", "", (2.0, 2.0, 4.0), noise=0.05, bias=0.2),
    ("left frontal grey matter", "right white matter"),
)
TARGET = Scanner(
    Domain("target", "T1", "", (4.0, 4.0, 8.0), noise=0.15, bias=0.6),
    ("right posterior grey matter",),
)


@dataclass(frozen=True)
class Volumes:
    """Images ``[n, 2, *SIZE]``, T1 before T2, and masks ``[n, structures, *SIZE]`` of 0 and 1."""

    images: Tensor
    masks: Tensor

    def __getitem__(self, index: Tensor) -> Volumes:
        return Volumes(self.images[index], self.masks[index])

    def __len__(self) -> int:
        return len(self.images)


def take(
    scanner: Scanner,
    seed: int,
    counts: Sequence[int],
    track: Callable[[str, Sequence[int]], Iterable[int]],
) -> list[Volumes]:
    """Volumes of as many subjects as ``counts`` says, in as many parts.

    Other seeds and scanners give other subjects. ``track`` gets the name of the scanner and the
    seeds of the subjects; it yields these and shows the progress.
    """
    entropy = [seed, *scanner.domain.name.encode()]
    seeds = np.random.SeedSequence(entropy).generate_state(sum(counts)).tolist()
    subjects = [_subject(scanner, one) for one in track(scanner.domain.name, seeds)]
    images, masks = (torch.stack(tensors) for tensors in zip(*subjects, strict=True))
    parts = zip(images.split(list(counts)), masks.split(list(counts)), strict=True)
    return [Volumes(*part) for part in parts]


def _subject(scanner: Scanner, seed: int) -> tuple[Tensor, Tensor]:
    """Image ``[2, *SIZE]`` of mean 0 and deviation 1, and mask ``[structures, *SIZE]``."""
    random = np.random.RandomState(seed)
    anatomy = load_anatomy()
    shown = [in_contrast(anatomy.t1, modality) for modality in MODALITIES]
    drawn = [anatomy.structures[name].float() for name in scanner.structures]
    subject = deformed(torch.stack([*shown, *drawn]), random)
    scans = [
        scanned(subject[n : n + 1], scanner.domain, random).as_tensor()
        for n in range(len(MODALITIES))
    ]
    images = torch.cat([F.interpolate(scan[None], SIZE, mode="trilinear")[0] for scan in scans])
    deviation, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True)
    masks = F.adaptive_avg_pool3d(subject[len(MODALITIES) :], SIZE) > 0.5
    dtype = torch.get_default_dtype()
    return ((images - mean) / deviation).to(dtype), masks.to(dtype)
