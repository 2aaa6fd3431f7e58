"""Makes of the files of a volume what the network sees, in training and afterwards alike.

A `Recipe` travels in the metadata of whatever was trained, so that a prediction repeats exactly the
preparation of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import NibabelReader
from monai.transforms import (
    Compose,
    Lambdad,
    LoadImaged,
    MapLabelValued,
    NormalizeIntensityd,
    Orientationd,
    RandAffined,
    RandFlipd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
)

from segmentation.files import fail
from segmentation.unetr import Architecture

#: The entry of an adapter's metadata that holds the recipe, and its version.
KEY, VERSION = "segmentation", 1

Entry = dict[str, Any]  # "image" (a path, or one for each channel) and "label" (a path)


@dataclass(frozen=True)
class Recipe:
    """What has to be known to use a trained network on another volume.

    Attributes:
        architecture: of the network.
        spacing: mm per voxel along R, A and S, to which volumes are resampled.
        entry: which network of the checkpoint's file was the base, see `read_checkpoint`.
        new_head: whether the output layer was started anew.
        intensity_range: two intensities that become 0 and 1, with everything outside clipped. None:
            every channel gets mean 0 and standard deviation 1.
        labels: value in a label file -> class. Other values are classes themselves.
        names: class -> its name, as far as the datalist tells them.
        overlap: part by which neighbouring windows overlap in a prediction.
    """

    architecture: Architecture
    spacing: tuple[float, ...]
    entry: str | None = None
    new_head: bool = False
    intensity_range: tuple[float, ...] | None = None
    labels: Mapping[int, int] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    overlap: float = 0.25

    @property
    def window(self) -> tuple[int, ...]:
        """Voxels per side of what the network sees at once."""
        return self.architecture.img_size

    @property
    def classes(self) -> int:
        """Number of classes, the background among them."""
        return self.architecture.out_channels

    def name_of(self, number: int) -> str:
        """The name of a class."""
        return self.names.get(number, f"class {number}" if number else "background")

    def as_metadata(self) -> dict[str, Any]:
        """The recipe in plain values."""
        facts = {
            **vars(self),
            "architecture": self.architecture.as_json(),
            "labels": {str(value): number for value, number in self.labels.items()},
            "names": {str(number): name for number, name in self.names.items()},
            "version": VERSION,
        }
        return {KEY: {name: list(v) if isinstance(v, tuple) else v for name, v in facts.items()}}

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any], file: object) -> Recipe:
        """The recipe in the metadata of ``file``."""
        facts = dict(metadata.get(KEY, {}))
        version = facts.pop("version", None)
        if version != VERSION:
            wanted = "a file that examples/unetr_segmentation.py wrote"
            if version is not None:
                wanted += f", with a recipe of version {VERSION}"
            came = "without a recipe" if version is None else f"with one of version {version}"
            fail("--adapter", wanted, f"{file}, {came}")
        limits = facts["intensity_range"]
        facts |= {
            "architecture": Architecture.of_json(facts["architecture"]),
            "spacing": tuple(facts["spacing"]),
            "intensity_range": None if limits is None else tuple(limits),
            "labels": {int(value): number for value, number in facts["labels"].items()},
            "names": {int(number): name for number, name in facts["names"].items()},
        }
        return cls(**facts)


def preparation(recipe: Recipe, keys: Sequence[str] = ("image", "label")) -> Compose:
    """Transforms applied once to a volume: same orientation, spacing and scale of intensities."""
    steps: list[Callable[[Any], Any]] = [
        LoadImaged(keys, reader=_Reader, ensure_channel_first=True),
        Orientationd(keys, axcodes="RAS", labels=None),
    ]
    if "label" in keys:
        steps.append(_same_grid)
        # Scaled integers in a file may come as 0.9999, which would become class 0.
        steps.append(Lambdad("label", _rounded))
        if recipe.labels:
            values, classes = list(recipe.labels), list(recipe.labels.values())
            steps.append(MapLabelValued("label", values, classes, dtype=np.float32))
    modes = {"image": "bilinear", "label": "nearest"}
    steps.append(Spacingd(keys, pixdim=recipe.spacing, mode=[modes[key] for key in keys]))
    steps.append(intensities(recipe))
    return Compose([*steps, SpatialPadd(keys, recipe.window)])


def intensities(recipe: Recipe) -> Callable[[Any], Any]:
    """The transform that scales intensities."""
    if recipe.intensity_range is None:
        return NormalizeIntensityd("image", channel_wise=True)
    low, high = recipe.intensity_range
    return ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True)


def augmentation(recipe: Recipe, mirror: Sequence[int]) -> Compose:
    """Random transforms applied to a prepared training volume at every step."""
    keys = ["image", "label"]
    return Compose(
        [
            *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in mirror),
            RandAffined(
                keys,
                prob=0.9,
                rotate_range=(0.05, 0.05, 0.3),
                translate_range=(6, 6, 1),
                scale_range=(0.1, 0.1, 0.1),
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            RandSpatialCropd(keys, recipe.window, random_size=False),
            RandScaleIntensityd("image", 0.2, prob=0.8),
            RandShiftIntensityd("image", 0.2, prob=0.8),
        ]
    )


def load_volumes(recipe: Recipe, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Loads and prepares volumes, and keeps them in memory; names a file that cannot be read.

    Each result has "image" ``[channels, ...]``, "label" ``[1, ...]`` (if the entry has one), and
    "entry", the files.
    """
    volumes = []
    for entry in entries:
        prepare = preparation(recipe, [key for key in ("image", "label") if key in entry])
        try:
            volumes.append({**prepare(dict(entry)), "entry": entry})
        except Exception as error:  # MONAI wraps whatever a reader raises
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            fail("--data", f"a volume that can be read at {entry['image']}", f"an error ({reason})")
    return volumes


class _Reader(NibabelReader):
    """Reads several files as channels on the grid of the first, however their axes are stored."""

    def get_data(self, img: Any) -> tuple[Any, dict[str, Any]]:
        """Voxels and metadata."""
        first, *others = img if isinstance(img, list) else [img]
        axes = nib.io_orientation(first.affine)
        for number, other in enumerate(others):
            turns = nib.orientations.ornt_transform(nib.io_orientation(other.affine), axes)
            turned = other.as_reoriented(turns)
            # The headers of files with one grid may be rounded differently, which MONAI refuses.
            others[number] = nib.Nifti1Image(turned.dataobj, first.affine, turned.header)
        return super().get_data([first, *others] if others else first)


def _same_grid(volume: dict[str, Any]) -> dict[str, Any]:
    """Gives a label the grid of its image, which it has but for rounding in its header."""
    volume["label"].affine = volume["image"].affine
    return volume


def _rounded(label: torch.Tensor) -> torch.Tensor:
    return torch.round(label)
