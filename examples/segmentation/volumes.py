"""Looks at every volume of a datalist before anything is trained, and reports all that is wrong."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from segmentation.files import fail, refuse_all
from segmentation.nifti import FAR_APART, BadVolumeError, Grid, Volume, read_grid, read_volume
from segmentation.preparation import Entry, Recipe, preparation

_MOST_VOXELS = 2**30  # of a resampled volume; more means that voxel sizes are wrong


@dataclass
class Findings:
    """What was found: a line for every volume, what must be mended, and what is good to know."""

    rows: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def tell(self, argument: str, where: object) -> None:
        """Prints what was found; problems end the program.

        Args:
            argument: the option that named the volumes.
            where: what it named.
        """
        print("\n".join([*self.rows, *(f"note: {note}" for note in self.notes)]))
        refuse_all(argument, where, self.problems)


def check_volumes(
    recipe: Recipe,
    sections: Mapping[str, Sequence[Entry]],
    allow_empty: bool = False,
    watch: Callable[[list[Any]], Iterable[Any]] = iter,
) -> Findings:
    """Checks all volumes of a datalist: their files, and what the preparation makes of them.

    Args:
        recipe: the preparation and the classes.
        sections: section -> its entries; those without "label" are only segmented.
        allow_empty: accept labels that are background everywhere.
        watch: wraps the list of volumes, to show the progress.
    """
    found, classes = Findings(), set()
    seen: dict[str, str] = {}
    listed = [(s, i, entry) for s, entries in sections.items() for i, entry in enumerate(entries)]
    for section, number, entry in watch(listed):
        where = f"{section}[{number}]"
        _note_repeats(where, entry, seen, found)
        labelled = _check(recipe, where, entry, allow_empty, found)
        classes |= labelled if section == "training" else set()
    if "training" in sections and not found.problems:
        for number in sorted(set(range(1, recipe.classes)) - classes):
            found.notes.append(f"no training volume has {recipe.name_of(number)} ({number})")
    return found


def files_of(entry: Entry, key: str) -> list[Path]:
    """The files of an image, which may have one for each channel, or of a label."""
    held = entry.get(key, [])
    return [Path(file) for file in (held if isinstance(held, list) else [held])]


def median_spacing(entries: Sequence[Entry]) -> tuple[float, ...]:
    """The median voxel size in mm of the images that can be read, along R, A and S."""
    sizes = []
    for entry in entries:
        try:
            sizes.append(read_grid(files_of(entry, "image")[0]).spacing())
        except BadVolumeError:
            continue  # `check_volumes` tells of it
    return tuple(float(f"{size:.4g}") for size in np.median(sizes, 0)) if sizes else (1.0,) * 3


def highest_class(labels: Mapping[int, int], sections: Mapping[str, Sequence[Entry]]) -> int:
    """The highest class in any label; refuses classes that no label has below it.

    A mask of 0 and 255 is one structure, and not the last of 255.
    """
    values: dict[int, Path] = {}
    readable = True
    for entries in sections.values():
        for file in (file for entry in entries for file in files_of(entry, "label")):
            try:
                values |= {int(value): file for value in _label_values(read_volume(file), file)}
            except BadVolumeError:
                readable = False  # `check_volumes` tells of it
    classes = sorted({labels.get(value, value) for value in values} | {0})
    highest = classes[-1]
    absent = sorted(set(range(1, highest)) - set(classes))
    if absent and readable:
        renamed = {value: classes.index(labels.get(value, value)) for value in sorted(values)}
        hint = " ".join(f"{v}={c}" for v, c in renamed.items() if v != c and v > 0)
        last = next(file for value, file in values.items() if labels.get(value, value) == highest)
        fail(
            "--data",
            f"classes 0 to {len(classes) - 1} for a new output layer (--labels {hint} makes them, "
            f"--out-channels {highest + 1} takes them as they are)",
            f"{_some(np.array(classes))} in the labels, {highest} in {last}",
        )
    return highest


def _note_repeats(where: str, entry: Entry, seen: dict[str, str], found: Findings) -> None:
    """Notes files that the datalist has twice."""
    repeated: dict[str, list[str]] = {}
    for file in (*files_of(entry, "image"), *files_of(entry, "label")):
        other = seen.setdefault(os.path.realpath(str(file).replace("\0", "")), where)
        if other != where:
            repeated.setdefault(other, []).append(file.name)
    for other, names in repeated.items():
        found.notes.append(f"{where}: {' and '.join(names)} already in {other}")


def _check(
    recipe: Recipe, where: str, entry: Entry, allow_empty: bool, found: Findings
) -> set[int]:
    """Checks one volume and adds to what was found; returns the classes of its label."""
    before = len(found.problems)
    image = label = None
    try:
        image = _image(recipe, entry)
    except BadVolumeError as problem:
        found.problems.append(f"{where}: {problem}")
    try:
        label = _label(recipe, entry, allow_empty) if "label" in entry else None
    except BadVolumeError as problem:
        found.problems.append(f"{where}: {problem}")
    if image is None or len(found.problems) > before:
        return set()
    try:
        return _check_together(recipe, where, entry, image, label, found)
    except BadVolumeError as problem:
        found.problems.append(f"{where}: {problem}")
        return set()


def _check_together(
    recipe: Recipe, where: str, entry: Entry, image: Grid, label: Volume | None, found: Findings
) -> set[int]:
    """Checks an image and its label against each other and against the preparation."""
    file, classes = files_of(entry, "image")[0], set()
    row = f"{where:<15} {file.name}: {image}"
    if label is not None:
        _check_same_grid(file, image, files_of(entry, "label")[0], label)
        numbers, counts = np.unique(_mapped(recipe, label.voxels), return_counts=True)
        classes = {int(number) for number in numbers}
        counted = zip(numbers, counts, strict=True)
        row += f"; voxels: {', '.join(f'{recipe.name_of(int(n))} {c:,}' for n, c in counted)}"
    resampled = _check_prepared(recipe, entry, image, classes)
    if not image.oriented:
        found.notes.append(
            f"{where}: {file.name} does not say how its axes lie in the patient (sform_code and "
            f"qform_code are 0); they are taken to be {image.axes()}"
        )
    if any(side < least for side, least in zip(resampled, recipe.window, strict=True)):
        small, window = ("x".join(map(str, sides)) for sides in (resampled, recipe.window))
        found.notes.append(
            f"{where}: {file.name} has {small} voxels at the spacing of the training, less than "
            f"the window {window}; it is padded"
        )
    found.rows.append(row)
    return classes


def _image(recipe: Recipe, entry: Entry) -> Grid:
    """Reads an image; refuses wrong channels, NaN, Inf, and channels of one value."""
    files = files_of(entry, "image")
    parts = [read_volume(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if len(files) > 1 and part.shape[3] > 1:
            one = f"one channel in {file}, one of the {len(files)} files of an image"
            raise BadVolumeError(f"expected {one}, got {part.shape[3]}")
        _check_same_grid(files[0], parts[0], file, part)
    channels, wanted = sum(part.shape[3] for part in parts), recipe.architecture.in_channels
    if channels != wanted:
        what = "a 4D file of " if parts[0].shape[3] > 1 else ""
        raise BadVolumeError(
            f"expected {wanted} channel(s) in {files[0]}, as the UNETR takes, got {what}{channels};"
            " write those that it was trained with into files of their own"
        )
    for file, part in zip(files, parts, strict=True):
        for number in range(part.shape[3]):
            which = f"{file}, channel {number}" if part.shape[3] > 1 else f"{file}"
            _check_intensities(recipe, which, part.voxels[..., number])
    return parts[0]


def _check_intensities(recipe: Recipe, which: str, voxels: NDArray[Any]) -> None:
    """Checks one channel of an image."""
    bad = int((~np.isfinite(voxels)).sum())
    if bad:
        raise BadVolumeError(
            f"expected finite numbers in {which}, got NaN or Inf in {bad:,} of {voxels.size:,} "
            "voxels"
        )
    low, high = voxels.min(), voxels.max()
    if low == high:
        raise BadVolumeError(f"expected an image in {which}, got {low:g} in every voxel")
    limits = recipe.intensity_range
    if limits is not None and (high <= limits[0] or low >= limits[1]):
        raise BadVolumeError(
            f"expected intensities within --intensity-range {limits[0]:g} {limits[1]:g} in {which},"
            f" got {low:g} to {high:g}"
        )


def _label_values(label: Volume, file: Path) -> NDArray[Any]:
    """The values of a label, as whole numbers; refuses others."""
    if label.shape[3] != 1:
        raise BadVolumeError(
            f"expected one class per voxel in {file}, got a 4D file of {label.shape[3]} channels"
        )
    bad = int((~np.isfinite(label.voxels)).sum())
    if bad:
        raise BadVolumeError(f"expected classes in {file}, got NaN or Inf in {bad:,} voxels")
    values = np.unique(label.voxels)
    broken = values[np.abs(values - np.round(values)) > 1e-3]
    if len(broken):
        raise BadVolumeError(
            f"expected whole numbers in {file}, got {_some(broken)} (probabilities, or a label "
            "that was resampled by interpolation?)"
        )
    return np.unique(np.round(values))


def _label(recipe: Recipe, entry: Entry, allow_empty: bool) -> Volume:
    """Reads a label; refuses numbers that are no classes, and labels of one value."""
    (file,) = files_of(entry, "label")
    label = read_volume(file)
    values = _label_values(label, file)
    kept = _mapped(recipe, values)
    beyond = values[(kept < 0) | (kept >= recipe.classes)]
    if len(beyond):
        raise BadVolumeError(
            f"expected classes 0 to {recipe.classes - 1} in {file}, got {_some(beyond)}; --labels "
            f"{beyond[-1]:.0f}=1 makes a value a class, --new-head starts an output layer for more "
            "of them"
        )
    if kept.max() == 0 and not allow_empty:
        raise BadVolumeError(
            f"expected a structure in {file}, got background in every voxel; --allow-empty accepts "
            "volumes without one"
        )
    if kept.min() == kept.max() > 0:
        raise BadVolumeError(f"expected background, too, in {file}, got {kept[0]:g} in every voxel")
    return label


def _mapped(recipe: Recipe, values: NDArray[Any]) -> NDArray[Any]:
    """The classes of values in a label file."""
    values = np.round(values)
    classes = values.copy()
    for value, number in recipe.labels.items():
        classes[values == value] = number
    return classes


def _check_same_grid(first: Path, one: Grid, second: Path, other: Grid) -> None:
    """Refuses two files that do not lie on the same voxels of the patient."""
    shapes = [volume.canonical()[1] for volume in (one, other)]
    if shapes[0] != shapes[1]:
        raise BadVolumeError(
            f"expected {second} on the grid of {first}, {one}, got {other}; resample one onto the "
            "other"
        )
    apart = np.linalg.norm(one.corners() - other.corners(), axis=1).max()
    if apart > FAR_APART * one.spacing().min():
        raise BadVolumeError(
            f"expected {second} on the grid of {first}, {one}, got {other}, whose corners are up "
            f"to {apart:.3g} mm away: it is flipped, turned or shifted against it, or its header "
            "is wrong; look at both in a viewer"
        )


def _check_prepared(
    recipe: Recipe, entry: Entry, image: Grid, classes: set[int]
) -> tuple[int, ...]:
    """Prepares the volume as the training does; returns its shape before it is padded."""
    file, (_, shape) = files_of(entry, "image")[0], image.canonical()
    ratio = image.spacing() / recipe.spacing
    expected = [max(1, round(side * part)) for side, part in zip(shape, ratio, strict=True)]
    spacing = "x".join(f"{size:g}" for size in recipe.spacing)
    if math.prod(expected) > _MOST_VOXELS or max(expected) == 1 < max(shape):
        raise BadVolumeError(
            f"expected voxel sizes of {file} that go with --spacing {spacing} mm, got {image}, "
            f"which become {'x'.join(map(str, expected))} voxels"
        )
    keys = [key for key in ("image", "label") if key in entry]
    try:
        prepared = preparation(recipe, keys)(dict(entry))
    except Exception as error:  # whatever a transform raises, MONAI wraps
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise BadVolumeError(f"expected {file} to be prepared, got an error ({reason})") from error
    if not torch.isfinite(prepared["image"]).all():
        raise BadVolumeError(f"expected finite intensities of {file}, got NaN or Inf once scaled")
    left = set(prepared["label"].unique().int().tolist()) if "label" in keys else classes
    lost = sorted(classes - left - {0})
    if lost:
        names = ", ".join(recipe.name_of(number) for number in lost)
        raise BadVolumeError(
            f"expected every structure of {files_of(entry, 'label')[0]} to be left at --spacing "
            f"{spacing} mm, got none of {names}, which is smaller than a voxel"
        )
    return tuple(prepared["image"].applied_operations[-1]["orig_size"])


def _some(values: NDArray[Any]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:5])
    return shown + (", …" if len(values) > 5 else "")
